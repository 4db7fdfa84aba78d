"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to, which becomes ``path`` if all goes well and else vanishes.

    The name holds the process id: what a killed process left cannot meddle with the one that comes after it. The
    content is on the disk before it takes the place of what was there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """A text file, UTF-8, that appears whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def say_damaged(path: str | Path) -> None:
    """Tell that a file of a work folder cannot be used and what it held is made again; one line on standard error."""
    print(f"{path}: damaged: starting anew", file=sys.stderr)
