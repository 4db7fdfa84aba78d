"""Queued experiments of which a worker is killed: none is lost, and the workspace stays as it was."""

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.clones import ROOT, commit, make_clone, run


def tiny() -> dict:
    """One run on one archive, tested on another: what an experiment needs, with a training that can be met midway."""
    params = yaml.safe_load((ROOT / "profiles" / "micro.yaml").read_text())
    params["sources"] = {name: params["sources"][name] for name in ("mimic_cxr", "rsna")}
    params["phantom"]["archives"] = {"mimic_cxr": 40, "rsna": 40}
    params["runs"] = {"tiny": {"image_encoder": "resnet", "datasets": ["mimic_cxr"]}}
    params.update(main=[], ablations=["tiny"], control="")
    params["evaluate"]["few_shot"]["fine_tune"]["runs"] = []
    params["evaluate"].update(official={"runs": []}, regeneration={"runs": []})
    params["train"].update(epochs=25, threads=1)
    return params


def workspace(clone: Path) -> dict[str, str]:
    """Every file of data/ and reports/ by digest, and what git says; data/work is scratch."""
    files = [p for part in ("data", "reports") for p in (clone / part).rglob("*") if p.is_file()]
    kept = [p for p in files if (clone / "data" / "work") not in p.parents]
    found = {str(p.relative_to(clone)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}
    return {**found, "dvc.lock": (clone / "dvc.lock").read_text(), "git": run(clone, "git", "status", "--porcelain")}


def start(clone: Path) -> None:
    """Two workers. They outlive the command and hold its output open, so it goes to a file."""
    with (clone.parent / "workers.log").open("ab") as log:
        env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
        env = {k: v for k, v in env.items() if not k.startswith(("DVC_", "PYTEST_"))}
        command = ["dvc", "queue", "start", "-j", "2"]
        subprocess.run(command, cwd=clone, env=env, stdout=log, stderr=log, check=True, timeout=300)


def workers(clone: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.cwd() and Path(process.cwd()).is_relative_to(clone)
            if ours and "queue-worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait(what, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.5)


@pytest.fixture
def clone(tmp_path):
    clone = make_clone(tmp_path / "clone", tiny())
    run(clone, "dvc", "repro")
    commit(clone, "results")
    yield clone
    for worker in workers(clone):
        for process in (*worker.children(recursive=True), worker):
            process.kill()


@pytest.mark.drill
def test_a_killed_worker_loses_no_experiment(clone):
    before, began = workspace(clone), time.monotonic()
    grid = "loss.tcl_weight=0,0.25,0.75,1"
    run(clone, "dvc", "exp", "run", "--queue", "-n", "grid", "-S", grid, "-C", "data/phantom")
    names = {f"grid-{n}" for n in (1, 2, 3, 4)}
    start(clone)

    victims: list[psutil.Process] = []

    def midway() -> bool:
        """A worker's training has saved its state: that worker, and all below it."""
        for worker in workers(clone):
            with contextlib.suppress(psutil.Error):
                tree = worker.children(recursive=True)
                for process in tree:
                    if "stages.pretrain" in process.cmdline():
                        name = process.environ()["DVC_EXP_NAME"]
                        if (clone / "data/work/experiments" / f"{name}-pretrain-tiny-0" / "state.pt").exists():
                            victims[:] = [worker, *tree]
                            return True
        return False

    wait(midway)
    for process in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    refused = subprocess.run(
        [sys.executable, "-m", "stages.requeue"], cwd=clone, capture_output=True, text=True, check=False
    )
    if workers(clone):
        assert refused.returncode == 1 and "workers run" in refused.stderr and refused.stderr.count("\n") == 1
    wait(lambda: not workers(clone))  # the other one does the rest and ends
    listed = set(run(clone, "dvc", "exp", "list", "--name-only").split())
    assert len(names - listed) == 1

    (lost,) = names - listed
    assert run(clone, sys.executable, "-m", "stages.requeue").startswith(f"{lost}: is queued again")
    start(clone)
    wait(lambda: lost in run(clone, "dvc", "exp", "list", "--name-only").split())
    wait(lambda: not workers(clone))
    assert "training resumes in epoch" in run(clone, "dvc", "queue", "logs", lost)
    assert "no experiment was left" in run(clone, sys.executable, "-m", "stages.requeue")

    assert workspace(clone) == before
    assert not list((clone / ".dvc/tmp/exps").glob("tmp*")) and not list(clone.glob("data/work/experiments/*"))
    assert not list((clone / "state/tracking").glob("*/record.json"))
    with sqlite3.connect(clone / "mlflow.db") as db:
        assert db.execute("select count(*) from experiments where name = 'cxr-clip'").fetchone() == (1,)
        rows = db.execute(
            "select t.value, r.status, (select count(*) from metrics m where m.run_uuid = r.run_uuid) from runs r "
            "join tags t on t.run_uuid = r.run_uuid and t.key = 'dvc_exp_name' "
            "join tags k on k.run_uuid = r.run_uuid and k.key = 'kind' and k.value = 'repro'"
        ).fetchall()
    whole = [name for name, status, metrics in rows if status == "FINISHED" and metrics > 5]
    assert sorted(whole) == sorted(names)
    assert [(name, status) for name, status, _ in rows if status != "FINISHED"] == [(lost, "FAILED")]

    run(clone, sys.executable, "-m", "stages.experiments")
    report = (clone / "data" / "experiments" / "index.md").read_text()
    assert all(f"| {name} | loss.tcl_weight: 0.5 → " in report for name in names) and "cpu" in report
    assert workspace(clone)["git"] == ""
    print(f"{len(names)} experiments, one killed: {time.monotonic() - began:.0f} s")
