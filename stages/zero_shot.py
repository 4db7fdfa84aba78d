"""Stage ``zero_shot@run``: data/embeddings/<run> -> data/results/zero_shot/<run>.json."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import evaluation, tracking, zero_shot
from pipeline import params as config


def main(name: str) -> None:
    params = config.load()
    with tracking.stage_run("zero_shot", name, params.evaluate, params.tracking.enabled) as record:
        found = zero_shot.evaluate(
            Path("data/embeddings") / name,
            Path("data/index"),
            list(params.sources),
            params.evaluate.bootstrap,
            params.seed,
        )
        evaluation.write(Path("data/results/zero_shot") / f"{name}.json", name, found)
        record.metrics(evaluation.values(found))
    evaluation.show("zero_shot", name, found)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(f"zero_shot {sys.argv[1]}: {error}")
