"""Parts of a stage's output that need not be made again: each folder notes the digest of all that it was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from pipeline.storage.atomic import say_damaged, write_text

NOTE = "inputs.sha256"


def inputs_digest(paths: Iterable[Path], *words: str) -> str:
    """SHA-256 over the names and contents of files, and of all files below folders, and over ``words``.

    A path that does not exist counts as an empty folder; compiled Python files are passed over.
    """
    digest = hashlib.sha256()
    for path in paths:
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in (f for f in files if f.suffix != ".pyc" and f.is_file()):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(f"{file.as_posix()} {content}\n".encode())
    for word in words:
        digest.update(f"{word}\n".encode())
    return digest.hexdigest()


def is_current(folder: Path, digest: str) -> bool:
    """Whether ``mark_current`` was the last to write in a folder, with this digest."""
    note = folder / NOTE
    if not note.is_file():
        return False
    found = note.read_bytes()
    if len(found) != len(digest):
        say_damaged(note)
    return found == digest.encode()


def mark_current(folder: Path, digest: str) -> None:
    """Note what a folder was made from, once it is complete."""
    write_text(folder / NOTE, digest)
