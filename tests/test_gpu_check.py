"""The check for a GPU, all parts of it on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_part_of_the_check_runs_on_a_cpu():
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *parts, whole = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert done.returncode == 0 and whole["failed"] == [], whole
    names = ["environment", "masks", "precision", "collectives", "speed", "methods", "training", "evaluation"]
    assert [name for part in parts for name in part] == names == [*whole][:-2]
    assert all(whole[name] == part[name] for part in parts for name in part)
    assert whole["masks"]["equal"] and whole["precision"]["cosine_pieces"] > 0.999
    assert whole["training"]["stopped"] and whole["training"]["again"] == whole["training"]["valid_loss"]


def test_a_part_that_fails_or_is_late_says_so_and_the_others_go_on():
    script = (
        "import sys, time; from benchmarks import gpu; sys.argv = ['gpu', '--device', 'cpu', '--tiny'];"
        "sleeps, breaks, fine = (lambda s: time.sleep(9)), (lambda s: 1 / 0), (lambda s: {'x': 1});"
        "names = ('sleeps', 'breaks', 'fine');"
        "gpu.PARTS = tuple(setattr(f, '__name__', n) or f for f, n in zip((sleeps, breaks, fine), names));"
        "gpu.DEADLINES = dict.fromkeys(names, 1); gpu.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    whole = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 1 and whole["failed"] == ["sleeps", "breaks"] and whole["fine"]["x"] == 1
    assert whole["sleeps"]["error"] == "TimeoutError: not done after 1 s"
    assert whole["breaks"]["error"] == "ZeroDivisionError: division by zero"
