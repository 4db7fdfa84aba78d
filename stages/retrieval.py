"""Stage ``retrieval@run``: data/embeddings/<run> -> data/results/retrieval/<run>.json."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import evaluation, retrieval, tracking
from pipeline import params as config


def main(name: str) -> None:
    params = config.load()
    with tracking.stage_run("retrieval", name, params.evaluate, params.tracking.enabled) as record:
        found = retrieval.evaluate(
            Path("data/embeddings") / name,
            Path("data/index"),
            list(params.sources),
            params.evaluate.retrieval.k,
            params.evaluate.bootstrap,
            params.seed,
        )
        evaluation.write(Path("data/results/retrieval") / f"{name}.json", name, found)
        record.metrics(evaluation.values(found))
    evaluation.show("retrieval", name, found)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(f"retrieval {sys.argv[1]}: {error}")
