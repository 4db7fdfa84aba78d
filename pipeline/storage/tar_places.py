"""Where the members of an archive's tars are: found once by looking each tar through, and kept in a cache folder, with
a digest of what is kept.

Of a tar.gz also places from which the middle can be read (indexed_gzip).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.storage.atomic import replacing, say_damaged, write_text
from pipeline.storage.packs import Directory, tar_directory
from pipeline.storage.untrusted import Gone, decoding


def tar_places(cache: Path, pack: str, state: tuple[int, str], handle: BinaryIO) -> Directory:
    """What a tar holds, from the cache if that knows it in this state (size and time of change), else from itself.

    Args:
        pack: its whole address, as several archives may share the cache.

    Raises:
        FilesError: it is damaged. OSError: the cache cannot be written.
    """
    try:
        known = _known(cache, pack, state)
    except ValueError:
        say_damaged(_places(cache, pack))
        known = None
    return known or _scan(cache, pack, state, handle)


def open_tar(cache: Path, pack: str, state: tuple[int, str], handle: BinaryIO) -> tuple[Any, dict[str, Any]]:
    """The decompressed stream of a tar that ``tar_places`` has seen, and the places of its members.

    Raises:
        Gone: it is in another state by now, so that its members are elsewhere; or the cache is damaged.
    """
    try:
        known = _known(cache, pack, state)
    except ValueError:
        raise Gone(f"{_places(cache, pack)} is damaged") from None
    if known is None:
        raise Gone(f"{pack} has changed since it was listed")
    return (_gunzip(handle, index_file=str(_index(cache, pack))) if _is_packed(pack) else handle), known.members


def _known(cache: Path, pack: str, state: tuple[int, str]) -> Directory | None:
    """What the cache says of a tar in this state, or None if nothing; ValueError where it is damaged."""
    places = _places(cache, pack)
    if not places.is_file():
        return None
    digest, _, text = places.read_bytes().partition(b"\n")
    if digest != _digest(text):
        raise ValueError
    known = json.loads(text)
    if known["state"] != list(state):
        return None
    if known["index"] != _digest_of(_index(cache, pack)):
        raise ValueError
    return Directory(known["members"], [(name, reason) for name, reason in known["problems"]])


def _scan(cache: Path, pack: str, state: tuple[int, str], handle: BinaryIO) -> Directory:
    index = _index(cache, pack)
    with decoding("packed file is damaged"):
        stream: Any = handle
        if _is_packed(pack):
            stream = _gunzip(handle)
            stream.build_full_index()
            stream.seek(0)
        found = tar_directory(stream)
    if stream is not handle:
        with replacing(index) as partial:
            stream.export_index(str(partial))
    known = {"state": state, "index": _digest_of(index), "members": found.members, "problems": found.problems}
    text = json.dumps(known)
    write_text(_places(cache, pack), f"{_digest(text.encode()).decode()}\n{text}")
    return found


def _is_packed(pack: str) -> bool:
    return not pack.lower().endswith(".tar")


def _gunzip(handle: BinaryIO, **options: str) -> Any:
    from indexed_gzip import IndexedGzipFile  # type: ignore[import-untyped]

    return IndexedGzipFile(fileobj=handle, **options)


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=16).hexdigest().encode()


def _digest_of(index: Path) -> str:
    """Of the places inside a gzip-compressed tar; "" of a plain one, which has no such file."""
    if not index.is_file():
        return ""
    with index.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()


def _places(cache: Path, pack: str) -> Path:
    return cache / f"{_token(pack)}.json"


def _index(cache: Path, pack: str) -> Path:
    return cache / f"{_token(pack)}.gzidx"


def _token(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=12).hexdigest()
