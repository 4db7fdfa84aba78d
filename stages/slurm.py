"""Write the sbatch file that trains a run on several nodes: python -m stages.slurm RUN --nodes 2 > train.sbatch"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.config.run_config import read_run_config, run_config, without_speed
from stages import run as run_stage

TEMPLATE = Path(__file__).with_suffix(".sbatch")


def asked_for(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run of params.yaml")
    parser.add_argument("--seed", type=int, default=0, help="one of seeds (default 0)")
    for name, default in (("nodes", 1), ("gpus", 4)):  # gpus: of each node
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--time", default="24:00:00", help="limit (default 24:00:00); the job queues again at its end")
    parser.add_argument("--partition", default="", help="default: the cluster's own choice")
    parser.add_argument("--restarts", type=int, default=3, help="after a lost process, till the job fails (default 3)")
    return parser.parse_args(words)


def main(*words: str) -> None:
    params, asked = load_params(), asked_for(words)
    nodes, gpus = asked.nodes, asked.gpus
    run, world = run_config(params, asked.run), nodes * gpus
    if nodes < 1 or gpus < 1:
        raise ParamsError("--nodes and --gpus: one at least")
    if run.train.batch_size % world:
        count = f"{world} processes ({nodes} nodes of {gpus})"
        raise ParamsError(f"train.batch_size: {run.train.batch_size} studies do not divide among {count}")
    made = Path("data/corpus") / asked.run / "run.json"
    if not made.is_file() or read_run_config(made) != without_speed(run):
        raise ParamsError(f"{made}: not there, or of other parameters; run dvc repro corpus first")
    if asked.seed not in params.seeds:
        raise ParamsError(f"--seed: {asked.seed} is not among seeds of params.yaml")
    line = f"#SBATCH --partition={asked.partition}\n" if asked.partition else ""
    values = {**vars(asked), "cpus": gpus * (run.train.workers + 1), "partition": line}
    print(TEMPLATE.read_text(encoding="utf-8").format(**values), end="")


if __name__ == "__main__":
    run_stage("slurm", main, "RUN ...")
