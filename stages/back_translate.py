"""Stage ``back_translate``: data/index/<dataset>.parquet -> data/back_translation, training reports in other words."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.text.back_translation import back_translate
from pipeline.tracking import mlflow_runs

INDEX = Path("data/index")


def main() -> None:
    params = load_params()
    options = params.back_translation
    with mlflow_runs.stage_run("back_translate", "all", options, params.tracking.enabled) as run:
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
