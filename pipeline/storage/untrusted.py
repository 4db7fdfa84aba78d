"""Files, names and bytes of other people: what is no file is not opened, what is no name is not used, and whatever a
decoder raises is one kind of error."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

FILE_MISSING = "file missing"
NOT_REGULAR = "not a regular file"
LEADS_OUT = "a link leads out of the archive; follow_links of its source allows that"
ODD_NAME = "the name is not UTF-8, or has control characters"
# Line and paragraph separators are control characters in all but name; surrogates are bytes that are not UTF-8.
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class FilesError(OSError):
    """A file or pack that cannot be read; one line without any content of it."""


class Gone(FilesError):
    """The archive, or a pack in it, is no longer what was listed, as when a network mount vanishes: no reason to reject
    its files."""


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Whatever a decoder raises on other people's bytes as a ``FilesError``, "<what> (<type>)".

    Any type, as there is no end of them: struct.error, KeyError, lzma.LZMAError, NotImplementedError, MemoryError ...
    """
    try:
        yield
    except FilesError:
        raise
    except Exception as error:
        raise FilesError(f"{what} ({type(error).__name__})") from None


def is_odd(name: str) -> bool:
    """Whether a file's name cannot be written into a table or a line of text."""
    return _ODD.search(name) is not None


def printable(name: str) -> str:
    r"""A name with what ``is_odd`` finds in it as escapes: a byte that is not UTF-8 as ``\xe9``."""
    return _ODD.sub(lambda found: _escape(ord(found.group())), name)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # as Python hands on a byte of a name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_below(path: str, root: str) -> bool:
    """Whether a link ends below a folder, which is no link itself."""
    return f"{os.path.realpath(path)}/".startswith(f"{root.rstrip('/')}/")


def open_regular(path: str | Path, root: Path | None = None) -> BinaryIO:
    """A regular file opened for reading; a FIFO would wait for a writer, and a device has no end.

    Args:
        root: the folder that it may not lead out of, if it is a link; links among the folders above it are followed.

    Raises:
        FilesError: it does, or is something else, which may be so since it was listed. OSError: it cannot be opened.
    """
    return open(path, "rb", opener=lambda name, flags: _open_regular(name, flags, root))


def _open_regular(path: str, flags: int, root: Path | None) -> int:
    flags |= os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags | (os.O_NOFOLLOW if root else 0))
    except OSError as error:
        if error.errno != errno.ELOOP or root is None:
            raise
        path = os.path.realpath(path)  # which is no link, and opened only if it has not become one
        if not is_below(path, os.path.realpath(root)):
            raise FilesError(LEADS_OUT) from None
        descriptor = os.open(path, flags | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FilesError(NOT_REGULAR)
    return descriptor


def read_regular(path: str | Path, most: int, root: Path | None = None) -> bytes:
    """The content of a regular file; see ``open_regular``.

    Raises:
        FilesError: also where it is larger than ``most`` bytes. OSError: it cannot be read.
    """
    with open_regular(path, root) as handle:
        if os.fstat(handle.fileno()).st_size > most:
            raise FilesError("file is too large")
        return handle.read()


class Bounded(io.RawIOBase):
    """A stream that someone else's compressor may have made endless: it ends in a ``FilesError`` after ``most`` bytes,
    as it does wherever its decoder raises something."""

    def __init__(self, stream: Any, most: int) -> None:
        """``stream``: anything with ``read``; closing it is left to the caller."""
        self.stream, self.most, self.left = stream, most, most

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """The next bytes, as many as there is room for."""
        with decoding("damaged"):
            data = self.stream.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise FilesError(f"it unpacks to more than {self.most >> 20:,} MiB, which no such file does")
        buffer[: len(data)] = data
        return len(data)
