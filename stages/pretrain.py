"""Stage ``pretrain@run-seed``: data/corpus/<run> -> data/models/<run>/<seed>, data/results/pretrain/<run>/<seed>.csv.

``--resume-anyway`` after run and seed resumes from a saved state of other code or libraries.
Exit status: 0 done; 75 a signal stopped it and the next start resumes it; else it failed, and one line says why.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.run_config import run_config, speed
from pipeline.tracking import launcher, mlflow_runs
from pipeline.tracking.work_folders import work_folder
from pipeline.training import loop, resume
from stages import run

FIRST = os.environ.get("RANK", "0") == "0"


def main(run_name: str, seed: str, option: str = "") -> None:
    if option not in ("", "--resume-anyway"):
        raise ValueError(f"{option}: no such option; there is --resume-anyway")
    started_by = launcher.launcher()
    params = load_params()
    config = run_config(params, run_name, int(seed))
    name, fast = f"{run_name}/{seed}", speed(params, run_name)
    with mlflow_runs.stage_run("pretrain", name, config, params.tracking.enabled and FIRST) as record:
        history, work = Path("data/results/pretrain") / f"{name}.csv", work_folder(f"pretrain/{name}")
        corpus, out = Path("data/corpus") / run_name, Path("data/models") / name
        best = loop.train_run(corpus, out, history, work, record.metrics, int(seed), fast, bool(option))
        record.metrics({"best_valid_loss": best})
        if FIRST:
            record.artifact(history)
            print(f"pretrain {name}: best validation loss {best:.4f}")
    if FIRST and launcher.is_there(started_by):  # it takes the outputs; else the next start writes them again
        resume.forget(work)


if __name__ == "__main__":
    try:
        run("pretrain", main, "RUN SEED [--resume-anyway]")
    except resume.Stopped as stopped:
        if FIRST:
            print(f"pretrain {'/'.join(sys.argv[1:3])}: {stopped}", file=sys.stderr)
        sys.exit(resume.EXIT_STOPPED)
    except FloatingPointError as error:
        sys.exit(f"pretrain {'/'.join(sys.argv[1:3])}: {error}" if str(error) else 1)  # one rank says it for all
