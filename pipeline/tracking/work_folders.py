"""Where a stage keeps what it resumes from after a kill, its repository, and who may read what it writes."""

from __future__ import annotations

import os
import stat
import sys
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


def keep_private() -> None:
    """Let nobody but its user read what this process and those it starts write, and close to others what may hold
    patients or their texts already: git and DVC make these folders, and files in them, as the user's umask says.

    A folder with the setgid bit is shared with its group on purpose, which keeps its rights; others lose theirs.
    """
    os.umask(0o077)
    root = repository_root()
    for path in (Path("data"), root / ".dvc", root / "state", root / "mlartifacts", *root.glob("mlflow.db*")):
        if not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        closed = mode & ~(stat.S_IRWXO if mode & stat.S_ISGID else stat.S_IRWXG | stat.S_IRWXO)
        if closed != mode:
            try:
                path.chmod(closed)
            except OSError as error:  # somebody else's: he decides
                print(f"{path}: may be read by others than its owner ({error.strerror})", file=sys.stderr)
