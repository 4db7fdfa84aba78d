"""Zip and tar files of other people: what their directories name, and the bytes of one member.

zipfile and tarfile do the work; what they take on trust is checked here. Of two members of one name the last counts, as
it does when the pack is unpacked.
"""

from __future__ import annotations

import io
import stat
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pipeline.storage.untrusted import NOT_REGULAR, ODD_NAME, FilesError, is_odd, printable

IN_PACK = "!/"
CHUNK = 1 << 20  # bytes read at a time
SMALL = 4 << 20  # bytes of a member that is read at once
LOCAL_HEADER = 30  # bytes before each member of a zip, at least
DEFLATE = 1032  # bytes that deflate makes of one, at most
TWICE = "another member of the packed file has this name, too; the last one counts"
_reading = threading.Lock()  # a tar's stream has one position, which the threads of a process share


@dataclass(frozen=True)
class Directory:
    """``members``: name -> place, a ``ZipInfo`` or, of a tar, [offset, length] in its decompressed stream.
    ``problems``: (name, reason) of what is no member, the name "" for the pack itself."""

    members: dict[str, Any]
    problems: list[tuple[str, str]]


def open_zip(handle: BinaryIO) -> tuple[zipfile.ZipFile, Directory]:
    """A zip file and its directory. Names that say they are UTF-8 and are not, at which zipfile gives up all of it,
    cost no more than their members.

    Raises:
        FilesError: members share bytes, so that a small file could hold any amount. Anything: it is damaged.
    """
    mended = _MendedNames(handle)
    try:
        archive = zipfile.ZipFile(handle)
    except UnicodeDecodeError:
        archive = zipfile.ZipFile(mended)
        archive.fp = handle
    infos = archive.infolist()
    free = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        if info.header_offset < free:
            raise FilesError("packed file is damaged (its members overlap)")
        free = info.header_offset + LOCAL_HEADER + info.compress_size
    if free > archive.start_dir:
        raise FilesError("packed file is damaged (its members overlap)")
    # The name as it is in the file: zipfile's own ends at the first NUL, and so might be that of another member.
    names = (mended.names.get(number, info.orig_filename) for number, info in enumerate(infos))
    entries = ((name, _zip_problem(info), info) for name, info in zip(names, infos, strict=True) if not info.is_dir())
    return archive, _directory(entries)


def _zip_problem(info: zipfile.ZipInfo) -> str:
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: of a system without such modes
        return NOT_REGULAR
    deflated = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return "its stated size is impossible" if deflated and info.file_size > DEFLATE * info.compress_size else ""


class _MendedNames:
    """The file of a zip as ``zipfile`` may read its directory: with the flag for UTF-8 taken from the ``names`` (by
    number of the entry) that are not."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.names: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def read(self, count: int = -1) -> bytes:
        data = bytearray(self.handle.read(count))
        if not data.startswith(b"PK\x01\x02"):
            return bytes(data)
        self.names.clear()
        at = number = 0
        while at + 46 <= len(data):
            length, extra, comment = struct.unpack_from("<3H", data, at + 28)
            name = bytes(data[at + 46 : at + 46 + length])
            if data[at + 9] & 8:  # bit 11 of the flags
                try:
                    name.decode("utf-8")
                except UnicodeDecodeError:
                    self.names[number] = name.decode("utf-8", "surrogateescape")
                    data[at + 9] &= ~8 & 0xFF
            at += 46 + length + extra + comment
            number += 1
        return bytes(data)


def tar_directory(stream: Any) -> Directory:
    """The directory of a tar, whose ``stream`` is decompressed already.

    Raises:
        Anything: it is damaged.
    """
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        found = _directory(_tar_entries(tar))
        # tarfile takes a header that makes no sense for the end.
        stream.seek(tar.offset)
        if any(stream.read(tarfile.BLOCKSIZE)):
            found.problems.append(("", "packed file is damaged in its middle; the members after that are not known"))
    return found


def _tar_entries(tar: tarfile.TarFile) -> Iterator[tuple[str, str, list[int]]]:
    for info in tar:
        if not info.isdir():
            problem = "" if info.isreg() and not info.issparse() else NOT_REGULAR
            yield info.name.removeprefix("./"), problem, [info.offset_data, info.size]


def _directory(entries: Iterable[tuple[str, str, Any]]) -> Directory:
    """Of (name, problem, place) of all that a pack names."""
    found = Directory({}, [])
    for name, problem, place in entries:
        if is_odd(name):
            problem = ODD_NAME
        elif not problem and _leaves(name):
            problem = "a member's name leaves the packed file"
        elif not problem and name in found.members:
            found.problems.append((name, TWICE))
        if problem:
            found.problems.append((printable(name), problem))
        else:
            found.members[name] = place
    return found


def _leaves(member: str) -> bool:
    path = PurePosixPath(member)
    return path.is_absolute() or ".." in path.parts or IN_PACK in member


def open_member(pack: Any, place: Any) -> tuple[Any, int]:
    """A member opened for reading from its beginning, and its size in the pack.

    Args:
        pack: a ``ZipFile``, or the decompressed stream of a tar.
        place: see ``Directory``.

    Raises:
        FilesError: it is encrypted. Anything: it is damaged.
    """
    if not isinstance(pack, zipfile.ZipFile):
        return _Slice(pack, *place), place[1]
    if place.flag_bits & 1:
        raise FilesError("packed file is encrypted")
    return pack.open(place), place.compress_size


def read_member(pack: Any, place: Any, most: int) -> bytes:
    """The content of a member; see ``open_member``. Memory is that of the content, whatever size is stated.

    Raises:
        FilesError: also where it is larger than ``most`` bytes.
    """
    size = place.file_size if isinstance(pack, zipfile.ZipFile) else place[1]
    with open_member(pack, place)[0] as handle:
        if size > most:
            raise FilesError("file is too large")
        if size < SMALL:
            data: bytes = handle.read(size + 1)
        else:  # one read would join what it has read by copies
            content = io.BytesIO()
            while piece := handle.read(CHUNK):
                content.write(piece)
            data = content.getvalue()  # shares its memory with the buffer
    if len(data) != size:
        raise FilesError("packed file is damaged")
    return data


class _Slice(io.RawIOBase):
    """A part of a stream, to be read from its beginning."""

    def __init__(self, stream: Any, offset: int, length: int) -> None:
        self.stream, self.at, self.end = stream, offset, offset + length

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        left = self.end - self.at
        if not left:
            return b""
        with _reading:
            self.stream.seek(self.at)
            data: bytes = self.stream.read(min(size, left) if size >= 0 else left)
        self.at += len(data)
        return data
