"""Stage ``corpus@run``: indexes and prompts -> data/corpus/<run>/, all that the run's training depends on."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import corpus, tracking
from pipeline import params as config


def main(name: str) -> None:
    params = config.load()
    run = config.run_config(params, name)
    with tracking.stage_run("corpus", name, run, params.tracking.enabled) as record:
        counts = corpus.gather(run, Path("data/index"), Path("data/prompts"), Path("data/corpus") / name)
        record.metrics({key: float(value) for key, value in counts.items()})
    print(f"corpus {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(f"corpus {sys.argv[1]}: {error}")
