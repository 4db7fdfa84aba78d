"""Stage ``pretrain@run-seed``: data/corpus/<run> -> data/models/<run>/<seed>, data/results/pretrain/<run>/<seed>.csv.

``python -m stages.pretrain RUN SEED [--resume-anyway]``. With ``--resume-anyway`` an interrupted training goes on even
though code or libraries have changed since; parameters and data are compared all the same.

Exit status: 0 done; 75 a signal stopped it and the next start goes on; else it failed, and one line says why.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.run_config import run_config, speed
from pipeline.tracking import launcher, mlflow_runs
from pipeline.tracking.work_folders import work_folder
from pipeline.training import loop, resume


def main(run_name: str, seed: int, resume_anyway: bool) -> None:
    started_by = launcher.launcher()
    params = load_params()
    run = run_config(params, run_name, seed)
    name, fast = f"{run_name}/{seed}", speed(params, run_name)
    first = os.environ.get("RANK", "0") == "0"
    with mlflow_runs.stage_run("pretrain", name, run, params.tracking.enabled and first) as record:
        history, work = Path("data/results/pretrain") / f"{name}.csv", work_folder(f"pretrain/{name}")
        corpus, out = Path("data/corpus") / run_name, Path("data/models") / name
        best = loop.train_run(corpus, out, history, work, record.metrics, seed, fast, resume_anyway)
        record.metrics({"best_valid_loss": best})
        if first:
            record.artifact(history)
            print(f"pretrain {name}: best validation loss {best:.4f}")
    if first and launcher.is_there(started_by):
        resume.forget(work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of params.yaml")
    parser.add_argument("seed", type=int, help="one of seeds")
    parser.add_argument("--resume-anyway", action="store_true", help="go on from a state of other code or libraries")
    asked = parser.parse_args()
    try:
        main(asked.run, asked.seed, asked.resume_anyway)
    except resume.Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain {asked.run}/{asked.seed}: {stopped}", file=sys.stderr)
        sys.exit(resume.EXIT_STOPPED)
    except (ValueError, FloatingPointError, resume.StateError) as error:
        sys.exit(f"pretrain {asked.run}/{asked.seed}: {error}" if str(error) else 1)  # one rank says it for all
