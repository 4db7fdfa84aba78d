"""What a disk refuses, told from the exceptions of whichever library was at it, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LOCKED = (errno.EACCES, errno.EPERM)
MISPLACED = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
CURES = {
    **dict.fromkeys(FULL, "make room on that disk, then run again"),
    **dict.fromkeys(LOCKED, "give this user the right to it (ls -ld shows who has it), then run again"),
    **dict.fromkeys(MISPLACED, "a file is where a folder has to be, or the reverse: move it away, then run again"),
    errno.EROFS: "make that disk writable, or link the folder to one that is, then run again",
    errno.EIO: "that disk is full or fails; look after it, then run again",
    errno.ENOENT: "it has to be there first: see dvc status, and dvc repro",
}
OF_THE_DISK = (*FULL, errno.EROFS, errno.EIO)  # these nobody handles as a matter of course, as he may a missing file
RUST = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers, whose types say nothing
SQLITE = {"SQLITE_FULL": errno.ENOSPC, "SQLITE_READONLY": errno.EROFS, "SQLITE_IOERR": errno.EIO}
TORCH = "enforce fail at inline_container"  # torch's writer of files; it says no more


def disk_fault(error: BaseException) -> OSError | None:
    """The refusal of a disk that an exception is, wraps, or was raised in the course of; None: it has another cause.

    A library's own type counts if its text holds the system's error; any exception counts if a full, failing or
    read-only disk was what it followed (zipfile then stumbles over its open member). An exception that was raised
    ``from None`` speaks for itself.
    """
    found: OSError | None = None
    current: BaseException | None = error
    while current is not None:
        number = _number(current)
        if number is not None and number in CURES and (current is error or number in OF_THE_DISK):
            fault = current if isinstance(current, OSError) else OSError(number, os.strerror(number))
            found = fault if found is None or fault.filename or not found.filename else found  # the first that names it
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return found


def fault_line(error: BaseException) -> str:
    """A disk's refusal in one line: the file, why, and what to do; "" if the exception has another cause."""
    fault = disk_fault(error)
    if fault is None or fault.errno is None:
        return ""
    named = fault.filename2 or fault.filename
    name = f"a file below {Path.cwd()}" if named is None or isinstance(named, int) else os.fsdecode(named)
    return f"{name}: {os.strerror(fault.errno)}; {CURES[fault.errno]}"


def _number(error: BaseException) -> int | None:
    """The system's number of an error, or None."""
    if isinstance(error, OSError):
        return error.errno
    if stated := RUST.search(str(error)):
        return int(stated[1])
    if isinstance(error, RuntimeError) and TORCH in str(error):
        return errno.EIO
    name = str(getattr(error, "sqlite_errorname", ""))
    return next((number for begins, number in SQLITE.items() if name.startswith(begins)), None)
