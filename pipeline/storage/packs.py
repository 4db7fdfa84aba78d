"""Zip and tar files of other people: what their directories name, and the bytes of one member.

zipfile and tarfile do the work; what they take on trust is checked here. Of two members of one name the last counts, as
it does when the pack is unpacked.
"""

from __future__ import annotations

import io
import itertools
import re
import stat
import struct
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pipeline.storage.untrusted import NOT_REGULAR, ODD_NAME, FilesError, is_odd, printable

IN_PACK = "!/"
CHUNK = 1 << 20  # bytes read at a time
SMALL = 4 << 20  # bytes of a member that is read at once
LOCAL_HEADER = 30  # bytes before each member of a zip, at least
ENTRY = b"PK\x01\x02"  # the first bytes of a member's record in a zip's directory
DEFLATE = 1032  # bytes that deflate makes of one, at most
MAX_MEMBERS = 5_000_000  # ten times the largest public archive; each takes up to 700 bytes of memory
MAX_HEADERS = 1 << 20  # bytes of a tar's headers that one member has, and of those for all members; usual: 1,000
MAX_GLOBAL = 1000  # words that a tar says of all its members
MAX_DIGITS = 255  # in a row in such headers, as long as a file's name may be
METHODS = {9: "deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ"}  # of compression (APPNOTE 4.4.5)
MANY = "packed file has more members than any archive of images"
HEADERS = "packed file has larger headers than any archive of images"
HARD_LINK = "a hard link to another member, which is not followed; unpack the packed file"
NAMELESS = "a member of the packed file has no name"
TWICE = "another member of the packed file has this name, too; the last one counts"
_reading = threading.Lock()  # a tar's stream has one position, which the threads of a process share


@dataclass(frozen=True)
class Directory:
    """``members``: name -> place, a ``ZipInfo`` or, of a tar, (offset, length) in its decompressed stream.
    ``problems``: (name, reason) of what is no member, the name "" for the pack itself."""

    members: dict[str, Any]
    problems: list[tuple[str, str]]


def open_zip(handle: BinaryIO) -> tuple[zipfile.ZipFile, Directory]:
    """A zip file and its directory. Names that say they are UTF-8 and are not, at which zipfile gives up all of it,
    cost no more than their members.

    Raises:
        FilesError: members share bytes, so that a small file could hold any amount, or are too many. Anything: it is
            damaged.
    """
    read = _ZipDirectory(handle)
    try:
        archive = zipfile.ZipFile(read)
    except UnicodeDecodeError:
        read.mends = True
        archive = zipfile.ZipFile(read)
    archive.fp = handle
    infos = archive.infolist()
    free = 0
    for info in sorted(infos, key=lambda i: i.header_offset):
        if info.header_offset < free:
            raise FilesError("packed file is damaged (its members overlap)")
        free = info.header_offset + LOCAL_HEADER + info.compress_size
    if free > archive.start_dir:
        raise FilesError("packed file is damaged (its members overlap)")
    # The name as it is in the directory: zipfile's own ends at the first NUL, and so might be that of another member;
    # newer ones take it from a further field (0x7075). Some programs of Windows write \\ for /, against APPNOTE 4.4.17.
    said = (read.names.get(number, info.orig_filename) for number, info in enumerate(infos))
    names = (name.replace("\\", "/") for name in said)
    named = zip(names, infos, strict=True)
    return archive, _directory((name, _zip_problem(info), info) for name, info in named if not name.endswith("/"))


def _zip_problem(info: zipfile.ZipInfo) -> str:
    if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: of a system without such modes
        return NOT_REGULAR
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # zipfile unpacks all that 4 kB of these hold at once, which may be gigabytes.
        method = METHODS.get(info.compress_type, f"method {info.compress_type}")
        return f"compressed with {method}, which is not read; unpack the packed file, or pack it with deflate"
    return "its stated size is impossible" if info.file_size > DEFLATE * info.compress_size else ""


class _ZipDirectory:
    """The file of a zip as ``zipfile`` may read its directory: of so many members, and, if it ``mends``, with the flag
    for UTF-8 taken from the ``names`` (by number of the entry) that are not."""

    def __init__(self, handle: BinaryIO) -> None:
        self.handle = handle
        self.mends = False
        self.names: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def read(self, count: int = -1) -> bytes:
        found = self.handle.read(count)
        if found.count(ENTRY) > MAX_MEMBERS:
            raise FilesError(MANY)
        if not self.mends or not found.startswith(ENTRY):
            return found
        data = bytearray(found)
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
        FilesError: its headers, or members, are too many. Anything: it is damaged.
    """
    headers: Any = _TarHeaders(stream)
    with tarfile.open(fileobj=headers, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        found = _directory(_tar_entries(tar, headers))
        # tarfile takes a header that makes no sense for the end.
        stream.seek(tar.offset)
        if any(stream.read(tarfile.BLOCKSIZE)):
            found.problems.append(("", "packed file is damaged in its middle; the members after that are not known"))
    return found


class _TarHeaders:
    """A tar's stream, from which ``tarfile`` may read headers of a bounded size for a member: it would hold all of a
    name, of pax records and of a sparse file's map, each of any length and any number of them for a member."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.left = MAX_HEADERS

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def read(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0 or count < 0:
            raise FilesError(HEADERS)
        data: bytes = self.stream.read(count)
        # tarfile looks through a row of digits from each of them on: 60 kB would take half a minute.
        if count > tarfile.BLOCKSIZE and any(len(row) > MAX_DIGITS for row in re.findall(rb"\d+", data)):
            raise FilesError(HEADERS)
        return data


def _tar_entries(tar: Any, headers: _TarHeaders) -> Iterator[tuple[str, str, tuple[int, int]]]:
    for number in itertools.count():
        headers.left = MAX_HEADERS
        info = tar.next()
        if info is None:
            return
        tar.members.clear()  # else all that was read of all of them is kept
        said = tar.pax_headers
        if len(said) > MAX_GLOBAL or sum(map(len, said.values())) > MAX_HEADERS:
            raise FilesError(HEADERS)
        if number >= MAX_MEMBERS:
            raise FilesError(MANY)
        if info.size < 0 or tar.offset < info.offset_data:  # the next header would be one that was read before
            raise FilesError("packed file is damaged (a member's size is below 0)")
        if not info.isdir():
            problem = "" if info.isreg() and not info.issparse() else HARD_LINK if info.islnk() else NOT_REGULAR
            yield info.name.removeprefix("./"), problem, (info.offset_data, info.size)


def _directory(entries: Iterable[tuple[str, str, Any]]) -> Directory:
    """Of (name, problem, place) of all that a pack names."""
    members: dict[str, Any] = {}
    problems: dict[tuple[str, str], None] = {}  # each once, however often a pack says a name
    for name, problem, place in entries:
        if not name:
            problem = NAMELESS
        elif is_odd(name):
            problem = ODD_NAME
        elif not problem and _leaves(name):
            problem = "a member's name leaves the packed file"
        elif not problem and name in members:
            problems[name, TWICE] = None
        if problem:
            problems[printable(name), problem] = None
        else:
            members[name] = place
    return Directory(members, list(problems))


def _leaves(member: str) -> bool:
    return member.startswith("/") or (".." in member and ".." in member.split("/")) or IN_PACK in member


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
