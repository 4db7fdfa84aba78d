"""What the readers share: an archive's files, its label tables and images among them, and the paper's random splits."""

from __future__ import annotations

import csv
import io
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets import facts
from pipeline.storage.files import Files, FilesError, Gone, base_name, decode_text
from pipeline.storage.untrusted import Bounded

IMAGE_SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")  # where one image comes in two formats, the earlier wins
LABEL_CELLS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}
# Bytes that a table may unpack to: so many, and so many times its size in the archive. Real ones are below 10 times.
MAX_UNPACKED, MAX_RATIO = 64 << 20, 100
MAX_LIST = 64 << 20  # bytes of a file that is read whole; RSNA's mappings are 10 MB
MAX_REPORT = 1 << 20  # bytes; real ones are 10 kB
MAX_LACKING = 1_000_000  # cells that rows of a table lack, beside ten times those they have
MAX_CELL = 1 << 24  # characters; a run-length mask is longer than the csv module's default of 131,072 allows
MAX_ROW = 2 * MAX_CELL  # characters
MAX_EMPTY = 1 << 20  # rows without a cell, one after the other
CHUNK = 1 << 20  # bytes read at a time


class SourceError(ValueError):
    """An archive that cannot be read as a whole; one line with the path, what is wrong and what to do."""


@dataclass(frozen=True)
class Archive:
    """One archive as a reader sees it: every file below its root, those inside zip and tar files included."""

    dataset: str
    files: Files
    names: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    fingerprint: str

    @property
    def images(self) -> list[str]:
        """Every image file, sorted."""
        return [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES)]

    def text(self, name: str) -> str | None:
        """The text of a report, or ``None`` where it cannot be read or is too large to be one."""
        try:
            return decode_text(self.files.read(name, MAX_REPORT))
        except Gone:
            raise
        except FilesError:
            return None


def open_archive(dataset: str, path: str, cache: Path, follow_links: bool = False) -> Archive:
    """List an archive.

    Args:
        path: its folder or fsspec URL.
        cache, follow_links: see ``files.Files``.

    Raises:
        SourceError: there is nothing at ``path``.
    """
    files = Files(path, cache, follow_links)
    if not files.exists():
        raise SourceError(
            f"{dataset}: archive folder {path} not found; set sources.{dataset}.path, or leave sources.{dataset} "
            f"out. To get it: {facts(dataset).access}"
        )
    listing = files.walk()
    return Archive(dataset, files, listing.files, listing.problems, listing.fingerprint)


def find_table(archive: Archive, names: Iterable[str]) -> str | None:
    """The first of the named csv files that the archive has, plain or ``.gz``, loose or packed, also with a
    ``kaggle_`` prefix; of several, the one nearest to the root."""
    by_base: dict[str, str] = {}
    for name in sorted(archive.names, key=lambda n: (n.count("/"), n)):
        if name.lower().endswith((".csv", ".csv.gz")):
            by_base.setdefault(base_name(name), name)
    for name in names:
        variants = [f"{prefix}{name}{suffix}" for prefix in ("", "kaggle_") for suffix in ("", ".gz")]
        if found := [by_base[variant] for variant in variants if variant in by_base]:
            return min(found, key=lambda path: path.count("/"))  # the first of equally near ones
    return None


def required_table(archive: Archive, names: Sequence[str]) -> str:
    """As ``find_table``, for a file the archive cannot be read without.

    Raises:
        SourceError: none of the names exists.
    """
    name = find_table(archive, names)
    if name is None:
        seen = [f" ({at}: {why})" for at, why in archive.problems if base_name(at).startswith(tuple(names))]
        raise SourceError(
            f"{archive.dataset}: label file {names[0]} (or .gz, .zip) not found below {archive.files.root}"
            f"{''.join(seen[:1])}. To get it: {facts(archive.dataset).access}"
        )
    return name


def table_rows(archive: Archive, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of one of the archive's csv files as text; see ``read_rows``."""
    return read_rows(archive.dataset, archive.files, name, columns)


def content(archive: Archive, name: str, most: int = MAX_LIST) -> bytes:
    """All of a label file.

    Raises:
        SourceError: it cannot be read, or is larger than ``most`` bytes. Gone: the archive is no longer there.
    """
    try:
        return archive.files.read(name, most)
    except Gone:
        raise
    except FilesError as error:
        raise SourceError(f"{archive.dataset}: {archive.files.root}/{name}: {error}; download it again") from None


def read_rows(dataset: str, files: Files, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a csv file (plain or gzip) as text, column names and cells stripped of spaces; ids are never read as
    numbers. A byte-order mark, CRLF and Latin-1 are understood. Held are a row and a buffer, whatever the file's size.

    Args:
        columns: those the caller relies on.

    Raises:
        SourceError: a column is missing, the file is damaged, or it unpacks to what no table does. Gone: see there.
    """
    path = f"{files.root}/{name}"
    csv.field_size_limit(MAX_CELL)
    try:
        encoding = _encoding(files, name)
        with _unpacked(files, name) as table:
            rows = _rows(io.TextIOWrapper(table, encoding, newline=""))
            header = [cell.strip() for cell in next(rows, [])]
            missing = [column for column in columns if column not in header]
            if missing:
                raise SourceError(f"{dataset}: {path}: no column {missing[0]!r}; is this the archive's own label file?")
            given = lacking = 0
            for cells in rows:
                if cells:
                    given, lacking = given + len(cells), lacking + max(0, len(header) - len(cells))
                    if lacking > MAX_LACKING + 10 * given:
                        raise FilesError("its rows have far fewer cells than its first one")
                    # A row cut short reads as blank cells: which is what it says.
                    cells += [""] * (len(header) - len(cells))
                    yield {column: cell.strip() for column, cell in zip(header, cells, strict=False)}
    except Gone:
        raise
    except FilesError as error:
        files.check()
        raise SourceError(f"{dataset}: {path}: {error}; download it again") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise SourceError(f"{dataset}: {path}: damaged ({type(error).__name__}); download it again") from None


@contextmanager
def _unpacked(files: Files, name: str) -> Iterator[io.BufferedReader[Any]]:
    """A table's bytes, read as they are asked for; ``FilesError`` where they cannot be, or are too many."""
    handle, size = files.stream(name)
    most = MAX_UNPACKED + MAX_RATIO * size
    with handle:
        table = io.BufferedReader(Bounded(handle, most), CHUNK)
        packed = table.peek(2)[:2] == b"\x1f\x8b"
        yield io.BufferedReader(Bounded(GzipFile(fileobj=table), most), CHUNK) if packed else table


def _encoding(files: Files, name: str) -> str:
    """A table is UTF-8, with or without a mark, if all of it is, and else Latin-1, in which every byte is a letter."""
    decoder, encoding = getincrementaldecoder("utf-8")(), "utf-8-sig"
    with _unpacked(files, name) as table:
        while True:  # to its end in any case: a table that is too large is refused before its first row
            data = table.read(CHUNK)
            try:
                if encoding != "latin-1":
                    decoder.decode(data, final=not data)
            except UnicodeDecodeError:
                encoding = "latin-1"
            if not data:
                return encoding


def _rows(text: io.TextIOWrapper) -> Iterator[list[str]]:
    """The csv module's rows of a text; ``csv.Error`` for a row without an end, or empty ones without an end."""
    size = empty = 0

    def lines() -> Iterator[str]:
        nonlocal size
        while line := text.readline(MAX_ROW):
            size += len(line)
            if size >= MAX_ROW:
                raise csv.Error
            yield line

    for cells in csv.reader(lines()):
        size, empty = 0, 0 if cells else empty + 1
        if empty > MAX_EMPTY:
            raise csv.Error
        yield cells


def parse_label(cell: str) -> int | None:
    """A label cell: 1, 0, -1, or ``None`` for blank (not mentioned).

    Raises:
        ValueError: anything else.
    """
    return None if cell == "" else _label(cell)


def _label(cell: str) -> int:
    if cell not in LABEL_CELLS:
        raise ValueError("not a label")
    return LABEL_CELLS[cell]


def by_stem(paths: Iterable[str]) -> dict[str, str]:
    """File name without suffix -> path. Of two formats of one image the DICOM wins, then the path that sorts first."""
    index: dict[str, str] = {}
    paths = sorted(paths)
    for suffix in IMAGE_SUFFIXES:
        for path in paths:
            if path.lower().endswith(suffix):
                index.setdefault(base_name(path)[: -len(suffix)], path)
    return index


def split_two(n: int, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """The rows scikit-learn's ``train_test_split(range(n), test_size=share, random_state=seed)`` returns.

    Written out (one permutation of numpy's frozen ``RandomState``) because importing scikit-learn takes longer than
    reading a small archive; the tests compare the two.
    """
    if n < 2:
        return list(range(n)), []
    order = np.random.RandomState(seed).permutation(n).tolist()
    held = int(np.ceil(n * share))
    return order[held:], order[:held]


def train_valid(n: int, share: float = 0.2) -> list[str]:
    """Split of each of ``n`` items, by default 80 / 20 (ChestX-ray14 and VinDr-CXR; paper Table 1)."""
    splits = ["train"] * n
    for i in split_two(n, share)[1]:
        splits[i] = "valid"
    return splits


def train_valid_test(n: int, held: float = 0.3) -> list[str]:
    """Split of each of ``n`` items, by default 70 / 15 / 15 (RSNA and SIIM; paper Table 1). The second cut's first half
    is test: only so do the paper's counts of 4,003 / 4,003 and 1,808 / 1,807 come out on the right sides.
    """
    splits = ["train"] * n
    rest = split_two(n, held)[1]
    test, valid = split_two(len(rest), 0.5)
    for half, name in ((test, "test"), (valid, "valid")):
        for i in half:
            splits[rest[i]] = name
    return splits
