"""Who started a stage, and whether it is still there to see the stage end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import psutil


def launcher() -> psutil.Process:
    """The dvc process next above this one (shells and torchrun between them outlive it); else the parent."""
    above = psutil.Process().parents()
    for process in above:
        with suppress(psutil.Error):
            if any(Path(word).name == "dvc" for word in process.cmdline()[:3]):
                return process
    return above[0]


def is_there(process: psutil.Process) -> bool:
    """Whether a process runs; one that has taken over its id is another one, and a zombie is gone."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
