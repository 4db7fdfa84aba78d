"""The files of an archive where they are: in a folder or below a URL, loose or packed in zip and tar files, in place.

A file is named by its path below the archive's root, in posix form; one inside a pack, ``pack.zip!/path/inside``.
Nothing is ever unpacked: zip files have a directory, plain tars are scanned once, and gzip-compressed tars are
decompressed once for a list of places from which their middle can be read (indexed_gzip), kept in the cache folder.

Ours, because tarfile and fsspec take 30 times as long for a member of a tar.gz; zipfile and indexed_gzip do the work.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipeline.storage.atomic import replacing

IN_PACK = "!/"
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PACK_SUFFIXES = (".zip", *TAR_SUFFIXES)
OPEN_PACKS = 16  # kept open by a process
_reading = threading.Lock()  # a tar's stream has one position, which the threads of a process share


class FilesError(OSError):
    """A file or pack that cannot be read; one line without any content of it."""


class Gone(FilesError):
    """The archive itself is no longer there, as when a network mount vanishes: no reason to reject its files."""


@dataclass(frozen=True)
class Listing:
    """What a walk found: ``files`` (sorted), ``problems`` as (name, reason) of what could not be looked into, and a
    ``fingerprint`` of names, sizes and times of change, which costs no reading of contents."""

    files: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    fingerprint: str


class Files:
    """Read access to an archive at a local folder or an fsspec URL (``s3://bucket/folder``, ``gs://`` ...).

    Objects are cheap to send to another process: only the two addresses travel.
    """

    def __init__(self, root: str, cache: str | Path) -> None:
        """``cache``: a local folder for the places inside gzip-compressed tars, shared by all who read the archive."""
        self.root = str(root)
        self.cache = Path(cache)

    @property
    def local(self) -> Path | None:
        """The root as a local folder, or ``None`` where it is elsewhere."""
        return None if "://" in self.root else Path(self.root)

    def absolute(self) -> Files:
        """The same archive for a process in another working directory."""
        return Files(self.root if self.local is None else str(self.local.absolute()), self.cache.absolute())

    def exists(self) -> bool:
        """Whether there is such a folder (of a URL: anything below it)."""
        if self.local is not None:
            return self.local.is_dir()
        system, path = file_system(self.root)
        return bool(system.exists(path))

    def has(self, name: str) -> bool:
        """Whether a loose file is there, or the pack that holds it."""
        loose = name.partition(IN_PACK)[0]
        if self.local is not None:
            return (self.local / loose).exists()
        system, path = file_system(self.root)
        return bool(system.exists(f"{path}/{loose}"))

    def walk(self) -> Listing:
        """Walk the archive once. Links are followed, but no folder is entered twice."""
        files: list[str] = []
        problems: list[tuple[str, str]] = []
        digest = _Digest()
        for name, size, changed, problem in self._entries():
            if problem:
                problems.append((name, problem))
                continue
            digest.add(name, size, changed)
            if not name.lower().endswith(PACK_SUFFIXES):
                files.append(name)
                continue
            try:
                members = self._members(name, size, changed)
            except (FilesError, zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError) as error:
                problems.append((name, f"packed file is damaged ({type(error).__name__})"))
                continue
            for member in members:
                if _leaves(member):
                    problems.append((name, "a member's name leaves the packed file"))
                else:
                    files.append(f"{name}{IN_PACK}{member}")
        files.sort()
        return Listing(tuple(files), tuple(sorted(set(problems))), str(digest))

    def fingerprint(self) -> str:
        """As ``walk`` gives it, without a look into packed files."""
        digest = _Digest()
        for name, size, changed, problem in self._entries():
            if not problem:
                digest.add(name, size, changed)
        return str(digest)

    def read(self, name: str, most: int) -> bytes:
        """The content of a listed file.

        Raises:
            FilesError: it is larger than ``most`` bytes, encrypted or cannot be read. Gone: see there.
        """
        pack, inside, member = name.partition(IN_PACK)
        try:
            if inside:
                return self._read_member(pack, member, most)
            with self.open(name) as handle:
                size = handle.seek(0, os.SEEK_END)
                handle.seek(0)
                data = handle.read() if size <= most else b""  # read(most) would ask for that much memory at once
        except FilesError:
            raise
        except (OSError, zipfile.BadZipFile, EOFError, zlib.error, RuntimeError, NotImplementedError) as error:
            if not self.exists():
                raise Gone(f"the archive at {self.root} is no longer there") from None
            raise FilesError(f"file cannot be read ({type(error).__name__})") from None
        if size > most:
            raise FilesError("file is too large")
        return data

    def open(self, name: str) -> BinaryIO:
        """A loose file of the archive, opened for reading."""
        if self.local is not None:
            return (self.local / name).open("rb")
        system, path = file_system(self.root)
        handle: BinaryIO = system.open(f"{path}/{name}", "rb")
        return handle

    def list_pack(self, pack: str) -> list[str]:
        """The names of the files in one pack, as ``read`` takes them.

        Raises:
            FilesError: it is missing or damaged.
        """
        try:
            members = self._members(pack, *self._state(pack))
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError) as error:
            raise FilesError(f"packed file is missing or damaged ({type(error).__name__})") from None
        return [f"{pack}{IN_PACK}{member}" for member in sorted(members) if not _leaves(member)]

    def _state(self, name: str) -> tuple[int, str]:
        """Size and time of change of a loose file."""
        if self.local is not None:
            status = (self.local / name).stat()
            return status.st_size, str(status.st_mtime_ns)
        system, path = file_system(self.root)
        return _state_of(system.info(f"{path}/{name}"))

    def loose(self, name: str) -> Path | None:
        """The path of a loose file in a local folder."""
        return self.local / name if self.local is not None and IN_PACK not in name else None

    def _entries(self) -> Iterator[tuple[str, int, str, str]]:
        """(name, size, time of change, problem) of every file."""
        if self.local is None:
            system, path = file_system(self.root)
            for full, info in system.find(path, detail=True).items():
                name = str(PurePosixPath(full).relative_to(path))
                yield name, *_state_of(info), ""
            return
        entered: set[tuple[int, int]] = set()
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                status = (self.local / folder).stat()
                if (status.st_dev, status.st_ino) in entered:
                    yield folder, 0, "", "a link leads back to a folder that is listed already"
                    continue
                entered.add((status.st_dev, status.st_ino))
                with os.scandir(self.local / folder) as entries:
                    for entry in entries:
                        name = f"{folder}/{entry.name}" if folder else entry.name
                        try:
                            if entry.is_dir():
                                folders.append(name)
                                continue
                            info = entry.stat()
                        except OSError as error:
                            yield name, 0, "", f"file cannot be read ({type(error).__name__})"
                            continue
                        yield name, info.st_size, str(info.st_mtime_ns), ""
            except OSError as error:
                yield folder, 0, "", f"folder cannot be read ({type(error).__name__})"

    def _members(self, pack: str, size: int, changed: str) -> list[str]:
        """Names of the plain files in a pack. A tar's places are written to the cache for ``_read_member``."""
        if pack.lower().endswith(".zip"):
            with self.open(pack) as handle, zipfile.ZipFile(handle) as archive:
                return [info.filename for info in archive.infolist() if not info.is_dir()]
        places = self._places(pack)
        known = json.loads(places.read_text(encoding="utf-8")) if places.is_file() else {}
        if known.get("size") != size or known.get("changed") != changed:
            known = {"size": size, "changed": changed, "members": self._scan(pack)}
            with replacing(places) as partial:
                partial.write_text(json.dumps(known), encoding="utf-8")
        return list(known["members"])

    def _scan(self, pack: str) -> dict[str, list[int]]:
        """Name -> [offset, length] of a tar's plain files, in the decompressed stream."""
        members: dict[str, list[int]] = {}
        with self.open(pack) as raw:
            if pack.lower().endswith(".tar"):
                stream: Any = raw
            else:
                from indexed_gzip import IndexedGzipFile  # type: ignore[import-untyped]

                stream = IndexedGzipFile(fileobj=raw)
                stream.build_full_index()
                stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                for info in tar:
                    if info.isfile():
                        members.setdefault(info.name.removeprefix("./"), [info.offset_data, info.size])
            if stream is not raw:
                with replacing(self._index(pack)) as partial:
                    stream.export_index(str(partial))
        return members

    def _read_member(self, pack: str, member: str, most: int) -> bytes:
        opened, places = _open_pack(self.root, str(self.cache), pack)
        if isinstance(opened, zipfile.ZipFile):
            info = opened.getinfo(member)
            if info.flag_bits & 1:
                raise FilesError("packed file is encrypted")
            if info.file_size > most:
                raise FilesError("file is too large")
            with opened.open(info) as handle:
                data = handle.read(info.file_size + 1)  # its directory may state less than there is
            if len(data) > info.file_size:
                raise FilesError("packed file is damaged")
            return data
        offset, length = places[member]
        if length > most:
            raise FilesError("file is too large")
        with _reading:
            opened.seek(offset)
            data = opened.read(length)
        if len(data) != length:
            raise FilesError("packed file is truncated")
        return data

    def _places(self, pack: str) -> Path:
        return self.cache / f"{_token(pack)}.json"

    def _index(self, pack: str) -> Path:
        return self.cache / f"{_token(pack)}.gzidx"


@lru_cache(maxsize=OPEN_PACKS)
def _open_pack(root: str, cache: str, pack: str) -> tuple[Any, dict[str, list[int]]]:
    """A pack opened for this process, and the places of a tar's members."""
    files = Files(root, cache)
    handle = files.open(pack)
    if pack.lower().endswith(".zip"):
        return zipfile.ZipFile(handle), {}
    places = json.loads(files._places(pack).read_text(encoding="utf-8"))["members"]
    if pack.lower().endswith(".tar"):
        return handle, places
    from indexed_gzip import IndexedGzipFile

    return IndexedGzipFile(fileobj=handle, index_file=str(files._index(pack))), places


@lru_cache(maxsize=OPEN_PACKS)
def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        ValueError: there is none for its scheme, or the package that has it is not installed.
    """
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    try:
        system, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{url}: {error}; use a local folder, s3:// or another scheme that fsspec knows") from None
    return system, path


# A file system has threads of its own, which a forked process (a loader's, after a validation) does not inherit.
os.register_at_fork(after_in_child=file_system.cache_clear)


def _state_of(info: dict[str, Any]) -> tuple[int, str]:
    """Size and time of change (or its replacement) as a remote file system states them."""
    return int(info.get("size") or 0), str(info.get("ETag") or info.get("LastModified") or info.get("mtime") or "")


class _Digest:
    """Of entries in any order, without holding them: the sum of their hashes."""

    def __init__(self) -> None:
        self.sum = 0

    def add(self, name: str, size: int, changed: str) -> None:
        entry = f"{name}\0{size}\0{changed}".encode(errors="surrogateescape")
        self.sum += int.from_bytes(hashlib.blake2b(entry, digest_size=32).digest())

    def __str__(self) -> str:
        return f"{self.sum % (1 << 256):064x}"


def _leaves(member: str) -> bool:
    path = PurePosixPath(member)
    return path.is_absolute() or ".." in path.parts or IN_PACK in member


def _token(name: str) -> str:
    return hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=12).hexdigest()


def base_name(name: str) -> str:
    """The last part of a file's name, whether loose or packed."""
    return name.rpartition("/")[2]


def decode_text(data: bytes) -> str:
    """A text file's content: UTF-8, with or without a mark, or else Latin-1, in which every byte is a letter."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def text_lines(data: bytes) -> io.StringIO:
    """As ``text``, to be read by line."""
    return io.StringIO(decode_text(data), newline="")
