"""Memory of processes: how the C library gives it back to the system, and what they share."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from pathlib import Path

from pipeline.config.records import ParamsError

SHARED = Path("/dev/shm")  # where torch puts what a loader's processes hand over
AHEAD = 4  # batches that each process of a loader prepares beforehand


def keep_memory() -> None:
    """Make this process keep the memory it frees, where the C library is glibc.

    Every picture and every batch needs the same few blocks. Handed back to the system and fetched again each time, they
    cost as much as the work on them: each page is cleared and mapped again. Forked processes are made to keep theirs.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 1 << 30)


def allow_many_files() -> None:
    """Let this process have as many open files as the system lets it ask for: a tensor that a loader's process hands
    over is one, and the usual 1,024 are few for 16 processes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def processes_that_fit(workers: int, size: int) -> int:
    """How many of ``workers`` processes of a loader have room for their batches, of ``size`` bytes each, in this
    process's half of shared memory; 0 if not even one has."""
    if not SHARED.is_dir():
        return workers
    return min(workers, shutil.disk_usage(SHARED).total // (2 * local_world()) // (AHEAD * size))


def check_shared_memory(workers: int, size: int, key: str) -> None:
    """See that the batches a loader's processes hold ready fit into shared memory: where they do not, the kernel ends
    a process by a bus error, hours later perhaps. A container has 64 MB unless it was told otherwise.

    Args:
        workers: processes of the loader of one training process; ``local_world`` says how many of those there are.
        size: bytes of a batch.
        key: of params.yaml that sets ``workers``, for the error.

    Raises:
        ParamsError: they do not fit.
    """
    if not workers or not SHARED.is_dir():
        return
    needed = local_world() * workers * AHEAD * size
    there = shutil.disk_usage(SHARED).total  # what is free depends on how far the other processes are
    if needed > there:
        raise ParamsError(
            f"{key}: {workers} processes hold {needed >> 20:,} MiB of batches ready, and {SHARED} has {there >> 20:,} "
            "MiB; lower it, or start the container with a larger one, such as docker run --shm-size=8g"
        )


def local_world() -> int:
    """Processes that share this machine's memory: those of a training, as torchrun says, times the stages that ``make
    repro`` runs side by side (its Makefile sets ``CXR_JOBS``)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * int(os.environ.get("CXR_JOBS", "1"))
