"""Write the sbatch file that trains a run on several nodes: python -m stages.slurm RUN --nodes 2 > train.sbatch"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.config.run_config import read_run_config, run_config, without_speed

TEMPLATE = """#!/bin/bash
#SBATCH --job-name=pretrain-{run}-{seed}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={time}
{partition}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=pretrain-{run}-{seed}-%j.log
# Written by: python -m stages.slurm. One torchrun on each node; they meet on the first one.
set -u
cd "$SLURM_SUBMIT_DIR"
. .venv/bin/activate
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Two minutes before the end of its time (or of its turn) the job is told so: every torchrun gets SIGTERM and passes it
# on, the training saves its state, and the job queues again.
training= stopped=
stop() {{ stopped=1; [ -z "$training" ] || kill -TERM "$training"; }}
trap stop USR1 TERM

srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node={gpus} --max-restarts={restarts} \\
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}" --rdzv-endpoint="$head:{port}" \\
    -m stages.pretrain {run} {seed} &
training=$!
[ -z "$stopped" ] || kill -TERM "$training"
wait "$training"; status=$?
if [ -n "$stopped" ]; then
    wait "$training"; status=$?  # the trap ended the first wait
    [ "$status" -eq 0 ] || {{ scontrol requeue "$SLURM_JOB_ID"; exit 0; }}
fi
[ "$status" -eq 0 ] && dvc commit --force pretrain@{run}-{seed}  # DVC takes the outputs as those of its stage
exit "$status"
"""


def sbatch(
    run: str, seed: int, nodes: int, gpus: int, cpus: int, time: str, partition: str, restarts: int, port: int
) -> str:
    """The text of the file; ``cpus`` a node, ``partition`` "" for the cluster's own choice."""
    line = f"#SBATCH --partition={partition}\n" if partition else ""
    return TEMPLATE.format(
        run=run, seed=seed, nodes=nodes, gpus=gpus, cpus=cpus, time=time, partition=line, restarts=restarts, port=port
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="a run of params.yaml")
    parser.add_argument("--seed", type=int, default=0, help="one of seeds (default 0)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=4, help="of each node (default 4)")
    parser.add_argument(
        "--time", default="24:00:00", help="limit of the job (default 24:00:00); it queues again at its end"
    )
    parser.add_argument("--partition", default="")
    parser.add_argument(
        "--restarts", type=int, default=3, help="after a lost process, before the job fails (default 3)"
    )
    parser.add_argument("--port", type=int, default=29400, help="where the nodes meet, on the first one")
    asked = parser.parse_args()
    params = load_params()
    run = run_config(params, asked.run)
    world = asked.nodes * asked.gpus
    if asked.nodes < 1 or asked.gpus < 1:
        raise ParamsError("--nodes and --gpus: one at least")
    if run.train.batch_size % world:
        raise ParamsError(
            f"train.batch_size: {run.train.batch_size} studies do not divide among {world} processes "
            f"({asked.nodes} nodes of {asked.gpus})"
        )
    made = Path("data/corpus") / asked.run / "run.json"
    if not made.is_file() or read_run_config(made) != without_speed(run):
        raise ParamsError(f"{made}: not there, or of other parameters; run dvc repro corpus first")
    if asked.seed not in params.seeds:
        raise ParamsError(f"--seed: {asked.seed} is not among seeds of params.yaml")
    cpus = asked.gpus * (run.train.workers + 1)
    sizes = asked.nodes, asked.gpus, cpus
    print(sbatch(asked.run, asked.seed, *sizes, asked.time, asked.partition, asked.restarts, asked.port), end="")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"slurm: {error}")
