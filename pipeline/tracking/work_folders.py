"""Where a stage keeps what it resumes from after a kill, and the repository it belongs to."""

from __future__ import annotations

import os
from pathlib import Path


def repository_root() -> Path:
    """The repository the store belongs to: DVC runs queued experiments in copies and names the original."""
    return Path(os.environ.get("DVC_ROOT") or Path(__file__).resolve().parents[2])


def work_folder(name: str) -> Path:
    """Folder for what a stage resumes from after a kill, of no output: data/work/<name>.

    A queued experiment runs in a copy that is thrown away, and so has its own below the original repository.
    """
    if repository_root().resolve() == Path.cwd().resolve() or "DVC_EXP_NAME" not in os.environ:
        return Path("data/work") / name
    return (
        repository_root() / "data" / "work" / "experiments" / f"{os.environ['DVC_EXP_NAME']}-{name.replace('/', '-')}"
    )
