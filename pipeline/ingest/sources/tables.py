"""Label files and lists of images, as their owners or a spreadsheet wrote them: CSV, plain or gzip, read row by row.

Understood: a comma, semicolon, tab or bar between cells, with or without a line ``sep=;``; UTF-8, UTF-16 and cp1252;
names of columns in any case. Left out: columns without a name, which are row numbers of pandas or of a spreadsheet, and
rows without a cell.
"""

from __future__ import annotations

import csv
import io
import re
from codecs import BOM_UTF16_BE, BOM_UTF16_LE, getincrementaldecoder
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from gzip import GzipFile
from typing import Any

from pipeline.config.records import hint, shown
from pipeline.ingest.sources.archive import Archive, SourceError
from pipeline.storage.files import Files, FilesError, Gone
from pipeline.storage.untrusted import Bounded, printable
from pipeline.study import NEGATIVE, POSITIVE, UNCERTAIN

# Bytes that a table may unpack to: so many, and so many times its size in the archive. Real ones are below 10 times.
MAX_UNPACKED, MAX_RATIO = 64 << 20, 20
MAX_LACKING = 1_000_000  # cells that rows of a table lack, beside ten times those they have
MAX_CELL = 1 << 24  # characters; a run-length mask is longer than the csv module's default of 131,072 allows
MAX_ROW = 2 * MAX_CELL  # characters
# Rows, and as many again as the file has bytes in the archive; of the largest public list there are 400,000.
MAX_ROWS, MOST_ROWS = 200_000, 4_000_000
MAX_HEADER = 1 << 16  # characters
LONGEST_NAME = 100  # of a column that a message says back
MAX_EMPTY = 1 << 20  # rows without a cell, one after the other
CHUNK = 1 << 20  # bytes read at a time
SEPARATORS = ",;\t|"
# Signs of no width at an end of a cell, which what is copied from a web page or a document has.
NO_WIDTH = "\u200b\u200c\u200d\u2060\ufeff\u00ad"
NAMELESS = re.compile(r"(Unnamed: \d+(_level_\d+)?|__index_level_\d+__)?")  # a column of row numbers
WORKBOOKS = {
    b"PK\x03\x04": "an Excel workbook (.xlsx) or another zip file",
    b"\xd0\xcf\x11\xe0": "an Excel workbook (.xls)",
}
ESCAPED, BEYOND = re.compile("[\udc80-\udcff]"), re.compile("[^\0-\x7f]")
MARKS = {BOM_UTF16_LE: "utf-16", BOM_UTF16_BE: "utf-16"}
BLANKS = ("", "nan", "na", "n/a", "none", "null", "nat", "<na>")
LABEL_WORDS: dict[str, int | None] = {
    **dict.fromkeys(BLANKS),
    **dict.fromkeys(("true", "yes", "y", "t", "positive", "pos", "present"), POSITIVE),
    **dict.fromkeys(("false", "no", "n", "f", "negative", "neg", "absent"), NEGATIVE),
    **dict.fromkeys(("uncertain", "unsure", "equivocal"), UNCERTAIN),
}
LABEL_NUMBER = re.compile(r"([+\u2212-]?[01])(?:[.,]0*)?")


@dataclass(frozen=True, slots=True)
class Row:
    """``where`` it is ("line 2"), and its ``cells``, stripped of spaces, by the names of their columns.

    ``wrong``: why it cannot be relied on, else "".
    """

    where: str
    cells: dict[str, str]
    wrong: str = ""


@dataclass(frozen=True, slots=True)
class Form:
    """How a file is written: its encoding, what is between its cells, and the names of its columns ("" = left out)."""

    encoding: str
    separator: str
    columns: tuple[str, ...]
    skipped: int  # lines before the header
    errors: str  # "surrogateescape": of UTF-8 of which some rows are not
    size: int  # bytes that it has in the archive, at most


def table_rows(archive: Archive, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of one of the archive's own label files; see ``read_rows``."""
    return read_rows(archive.dataset, archive.files, name, columns)


def image_rows(archive: Archive, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """As ``table_rows``, of a list that says which images there are: its rows are counted."""
    for row in table_rows(archive, name, columns):
        archive.rows[name] += 1
        yield row


def read_rows(dataset: str, files: Files, name: str, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Cells of each row of a label file that its owner publishes, ids never read as numbers.

    Args:
        columns: those the caller relies on.

    Raises:
        SourceError: as ``table_form`` and ``read_table``, and where a row has more cells than there are columns.
        Gone: see there.
    """
    for row in read_table(dataset, files, name, table_form(dataset, files, name, columns)):
        if row.wrong:
            raise SourceError(f"{dataset}: {files.root}/{name}: {row.where}: {row.wrong}; download the file again")
        yield row.cells


def read_table(dataset: str, files: Files, name: str, form: Form) -> Iterator[Row]:
    """Rows of a csv file. Held are a row and a buffer, whatever the file's size.

    Args:
        form: as ``table_form`` gives it.

    Raises:
        SourceError: a quote is not closed, or the file is damaged. Gone: see there.
    """
    path = f"{dataset}: {files.root}/{name}"
    with _damage(path, files), _unpacked(files, name) as table:
        text = io.TextIOWrapper(table, form.encoding, form.errors, newline="")
        given = lacking = 0
        most = min(MOST_ROWS, MAX_ROWS + form.size)
        for number, (line, cells) in enumerate(_rows(text, form, path)):
            if number >= most:
                raise FilesError(f"it has more than {most:,} rows")
            given, lacking = given + len(cells), lacking + max(0, len(form.columns) - len(cells))
            if lacking > MAX_LACKING + 10 * given:
                raise FilesError("its rows have far fewer cells than its first one")
            cells = [_stripped(cell) for cell in cells]
            if not any(cells):
                continue
            wrong = ""
            if any(cells[len(form.columns) :]):
                wrong = "it has more cells than there are columns: a text with a separator in it needs quotes"
            elif form.errors != "strict" and any(map(ESCAPED.search, cells)):
                wrong = "it is not UTF-8, which other rows are"
            # A row cut short reads as blank cells: which is what it says.
            found = dict.fromkeys(form.columns, "") | dict(zip(form.columns, cells, strict=False))
            found.pop("", None)
            yield Row(f"line {line}", found, wrong)


def table_form(dataset: str, files: Files, name: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Form:
    """Look through a table once: how it is written.

    Args:
        columns: those it must have; a column of this name in other capitals is it.
        optional: names of columns that it may have.

    Raises:
        SourceError: a column is missing or named twice, the file is damaged, or it unpacks to what no table does.
    """
    path = f"{dataset}: {files.root}/{name}"
    with _damage(path, files):
        encoding, errors = _encoding(files, name, path)
        handle, size = files.stream(name)
        handle.close()
        with _unpacked(files, name) as table:
            head = io.TextIOWrapper(table, encoding, errors, newline="").read(MAX_HEADER)
        if len(head) == MAX_HEADER and not re.search(r"[\r\n]", head):
            raise FilesError("damaged (a header without an end)")
    first, skipped = head.partition("\n")[0], 0
    separators = SEPARATORS
    if said := re.fullmatch(r"\s*\"?sep=(.)\"?\s*", first, re.IGNORECASE):
        separators, skipped, head = said[1], 1, head.partition("\n")[2]
    wanted = {column.casefold() for column in (*columns, *optional)}

    def header(separator: str) -> list[str]:
        try:
            return [
                _stripped(cell) for cell in next(csv.reader(io.StringIO(head, newline=""), delimiter=separator), [])
            ]
        except csv.Error:
            return []

    by = {separator: header(separator) for separator in separators}
    best = max(separators, key=lambda s: (len(wanted & {c.casefold() for c in by[s]}), len(by[s])))
    named = column_names(by[best], columns, optional, path)
    return Form(encoding, best, named, skipped, errors, size)


def column_names(header: Sequence[str], columns: Sequence[str], optional: Sequence[str], path: str) -> tuple[str, ...]:
    """The names of a table's columns: as ``columns`` and ``optional`` write them, else as the header does; "" = to be
    left out.

    Raises:
        SourceError: one of ``columns`` is missing, or two columns have one name.
    """
    known = {column.casefold(): column for column in (*columns, *optional)}
    cells = map(printable, header)
    named = tuple("" if NAMELESS.fullmatch(cell) else known.get(cell.casefold(), cell) for cell in cells)
    if missing := [column for column in columns if column not in named]:
        near = hint(missing[0], [name for name in named if len(name) <= LONGEST_NAME])
        raise SourceError(
            f"{path}: no column {missing[0]!r}{near}; the first row has to name {', '.join(columns)}: is this the "
            "archive's own file, or your list (docs/own-data.md)?"
        )
    seen: set[str] = set()
    for name in filter(None, named):
        if name.casefold() in seen:
            raise SourceError(f"{path}: two columns are named {shown(name)}; rename or remove one")
        seen.add(name.casefold())
    return named


def parse_label(cell: str) -> int | None:
    """A label cell: 1, 0, -1, or ``None`` for blank (not mentioned), also as words and as spreadsheets and pandas write
    them: ``1.00``, ``+1``, ``1,0``, ``True``, ``nan``, ``NA``.

    Raises:
        ValueError: anything else.
    """
    if found := LABEL_NUMBER.fullmatch(cell):
        return int(found[1].replace("\u2212", "-"))
    word = cell.lower()
    if word not in LABEL_WORDS:
        raise ValueError("not a label")
    return LABEL_WORDS[word]


def whole_number(cell: str) -> str:
    """An id that consists of digits, without the ``.0`` that pandas puts behind a column with blanks; else as it is."""
    return cell[:-2] if re.fullmatch(r"\d+\.0", cell) else cell


def _stripped(cell: str) -> str:
    """Without spaces and signs of no width at its ends."""
    cell = cell.strip()
    return cell if cell.isascii() else cell.strip(NO_WIDTH).strip()


@contextmanager
def _damage(path: str, files: Files) -> Iterator[None]:
    """What may be wrong with a table's bytes, as ``SourceError``."""
    try:
        yield
    except (Gone, SourceError):
        raise
    except FilesError as error:
        files.check()
        raise SourceError(f"{path}: {error}; mend it, or download it again") from None
    except UnicodeError:
        raise SourceError(f"{path}: neither UTF-8 nor UTF-16 nor cp1252; save it as UTF-8") from None


@contextmanager
def _unpacked(files: Files, name: str) -> Iterator[io.BufferedReader[Any]]:
    """A table's bytes, read as they are asked for; ``FilesError`` where they cannot be, or are too many."""
    handle, size = files.stream(name)
    most = MAX_UNPACKED + MAX_RATIO * size
    with handle:
        table = io.BufferedReader(Bounded(handle, most), CHUNK)
        packed = table.peek(2)[:2] == b"\x1f\x8b"
        yield io.BufferedReader(Bounded(GzipFile(fileobj=table), most), CHUNK) if packed else table


def _encoding(files: Files, name: str, path: str) -> tuple[str, str]:
    """A table's encoding, and how its errors are handled: UTF-16 if it begins so, UTF-8, with or without a mark, if
    all or most of it is, and else cp1252, what Windows writes in western Europe and America."""
    decoder, encoding = getincrementaldecoder("utf-8")("surrogateescape"), "utf-8-sig"
    right = wrong = 0  # letters beyond ASCII that are UTF-8, and bytes that are not
    with _unpacked(files, name) as table:
        start = table.peek(1000)[:1000]
        if what := WORKBOOKS.get(start[:4]):
            raise SourceError(f"{path}: {what}; save the sheet as CSV (UTF-8)")
        if start[:2] in MARKS:
            encoding = "utf-16"
        elif start[1::2].count(0) > len(start) // 4:  # every second byte of western text
            encoding = "utf-16-le"
        elif start[::2].count(0) > len(start) // 4:
            encoding = "utf-16-be"
        while True:  # to its end in any case: a table that is too large is refused before its first row
            data = table.read(CHUNK)
            if encoding == "utf-8-sig":
                text = decoder.decode(data, final=not data)
                if not text.isascii():
                    bad = len(ESCAPED.findall(text))
                    wrong, right = wrong + bad, right + len(BEYOND.findall(text)) - bad
            if not data:
                break
    if not wrong:
        return encoding, "strict"
    # Bytes of cp1252 are hardly ever letters of UTF-8 by chance.
    return (encoding, "surrogateescape") if right >= wrong else ("cp1252", "strict")


def _rows(text: io.TextIOWrapper, form: Form, path: str) -> Iterator[tuple[int, list[str]]]:
    """The csv module's rows below the header, with the line each begins in.

    Raises:
        SourceError: a quote is not closed. csv.Error: a row without an end, or empty ones without an end.
    """
    size = empty = 0

    def lines() -> Iterator[str]:
        nonlocal size
        while line := text.readline(MAX_ROW):
            size += len(line)
            if size >= MAX_ROW:
                raise FilesError("damaged (a row without an end)")
            yield line

    for _ in range(form.skipped):
        text.readline(MAX_ROW)
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(lines(), delimiter=form.separator, strict=True, skipinitialspace=True)
    begun = 0
    try:
        for number, cells in enumerate(reader):
            size, empty = 0, 0 if cells else empty + 1
            if empty > MAX_EMPTY:
                raise FilesError("damaged (empty rows without an end)")
            if number:
                yield form.skipped + begun + 1, cells
            begun = reader.line_num
    except csv.Error:
        raise SourceError(
            f"{path}: line {form.skipped + begun + 1}: a quote in a cell is not closed, or not doubled; in a cell with "
            'quotes around it, write "" for each quote'
        ) from None
