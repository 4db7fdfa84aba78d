import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SCRIPT = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from pipeline.audit import copies
from pipeline.config.archive_params import Ingest
from pipeline.ingest import build

if __name__ == "__main__":
    spawn = multiprocessing.get_context("spawn")
    pools = {
        "ingest": build._executor(Ingest(workers=2)),
        "audit": ProcessPoolExecutor(2, spawn, initializer=copies._begin),
    }
    with pools[sys.argv[1]] as pool:
        pool = pool[0] if isinstance(pool, tuple) else pool
        for done in [pool.submit(time.sleep, 0.1) for _ in range(8)]:
            done.result()
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("pool", ["ingest", "audit"])
def test_processes_end_with_a_killed_parent(tmp_path, pool):
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    parent = subprocess.Popen([sys.executable, script, pool], cwd=root, stdout=subprocess.PIPE, text=True, env=env)
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert len(children) == 2
    parent.kill()
    parent.wait()
    until = time.monotonic() + 3
    while any(map(runs, children)) and time.monotonic() < until:
        time.sleep(0.05)
    left = [child for child in children if runs(child)]
    for child in left:
        child.kill()
    assert not left


def runs(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
