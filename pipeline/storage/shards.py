"""Studies <-> WebDataset tars: written once by ingest, read at random by offset and length, with no unpacking.

A sample is a study: ``<key>.0.jpg``, ``<key>.1.jpg`` ... its views, ``<key>.json`` what is known of it. The tars are
plain POSIX ustar, readable by ``webdataset`` or ``tar``; the Parquet index holds each image's place, so nothing is
searched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from pipeline.storage.atomic import PRIVATE
from pipeline.storage.files import file_system
from pipeline.storage.pictures import Grey, ImageError, decode
from pipeline.study import Study, View

BLOCK = 512  # bytes; tar's unit
MAX_KEY = 80  # characters; leaves room for the member's suffix in ustar's 100
MAX_OPEN = 256  # file descriptors kept by a reader
SAMPLED = 4  # training checks the digest of one picture in so many: of all it would take 4 % of making a batch


class ShardError(ValueError):
    """A shard that does not hold what the index says; one line with the shard's path."""


@dataclass(frozen=True)
class EncodedPicture:
    """One encoded view: JPEG bytes, size in pixels, its position where the archive's lists did not say, and what was
    done otherwise than its file says."""

    data: bytes
    width: int
    height: int
    position: str = ""
    mended: tuple[str, ...] = ()


def key(study: Study) -> str:
    """A study's name inside the tar, which no other study has: patient and study, joined by the first ``_``, or the one
    id that is both, without any.

    Bytes that are no letter, digit or ``-`` are ``%`` and two hex digits (WebDataset cuts names at the first dot), but
    for ``_`` in the id after the first. A long name ends in a digest of the whole.
    """
    name = _coded(study.study)
    if study.study != study.patient:
        name = f"{_coded(study.patient)}_{_coded(study.study).replace('%5F', '_')}"
    if len(name) <= MAX_KEY:
        return name
    return f"{name[: MAX_KEY - 33]}%{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def _coded(identity: str) -> str:
    return re.sub(rb"[^A-Za-z0-9-]", lambda byte: b"%%%02X" % byte[0][0], identity.encode()).decode()


class ShardWriter:
    """Writes studies into one tar, ``path``; the index will say that it is at ``address`` (a path or URL).

    The tar is written beside its place and renamed when complete; without any study there is none. The bytes depend on
    the studies and their order alone. Use as a context manager; leaving it through an exception discards the tar.
    """

    def __init__(self, path: Path, address: str = "") -> None:
        self.path = path
        self.address = address or path.as_posix()
        self._keys: set[str] = set()
        self._offset = 0
        self._file: BinaryIO | None = None

    def write(self, study: Study, pictures: Sequence[EncodedPicture]) -> Study:
        """Append a study with one picture a view; the same study with its views' places, sizes and digests.

        Raises:
            ShardError: a study of this key was written before, or the number of pictures is not that of the views.
        """
        if not pictures or len(pictures) != len(study.views):
            raise ShardError(f"{self.path.name}: a study needs one picture for each of its views")
        sample = key(study)
        if sample in self._keys:
            raise ShardError(f"{self.path.name}: two studies have the key {sample}")
        self._keys.add(sample)
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._partial.touch(PRIVATE)
            self._file = self._partial.open("wb")
        views = []
        for number, (view, picture) in enumerate(zip(study.views, pictures, strict=True)):
            views.append(
                replace(
                    view,
                    position=view.position or picture.position,
                    path="",
                    shard=self.address,
                    offset=self._member(f"{sample}.{number}.jpg", picture.data),
                    length=len(picture.data),
                    width=picture.width,
                    height=picture.height,
                    digest=_digest(picture.data),
                )
            )
        placed = study.with_views(views)
        self._member(f"{sample}.json", _describe(placed))
        return placed

    @property
    def _partial(self) -> Path:
        """Named after the process, so that one left over from a killed run cannot meddle."""
        return self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")

    def _member(self, name: str, data: bytes) -> int:
        """Append one file; the offset of its content."""
        assert self._file is not None
        info = tarfile.TarInfo(name)  # mtime, uid, gid 0 and no names: nothing of this machine or moment
        info.size, info.mode = len(data), 0o644
        header = info.tobuf(tarfile.USTAR_FORMAT)
        padding = bytes(-len(data) % BLOCK)
        self._file.write(header + data + padding)
        start = self._offset + len(header)
        self._offset = start + len(data) + len(padding)
        return start

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        try:
            if kind is None:
                self._file.write(bytes(2 * BLOCK))
                self._file.flush()
                os.fsync(self._file.fileno())  # a part of the index must never outlive its tar
        finally:
            self._file.close()
        if kind is None:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)


def _digest(data: bytes) -> str:
    """blake2b-64 in hex, as ``View.digest``."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def publish(path: Path, address: str) -> None:
    """Put a finished tar at its URL and drop the local one; a local address is left to the caller."""
    if "://" not in address:
        return
    system, target = file_system(address)
    system.put_file(str(path), target)  # an object appears whole or not at all
    path.unlink()


def _describe(study: Study) -> bytes:
    """The json member: a whitelist, the same fields as the index has."""
    record = {
        "dataset": study.dataset,
        "patient": study.patient,
        "study": study.study,
        "split": study.split,
        "findings": study.findings,
        "impression": study.impression,
        "labels": study.labels,
        "views": [{"id": v.id, "position": v.position, "width": v.width, "height": v.height} for v in study.views],
    }
    return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()


class ShardReader:
    """Reads images of shards below ``root`` at random.

    Descriptors stay open (the latest ``MAX_OPEN``). ``pread`` has no file position to share, so one reader serves
    threads and forked processes alike.
    """

    def __init__(self, root: Path = Path()) -> None:
        self.root = root
        self._reads = 0
        self._open: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._new_lock)

    def read_bytes(self, view: View, every: int = 1) -> bytes:
        """The encoded image of a view.

        Args:
            every: one read in so many is held against the index's digest.

        Raises:
            ShardError: the shard is missing, or does not hold what was written.
        """
        data = self._fetch(view) if "://" in view.shard else self._read(view)
        self._reads += 1
        if self._reads % every == 0 and view.digest and _digest(data) != view.digest:
            raise ShardError(f"{view.shard}: damaged, a picture is not the one that was written; run ingest again")
        return data

    def load_view(self, view: View, reduce: int = 1, every: int = 1) -> Grey:
        """The picture of a view at 1, 1/2 or 1/4 of its size (``reduce`` 1, 2, 4), uint8 [H / reduce, W / reduce],
        sides rounded up; ``every`` as in ``read_bytes``.

        Raises:
            ShardError: it cannot be read, is not what was written, or is not of the size that the index states.
        """
        try:
            image = decode(self.read_bytes(view, every), reduce)
        except ImageError:
            raise ShardError(f"{view.shard}: damaged, a picture cannot be decoded; run ingest again") from None
        if view.width and image.shape != (-(-view.height // reduce), -(-view.width // reduce)):
            raise ShardError(f"{view.shard}: a picture is not as large as its index says; run ingest again")
        return image

    def _read(self, view: View) -> bytes:
        with self._lock:
            descriptor = self._open.get(view.shard)
            if descriptor is None:
                descriptor = self._add(view.shard)
            self._open.move_to_end(view.shard)
            data = os.pread(descriptor, view.length, view.offset) if view.offset >= 0 else b""
        if not data or len(data) != view.length:
            raise ShardError(f"{view.shard}: shorter than its index says; run ingest again")
        return data

    def _fetch(self, view: View) -> bytes:
        system, path = file_system(view.shard)
        try:
            data: bytes = system.cat_file(path, start=view.offset, end=view.offset + view.length)
        except OSError:
            raise ShardError(f"{view.shard}: no such shard; run ingest first") from None
        if len(data) != view.length:
            raise ShardError(f"{view.shard}: shorter than its index says; run ingest again")
        return data

    def _add(self, shard: str) -> int:
        try:
            descriptor = os.open(self.root / shard, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            raise ShardError(f"{shard or 'a view'}: no such shard; run ingest first") from None
        self._open[shard] = descriptor
        if len(self._open) > MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    def _new_lock(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held the old one

    def close(self) -> None:
        """Close all descriptors; the reader can be used again."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])


_reader = ShardReader()


def read_bytes(view: View) -> bytes:
    """The encoded image of a view, its shard relative to the working directory (the repository root)."""
    return _reader.read_bytes(view)


def load_view(view: View, reduce: int = 1, every: int = 1) -> Grey:
    """The picture of a view, its shard relative to the working directory (the repository root); see ``ShardReader``."""
    return _reader.load_view(view, reduce, every)
