"""Stage ``corpus``: indexes, prompts, translations -> data/corpus/<run>/ of every run, all its training depends on."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.run_config import run_config, without_speed
from pipeline.tracking import mlflow_runs
from pipeline.training import corpus


def main() -> None:
    params = load_params()
    out = Path("data/corpus")
    out.mkdir(parents=True, exist_ok=True)  # an output of the stage even where there is no run
    for name in params.runs:
        run = run_config(params, name)
        with mlflow_runs.stage_run("corpus", name, run, params.tracking.enabled) as record:
            translations = Path("data/back_translation")
            prompts = Path("data/prompts") / params.runs[name].prompts
            counts = corpus.write_corpus(without_speed(run), Path("data/index"), prompts, out / name, translations)
            record.metrics({key: float(value) for key, value in counts.items()})
        print(f"corpus {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"corpus: {error}")
