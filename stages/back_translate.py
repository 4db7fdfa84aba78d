"""Stage ``back_translate``: data/index/<dataset>.parquet -> data/back_translation, training reports in other words."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import params as config
from pipeline import tracking
from pipeline.back_translation import back_translate

INDEX = Path("data/index")


def main() -> None:
    params = config.load()
    options = params.back_translation
    with tracking.stage_run("back_translate", "all", options, params.tracking.enabled) as run:
        indexes = [INDEX / f"{dataset}.parquet" for dataset in params.sources]
        out, work = Path("data/back_translation"), Path("data/work/back_translation")
        summary = back_translate(options, params.seed, indexes, out, work)
        note = summary.pop("note", "")
        run.metrics({key: float(value) for key, value in summary.items()})
    print("back_translate: " + (note or ", ".join(f"{key} {value}" for key, value in summary.items())))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"back_translate: {error}")
