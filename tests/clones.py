"""The working tree in a repository of its own, with the micro profile: what tests and drills of whole runs share."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(clone: Path, *command: str) -> str:
    """What a command says, without the DVC, MLflow and git that may have started this process; it must end well."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    env = {**keep, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def make_clone(clone: Path) -> Path:
    """Copy what git knows or would add, and commit it."""
    files = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith("reports/") and name != "dvc.lock":
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    shutil.copy(ROOT / "profiles" / "micro.yaml", clone / "params.yaml")
    run(clone, "git", "init", "-q")
    commit(clone, "clone")
    return clone


def commit(clone: Path, message: str) -> None:
    """Commit all there is."""
    run(clone, "git", "add", "-A")
    run(clone, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", message)
