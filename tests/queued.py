"""Queued experiments of which a worker is killed midway: what the suite's test and the drill have in common."""

import contextlib
import hashlib
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from tests.clones import run

REQUEUE = (sys.executable, "-m", "stages.requeue")


def lose_a_worker(clone: Path, names: set[str], training: str, jobs: int) -> tuple[str, str]:
    """Let workers do the queue, kill one in the middle of a training, and bring back what it was at.

    Args:
        clone: a repository whose last commit holds its results.
        names: the experiments queued there.
        training: run and seed of the training that is met midway, as in ``tiny-0``.
        jobs: how many workers.

    Returns:
        The experiment that was lost and found, and what its second attempt said.
    """
    before = workspace(clone)
    start(clone, jobs)
    wait(lambda: workers(clone))
    refused = subprocess.run(REQUEUE, cwd=clone, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "workers run" in refused.stderr and refused.stderr.count("\n") == 1
    wait(lambda: _kill_midway(clone, training))
    wait(lambda: not workers(clone))  # the others do the rest and end
    listed = set(run(clone, "dvc", "exp", "list", "--name-only").split())
    (lost,) = names - listed
    assert run(clone, *REQUEUE).startswith(f"{lost}: is queued again")

    start(clone, jobs)
    wait(lambda: workers(clone))
    wait(lambda: not workers(clone))
    assert names <= set(run(clone, "dvc", "exp", "list", "--name-only").split())
    assert "no experiment was left" in run(clone, *REQUEUE)
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
    said = run(clone, "dvc", "queue", "logs", lost)
    assert "training resumes in epoch" in said
    return lost, said


def workspace(clone: Path) -> dict[str, str]:
    """Every file of data/ and reports/ by digest, and what git says; data/work is scratch."""
    files = [p for part in ("data", "reports") for p in (clone / part).rglob("*") if p.is_file()]
    kept = [p for p in files if (clone / "data" / "work") not in p.parents]
    found = {str(p.relative_to(clone)): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}
    return {**found, "dvc.lock": (clone / "dvc.lock").read_text(), "git": run(clone, "git", "status", "--porcelain")}


def start(clone: Path, jobs: int) -> None:
    """Start workers. They outlive the command and hold its output open, so it goes to a file."""
    with (clone.parent / "workers.log").open("ab") as log:
        env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
        env = {k: v for k, v in env.items() if not k.startswith(("DVC_", "PYTEST_"))}
        command = ["dvc", "queue", "start", "-j", str(jobs)]
        subprocess.run(command, cwd=clone, env=env, stdout=log, stderr=log, check=True, timeout=300)


def workers(clone: Path) -> list[psutil.Process]:
    """The queue's workers that run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ours = process.cwd() and Path(process.cwd()).is_relative_to(clone)
            if ours and "queue-worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(clone: Path) -> None:
    """End what a test that failed has left."""
    for worker in workers(clone):
        for process in (*worker.children(recursive=True), worker):
            _kill(process)


def wait(what: Callable[[], object], seconds: float = 600) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def _kill_midway(clone: Path, training: str) -> bool:
    """Kill a worker whose training has saved its state, and all below it; whether there was one."""
    for worker in workers(clone):
        with contextlib.suppress(psutil.Error):
            tree = worker.children(recursive=True)
            for process in tree:
                if "stages.pretrain" in process.cmdline():
                    work = f"{process.environ()['DVC_EXP_NAME']}-pretrain-{training}"
                    if (clone / "data/work/experiments" / work / "state.pt").exists():
                        for victim in (worker, *tree):
                            _kill(victim)
                        return True
    return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
