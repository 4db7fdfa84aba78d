"""Stage ``zero_shot``: data/embeddings/<run> -> data/results/zero_shot/<run>.json of every run."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import evaluation, tracking, zero_shot
from pipeline import params as config


def main() -> None:
    params = config.load()
    out = Path("data/results/zero_shot")
    out.mkdir(parents=True, exist_ok=True)  # an output of the stage even where there is no run
    for name in params.runs:
        with tracking.stage_run("zero_shot", name, params.evaluate, params.tracking.enabled) as record:
            found = zero_shot.evaluate(
                Path("data/embeddings") / name,
                Path("data/index"),
                list(params.sources),
                params.evaluate.bootstrap,
                params.seed,
            )
            evaluation.write(out / f"{name}.json", name, found)
            record.metrics(evaluation.values(found))
        evaluation.show("zero_shot", name, found)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"zero_shot: {error}")
