"""Where the members of an archive's tars are: found once by looking each tar through, and kept in a cache folder.

Of a tar.gz also places from which the middle can be read (indexed_gzip).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.storage.atomic import replacing, say_damaged, write_text
from pipeline.storage.packs import Directory, tar_directory
from pipeline.storage.untrusted import decoding


def tar_places(cache: Path, pack: str, state: list[Any], handle: BinaryIO) -> Directory:
    """What a tar holds, from the cache if that knows it in this state (size and time of change), else from itself.

    Raises:
        FilesError: it is damaged. OSError: the cache cannot be written.
    """
    return _known(cache, pack, state) or _scan(cache, pack, state, handle)


def open_tar(cache: Path, pack: str, handle: BinaryIO) -> tuple[Any, dict[str, list[int]]]:
    """The decompressed stream of a tar that ``tar_places`` has seen, and the places of its members."""
    places: dict[str, list[int]] = json.loads(_places(cache, pack).read_bytes())["members"]
    return (_gunzip(handle, index_file=str(_index(cache, pack))) if _is_packed(pack) else handle), places


def _known(cache: Path, pack: str, state: list[Any]) -> Directory | None:
    places = _places(cache, pack)
    if not places.is_file():
        return None
    try:
        known = json.loads(places.read_bytes())
        if known["state"] != state:
            return None
        if known["index"] != _digest_of(_index(cache, pack)):
            raise ValueError
        return Directory(dict(known["members"]), [(name, reason) for name, reason in known["problems"]])
    except (OSError, ValueError, KeyError, TypeError):
        say_damaged(places)
        return None


def _scan(cache: Path, pack: str, state: list[Any], handle: BinaryIO) -> Directory:
    index = _index(cache, pack)
    with decoding("packed file is damaged"):
        stream: Any = handle
        if _is_packed(pack):
            stream = _gunzip(handle)
            stream.build_full_index()
            stream.seek(0)
        found = tar_directory(stream)
    index.unlink(missing_ok=True)
    if stream is not handle:
        with replacing(index) as partial:
            stream.export_index(str(partial))
    known = {"state": state, "index": _digest_of(index), "members": found.members, "problems": found.problems}
    write_text(_places(cache, pack), json.dumps(known))
    return found


def _is_packed(pack: str) -> bool:
    return not pack.lower().endswith(".tar")


def _gunzip(handle: BinaryIO, **options: str) -> Any:
    from indexed_gzip import IndexedGzipFile  # type: ignore[import-untyped]

    return IndexedGzipFile(fileobj=handle, **options)


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
