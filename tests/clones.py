"""The working tree in a repository of its own, with the micro profile: what tests and drills of whole runs share."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]


def run(clone: Path, *command: str) -> str:
    """What a command says, which must end well; it sees nothing of what started this process."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_", "PYTEST_"))}
    env = {**keep, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def make_clone(clone: Path, params: dict[str, Any] | None = None) -> Path:
    """Copy what git knows or would add, with other parameters than the micro profile's if given, and commit it."""
    files = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith("reports/") and name != "dvc.lock":
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    text = yaml.safe_dump(params, sort_keys=False) if params else (ROOT / "profiles" / "micro.yaml").read_text()
    (clone / "params.yaml").write_text(text)
    run(clone, "git", "init", "-q")
    commit(clone, "clone")
    return clone


def commit(clone: Path, message: str) -> None:
    """Commit all there is."""
    run(clone, "git", "add", "-A")
    run(clone, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", message)
