"""Who started a stage, as what, and whether it is still there to see the stage end.

Ours, because DVC tells a stage its name and root, but not its process; psutil has the tree, and the search is here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil


def launcher() -> psutil.Process:
    """The dvc process next above this one (shells and torchrun between them outlive it); else the parent."""
    return dvc_above() or psutil.Process().parents()[0]


def dvc_above() -> psutil.Process | None:
    """The dvc process next above this one, or None for a stage run by hand.

    Not the topmost one: a worker of ``dvc queue`` is a dvc process, too, and starts one for each of its experiments.
    """
    for process in psutil.Process().parents():
        with suppress(psutil.Error):
            if any(Path(word).name == "dvc" for word in process.cmdline()[:3]):
                return process
    return None


def is_there(process: psutil.Process) -> bool:
    """Whether a process runs; one that has taken over its id is another one, and a zombie is gone."""
    with suppress(psutil.Error):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def arguments(words: Sequence[str]) -> list[str]:
    """A command's words, in which the name that DVC gave to the stage (``few_shot@resnet_m-0``, in the variable
    DVC_STAGE) is the parts of its item: ``resnet_m``, ``0``. dvc.yaml says why its commands have no other names."""
    stage = os.environ.get("DVC_STAGE", "")
    item = stage.rpartition("@")[2].split("-")
    return [part for word in words for part in (item if word == stage else [word])]
