"""Files that appear whole or not at all, and for their owner alone: whatever the umask, they may hold patients."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage.faults import OF_THE_DISK, disk_fault

PRIVATE = 0o600


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which becomes ``path`` if all goes well and else vanishes.

    The name holds the process id: what a killed process left cannot meddle with the one that comes after it. The
    content is on the disk before it takes the place of what was there. Nobody but its owner may read it.

    Raises:
        OSError: the disk refuses; whatever library was writing, it names ``path``.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(PRIVATE)  # before there is anything to read in it
        yield partial
        with partial.open("rb") as handle:
            os.fchmod(handle.fileno(), PRIVATE)  # a library may have put a file of its own there
            os.fsync(handle.fileno())
        partial.replace(path)
    except Exception as error:
        fault = disk_fault(error)
        if fault and (str(fault.filename) == str(partial) or (fault.filename is None and fault.errno in OF_THE_DISK)):
            raise OSError(fault.errno, fault.strerror, str(path)) from None
        raise
    finally:
        with suppress(OSError):  # where nothing can be removed nothing was written, and the error that says so counts
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a text file as ``replacing`` does, UTF-8, line ends as they are; its path."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    return path


def emptied(folder: Path) -> Path:
    """The folder, there and with nothing in it; one that is a link stays a link.

    Raises:
        OSError: it is a file, or something in it cannot be removed; it names the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    return folder


def say_damaged(path: str | Path) -> None:
    """Tell that a file of a work folder cannot be used and what it held is made again; one line on standard error."""
    print(f"{path}: damaged: starting anew", file=sys.stderr)
