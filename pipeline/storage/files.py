"""The files of an archive where they are: in a folder or below a URL, loose or packed in zip and tar files, in place.

A file is named by its path below the archive's root, in posix form; one inside a pack, ``pack.zip!/path/inside``.
Nothing is ever unpacked: zip files have a directory, plain tars are scanned once, and gzip-compressed tars are
decompressed once for a list of places from which their middle can be read (indexed_gzip), kept in the cache folder.

Ours, because tarfile and fsspec take 30 times as long for a member of a tar.gz; zipfile and indexed_gzip do the work.
"""

from __future__ import annotations

import hashlib
import os
import stat
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipeline.storage.packs import IN_PACK, Directory, open_member, open_zip, read_member
from pipeline.storage.tar_places import open_tar, tar_places
from pipeline.storage.untrusted import (
    FILE_MISSING,
    LEADS_OUT,
    NOT_REGULAR,
    ODD_NAME,
    FilesError,
    Gone,
    decoding,
    is_below,
    is_odd,
    open_regular,
    printable,
    read_regular,
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PACK_SUFFIXES = (".zip", *TAR_SUFFIXES)
OPEN_PACKS = 16  # kept open by a process
DAMAGED = "packed file is damaged"


@dataclass(frozen=True)
class Listing:
    """What a walk found: ``files`` (sorted), ``problems`` as (name, reason) of what could not be looked into, and a
    ``fingerprint`` of names, sizes and times of change, which costs no reading of contents."""

    files: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    fingerprint: str


class Files:
    """Read access to an archive at a local folder or an fsspec URL (``s3://bucket/folder``, ``gs://`` ...).

    Objects are cheap to send to another process: nothing that was found travels with them.
    """

    def __init__(self, root: str, cache: str | Path, follow_links: bool = False) -> None:
        """
        Args:
            cache: a local folder for the places inside gzip-compressed tars, shared by all who read the archive.
            follow_links: whether what symbolic links name outside the root is listed and read.
        """
        self.root = str(root).removeprefix("file://")
        self.cache = Path(cache)
        self.follow_links = follow_links

    @property
    def local(self) -> Path | None:
        """The root as a local folder, or ``None`` where it is elsewhere."""
        return None if "://" in self.root else Path(self.root)

    def absolute(self) -> Files:
        """The same archive for a process in another working directory."""
        root = self.root if self.local is None else str(self.local.absolute())
        return Files(root, self.cache.absolute(), self.follow_links)

    def exists(self) -> bool:
        """Whether there is such a folder (of a URL: anything below it)."""
        if self.local is not None:
            return self.local.is_dir()
        system, path = file_system(self.root)
        return bool(system.exists(path))

    def check(self) -> None:
        """See that the archive is still there.

        Raises:
            Gone: it is not.
        """
        if not self.exists():
            raise Gone(f"the archive at {self.root} is no longer there")

    def has(self, name: str) -> bool:
        """Whether a loose file is there, or the pack that holds it."""
        loose = name.partition(IN_PACK)[0]
        if self.local is not None:
            return (self.local / loose).is_file()
        system, path = file_system(self.root)
        return bool(system.exists(f"{path}/{loose}"))

    def walk(self) -> Listing:
        """Walk the archive once. Links are followed, but no folder is entered twice.

        Raises:
            Gone: see there.
        """
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
                found, wrong = self._list_pack(name, size, changed)
            except FilesError as error:
                self.check()
                problems.append((name, str(error)))
                continue
            files += found
            problems += wrong
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
            FilesError: it is larger than ``most`` bytes, encrypted or cannot be read. Gone: see there; also where its
                tar has changed since it was listed.
        """
        pack, inside, member = name.partition(IN_PACK)
        try:
            with decoding("file cannot be read"):
                if inside:
                    opened, members = self._open_pack(pack)
                    return read_member(opened, members[member], most)
                if self.local is not None:
                    try:
                        return read_regular(self.local / name, most, self._bounds)
                    except FileNotFoundError:
                        raise FilesError(FILE_MISSING) from None
                with self.open(name) as handle:
                    size = handle.seek(0, os.SEEK_END)
                    if size > most:
                        raise FilesError("file is too large")
                    handle.seek(0)
                    return handle.read()  # read(most) would ask for that much memory at once
        except FilesError:
            self.check()
            raise

    def stream(self, name: str) -> tuple[Any, int]:
        """A listed file opened for reading from its beginning, and how many bytes it takes in the archive, at most.

        Raises:
            FilesError: it is encrypted or cannot be opened. Gone: see there.
        """
        pack, inside, member = name.partition(IN_PACK)
        try:
            with decoding("file cannot be read"):
                if not inside:
                    handle = self.open(name)
                    size = handle.seek(0, os.SEEK_END)
                    handle.seek(0)
                    return handle, size
                opened, members = self._open_pack(pack)
                handle, size = open_member(opened, members[member])
                return handle, min(size, self._state(pack)[0])
        except FilesError:
            self.check()
            raise

    def open(self, name: str) -> BinaryIO:
        """A loose file of the archive, opened for reading.

        Raises:
            FilesError: it is no regular file. OSError: it cannot be opened.
        """
        if self.local is not None:
            return open_regular(self.local / name, self._bounds)
        system, path = file_system(self.root)
        handle: BinaryIO = system.open(f"{path}/{name}", "rb")
        return handle

    def list_pack(self, pack: str) -> tuple[list[str], list[tuple[str, str]]]:
        """The names of the files in one pack, sorted, as ``read`` takes them, and problems, as in ``Listing``.

        Raises:
            FilesError: it is missing or damaged.
        """
        with decoding("packed file is missing"):
            size, changed = self._state(pack)
        return self._list_pack(pack, size, changed)

    def _list_pack(self, pack: str, size: int, changed: str) -> tuple[list[str], list[tuple[str, str]]]:
        found = self._directory(pack, size, changed)
        return (
            [f"{pack}{IN_PACK}{member}" for member in sorted(found.members)],
            [(f"{pack}{IN_PACK}{inside}" if inside else pack, reason) for inside, reason in found.problems],
        )

    @property
    def _bounds(self) -> Path | None:
        """The folder that links may not lead out of."""
        return None if self.follow_links else self.local

    def _open_pack(self, pack: str) -> tuple[Any, dict[str, Any]]:
        opened, members, state = _open_pack(self.root, str(self.cache), self.follow_links, pack)
        if self.local is not None and self._state(pack) != state:
            raise Gone(f"{pack} has changed since it was opened")
        return opened, members

    def _state(self, name: str) -> tuple[int, str]:
        """Size and time of change of a loose file."""
        if self.local is not None:
            status = (self.local / name).stat()
            return status.st_size, str(status.st_mtime_ns)
        system, path = file_system(self.root)
        return _state_of(system.info(f"{path}/{name}"))

    def _entries(self) -> Iterator[tuple[str, int, str, str]]:
        """(name, size, time of change, problem) of every file. The name of a problem is printable."""
        for name, size, changed, problem in self._far() if self.local is None else self._near(self.local):
            problem = problem or (ODD_NAME if is_odd(name) else "")
            yield printable(name) if problem else name, size, changed, problem

    def _far(self) -> Iterator[tuple[str, int, str, str]]:
        system, path = file_system(self.root)
        for full, info in system.find(path, detail=True).items():
            problem = "" if info.get("type", "file") == "file" else NOT_REGULAR
            yield str(PurePosixPath(full).relative_to(path)), *_state_of(info), problem

    def _near(self, local: Path) -> Iterator[tuple[str, int, str, str]]:
        root = os.path.realpath(local)
        entered: set[tuple[int, int]] = set()
        folders = [""]
        while folders:
            folder = folders.pop()
            try:
                status = (local / folder).stat()
                if (status.st_dev, status.st_ino) in entered:
                    yield folder, 0, "", "a link leads back to a folder that is listed already"
                    continue
                entered.add((status.st_dev, status.st_ino))
                with os.scandir(local / folder) as entries:
                    for entry in entries:
                        name = f"{folder}/{entry.name}" if folder else entry.name
                        try:
                            if entry.is_symlink() and not self.follow_links and not is_below(entry.path, root):
                                yield name, 0, "", LEADS_OUT
                                continue
                            if entry.is_dir():
                                folders.append(name)
                                continue
                            info = entry.stat()
                        except OSError as error:
                            yield name, 0, "", f"file cannot be read ({type(error).__name__})"
                            continue
                        problem = "" if stat.S_ISREG(info.st_mode) else NOT_REGULAR
                        yield name, info.st_size, str(info.st_mtime_ns), problem
            except OSError as error:
                yield folder, 0, "", f"folder cannot be read ({type(error).__name__})"

    def _directory(self, pack: str, size: int, changed: str) -> Directory:
        """What a pack holds. A tar's places are written to the cache, for ``read``.

        Raises:
            FilesError: it is damaged. OSError: the cache cannot be written.
        """
        if pack.lower().endswith(".zip"):
            with decoding(DAMAGED), self.open(pack) as handle:
                return open_zip(handle)[1]
        with decoding(DAMAGED):
            handle = self.open(pack)
        with handle:
            return tar_places(self.cache, f"{self.absolute().root}/{pack}", (size, changed), handle)


@lru_cache(maxsize=OPEN_PACKS)
def _open_pack(root: str, cache: str, follow_links: bool, pack: str) -> tuple[Any, dict[str, Any], tuple[int, str]]:
    """A pack opened for this process, the places of its members, and its state then.

    Raises:
        Gone: it is another one since it was listed.
    """
    files = Files(root, cache, follow_links)
    handle, state = files.open(pack), files._state(pack)
    if pack.lower().endswith(".zip"):
        archive, found = open_zip(handle)
        return archive, found.members, state
    return *open_tar(files.cache, f"{files.absolute().root}/{pack}", state, handle), state


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


def base_name(name: str) -> str:
    """The last part of a file's name, whether loose or packed."""
    return name.rpartition("/")[2]


def decode_text(data: bytes) -> str:
    """A text file's content: UTF-8, with or without a mark, UTF-16 with one, or else cp1252, what Windows writes in
    western Europe and America; bytes that are nothing there are U+FFFD."""
    if data[:2] in (BOM_UTF16_LE, BOM_UTF16_BE):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
