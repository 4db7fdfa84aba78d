"""The sbatch file, run by bash with stand-ins for the cluster's commands."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.config.run_config import run_config, write_run_config
from stages import slurm

ROOT = Path(__file__).parents[1]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the micro profile and the corpus of its runs."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "profiles" / "micro.yaml").read_bytes())
    record = load_params(tmp_path / "params.yaml")
    for name in record.runs:
        (tmp_path / "data" / "corpus" / name).mkdir(parents=True)
        write_run_config(tmp_path / "data" / "corpus" / name / "run.json", run_config(record, name))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(monkeypatch, capsys, *arguments):
    slurm.main(*arguments)
    return capsys.readouterr().out


@pytest.fixture
def cluster(place, monkeypatch, capsys):
    """A function that starts the file; each command of the cluster notes how it was called in ``calls``."""
    (place / ".venv" / "bin").mkdir(parents=True)
    (place / ".venv" / "bin" / "activate").write_text("")
    tools = place / "bin"
    tools.mkdir()
    commands = {
        "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; fi',
        # Told to end, srun kills the tasks of its step; scancel reaches the tasks, once there is a step.
        "srun": """
            trap 'kill -KILL $(cat step)' TERM
            while [ "${1:0:1}" = - ]; do shift; done
            [ -z "$LATE" ] || sleep 1.5
            "$@" & task=$!; echo $task > step
            until wait $task; code=$?; ! kill -0 $task 2>/dev/null; do :; done; exit $code""",
        "scancel": '[ "$*" = "--signal=TERM 42.0" ] && [ -f step ] && kill -TERM $(cat step)',
        "torchrun": '[ "$ENDS" = none ] || exit "$ENDS"; while :; do sleep 0.05; done',
        "dvc": "",
    }
    for name, does in commands.items():
        heeds = 'trap "sleep ${SAVING:-0}; echo saved >> calls; exit 1" TERM' if name == "torchrun" else ""
        (tools / name).write_text(f'#!/bin/bash\n{heeds}\necho "{name} $*" >> calls\n{does}\n')
        (tools / name).chmod(0o755)
    options = ("--nodes", "2", "--gpus", "4", "--partition", "big", "--time", "8:00:00")
    (place / "train.sbatch").write_text(written(monkeypatch, capsys, "resnet_mcc", *options))
    names = {"SLURM_SUBMIT_DIR": str(place), "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}

    def start(ends, late=""):
        env = {**os.environ, **names, "SLURM_JOB_ID": "42", "ENDS": ends, "LATE": late}
        env["PATH"] = f"{tools}:{os.environ['PATH']}"
        return subprocess.Popen(["bash", "train.sbatch"], cwd=place, env=env)

    return start, place / "calls"


def test_the_job_trains_and_tells_dvc(cluster):
    start, calls = cluster
    assert start("0").wait() == 0
    said = calls.read_text().splitlines()
    wanted = (
        "torchrun --nnodes=2 --nproc-per-node=4 --max-restarts=3 --shutdown-timeout=100 --rdzv-backend=c10d "
        "--rdzv-id=42-0 --rdzv-endpoint=node7:15042 -m stages.pretrain resnet_mcc 0"
    )
    assert wanted in said and f"srun --kill-on-bad-exit=1 --cpus-per-task=4 {wanted}" in said
    assert said[-1] == "dvc commit --force pretrain@resnet_mcc-0"


def test_a_failed_training_is_a_failed_job(cluster):
    start, calls = cluster
    assert start("3").wait() == 3
    assert "dvc" not in calls.read_text() and "requeue" not in calls.read_text()


def test_a_second_signal_waits_for_what_is_being_saved(cluster, monkeypatch):
    monkeypatch.setenv("SAVING", "1")
    start, calls = cluster
    job = start("none")
    while not calls.exists() or "\ntorchrun" not in calls.read_text():
        time.sleep(0.02)
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
        job.send_signal(number)
        time.sleep(0.2)
    assert job.wait() == 0
    assert calls.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 42"]


@pytest.mark.parametrize("late", ["", "late"])  # the step is there, or is being made
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_to_end_stops_the_training_and_queues_again(cluster, number, late):
    start, calls = cluster
    job = start("none", late)
    while not calls.exists() or f"\n{'srun' if late else 'torchrun'}" not in calls.read_text():
        time.sleep(0.02)
    job.send_signal(number)
    assert job.wait() == 0
    assert calls.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 42"]


def test_what_is_asked_of_the_cluster(place, monkeypatch, capsys):
    text = written(monkeypatch, capsys, "resnet_mcc", "--nodes", "2", "--gpus", "2", "--time", "1:00:00")
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--time=1:00:00"} <= {*asked}
    assert {"--requeue", "--signal=B:USR1@120"} <= {*asked} and "partition" not in text


def test_what_cannot_be_trained_is_not_asked_for(place, monkeypatch, capsys):
    with pytest.raises(ParamsError, match=r"8 studies do not divide among 12 processes \(3 nodes of 4\)"):
        written(monkeypatch, capsys, "resnet_mcc", "--nodes", "3")
    with pytest.raises(ParamsError, match=r"runs\.other: no such run"):
        written(monkeypatch, capsys, "other")
    with pytest.raises(ParamsError, match="one at least"):
        written(monkeypatch, capsys, "resnet_mcc", "--nodes", "0")
    values = yaml.safe_load((place / "params.yaml").read_text())
    values["train"]["lr"] = 0.5
    (place / "params.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ParamsError, match=r"run\.json: not there, or of other parameters; run dvc repro corpus"):
        written(monkeypatch, capsys, "resnet_mcc")
