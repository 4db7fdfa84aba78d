"""The stage as users run it, under DVC and torchrun: killed, stopped, out of disk, a process lost."""

import csv
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from tests.conftest import RESNET, make_config, make_corpus

drill = pytest.mark.drill
ROOT = Path(__file__).parents[1]
STAGE = ("-m", "stages.pretrain", "tiny", "0")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


class Workspace:
    """A repository of one stage, ``pretrain@tiny``, whose corpus is there."""

    def __init__(self, folder):
        self.folder = folder
        self.state = folder / "data" / "work" / "pretrain" / "tiny" / "0" / "state.pt"
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
        self.env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}

    def start(self, *command):
        log = (self.folder / "log").open("a")
        return subprocess.Popen(
            command, cwd=self.folder, env=self.env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def run(self, *command, fails=False):
        """What a command says; it must end well, or not well."""
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert bool(done.returncode) == fails, done.stdout[-2000:] + done.stderr[-3000:]
        return done

    def wait(self, process, epoch=0):
        """Until a training that was started has saved its state (in or after an epoch)."""
        while not self.state.exists() or torch.load(self.state, weights_only=True)["progress"]["epoch"] < epoch:
            assert process.poll() is None, (self.folder / "log").read_text()[-3000:]
            time.sleep(0.05)

    def outputs(self):
        with (self.folder / "data" / "results" / "pretrain" / "tiny" / "0.csv").open() as handle:
            rows = list(csv.DictReader(handle))
        return rows, {
            p.name: p.read_bytes() for p in sorted((self.folder / "data" / "models" / "tiny" / "0").iterdir())
        }

    def ranks(self, process):
        """The processes below one that train, by rank."""
        found = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            if "stages.pretrain" in child.cmdline() and "torch.distributed.run" not in child.cmdline():
                found[int(child.environ()["RANK"])] = child
        return [found[rank] for rank in sorted(found)]


@pytest.fixture
def make(tmp_path, studies, prompts):
    def workspace(name, **train):
        folder = tmp_path / name
        for part in ("pipeline", "stages"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        params = yaml.safe_load((ROOT / "profiles" / "micro.yaml").read_text())
        params |= {"main": ["tiny"], "ablations": [], "control": ""}
        params["evaluate"]["few_shot"]["fine_tune"]["runs"] = []
        params["evaluate"].update(official={"runs": []}, regeneration={"runs": []})
        params["runs"] = {"tiny": {"image_encoder": "resnet", "datasets": ["mimic_cxr", "chexpert", "chestxray14"]}}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        pretrain = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["pretrain"]
        (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"pretrain": pretrain}}))
        run = make_config(image_encoder=RESNET, train={"epochs": 20, "save_minutes": 0.001, **train})
        make_corpus(folder / "made", run, studies, prompts)
        (folder / "data" / "corpus").mkdir(parents=True)
        (folder / "data" / "settings").mkdir()
        (folder / "data" / "settings" / "checked").touch()
        (folder / "made" / "corpus").rename(folder / "data" / "corpus" / "tiny")
        made = Workspace(folder)
        made.run("git", "init", "-q")
        made.run("dvc", "init", "-q")
        return made

    return workspace


@pytest.mark.parametrize(("kills", "epochs"), [(1, 6), pytest.param(4, 20, marks=drill)])
def test_dvc_repro_goes_on_after_kill_9(make, kills, epochs):
    whole, killed = make("whole", epochs=epochs), make("killed", epochs=epochs)
    whole.run(sys.executable, *STAGE)
    rng = random.Random(2)
    for number in range(kills):
        process = killed.start("dvc", "repro")
        killed.wait(process, 4 * number + 1)
        time.sleep(rng.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)  # dvc and the training alike
        process.wait()
    said = killed.run("dvc", "repro").stdout
    assert re.search(r"training resumes in epoch [1-9]", said)
    assert killed.outputs() == whole.outputs()
    assert not killed.state.exists()
    assert "up to date" in killed.run("dvc", "repro").stdout


@drill
def test_dvc_repro_goes_on_after_a_signal(make):
    whole, stopped = make("whole"), make("stopped")
    assert whole.run(sys.executable, *STAGE).returncode == 0
    process = stopped.start(sys.executable, *STAGE)
    stopped.wait(process, 3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 75
    process = stopped.start("dvc", "repro")
    stopped.wait(process, 8)
    (training,) = (c for c in psutil.Process(process.pid).children(recursive=True) if "stages.pretrain" in c.cmdline())
    training.terminate()
    assert process.wait() not in (0, None)
    assert "pretrain tiny/0: stopped by a signal in epoch" in (stopped.folder / "log").read_text()
    stopped.run("dvc", "repro")
    assert stopped.outputs() == whole.outputs()


@drill
def test_a_full_disk(make):
    """A disk of our own, too small for two states: the first is kept, and is gone on from when there is room."""
    whole, full = make("whole"), make("full")
    whole.run(sys.executable, *STAGE)
    process = full.start(sys.executable, *STAGE)
    full.wait(process)
    process.terminate()
    process.wait()
    work = full.state.parent
    size = sum(p.stat().st_size for p in work.iterdir())
    kept = full.folder / "kept"
    work.rename(kept)
    work.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", str(work))
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        for file in kept.iterdir():
            shutil.copy(file, work)
        before = full.state.read_bytes()
        failed = full.run(sys.executable, *STAGE, fails=True)
        assert failed.returncode == 1
        line = failed.stderr.strip().splitlines()[-1]
        assert line.startswith("pretrain tiny/0: data/work/pretrain/tiny/0: the training state could not be saved, and")
        assert "Traceback" not in failed.stderr
        assert full.state.read_bytes() == before
        assert not list(work.glob("*.partial"))
        subprocess.run(("mount", "-o", "remount,size=64m", str(work)), check=True)
        goes_on = subprocess.run(
            (sys.executable, *STAGE), cwd=full.folder, env=full.env, capture_output=True, text=True
        )
        assert "training resumes in epoch" in goes_on.stdout
    finally:
        subprocess.run(("umount", str(work)), check=True)
    assert full.outputs() == whole.outputs()


@drill
def test_torchrun_goes_on_after_a_killed_rank(make):
    """``--max-restarts`` starts all ranks again, and they end where undisturbed ones do."""
    whole, killed = make("whole"), make("killed")
    command = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=2", *STAGE)
    whole.run(*command)
    process = killed.start(*command)
    for rank, epoch in ((1, 3), (0, 8)):
        killed.wait(process, epoch)
        killed.ranks(process)[rank].kill()
    assert process.wait() == 0
    said = (killed.folder / "log").read_text()
    assert len(re.findall(r"training resumes in epoch [1-9]", said)) == 2
    assert killed.outputs() == whole.outputs()


@drill
def test_without_restarts_a_killed_rank_ends_the_job(make):
    killed = make("killed")
    process = killed.start(*TORCHRUN, "--standalone", "--nproc-per-node=2", *STAGE)
    killed.wait(process, 2)
    begun = time.monotonic()
    killed.ranks(process)[1].kill()
    assert process.wait() == 1
    print(f"a killed rank ended the job after {time.monotonic() - begun:.1f} s")
    assert killed.state.exists()


@drill
def test_two_nodes_stop_together_and_go_on(make):
    """Two torchrun agents that meet at a c10d rendezvous; SIGTERM to both, as a cluster sends it."""
    whole, stopped = make("whole"), make("stopped")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def agents(workspace):
        return [
            workspace.start(
                *(*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=1"),
                *(f"--rdzv-endpoint=127.0.0.1:{port}", "--max-restarts=1", "--local-addr=127.0.0.1", *STAGE),
            )
            for _ in range(2)
        ]

    assert [agent.wait() for agent in agents(whole)] == [0, 0]
    both = agents(stopped)
    stopped.wait(both[0], 4)
    for agent in both:
        agent.terminate()
    assert all(agent.wait() != 0 for agent in both)
    said = (stopped.folder / "log").read_text()
    assert "stopped by a signal in epoch" in said
    assert [agent.wait() for agent in agents(stopped)] == [0, 0]
    assert "training resumes in epoch" in (stopped.folder / "log").read_text()
    assert stopped.outputs() == whole.outputs()
