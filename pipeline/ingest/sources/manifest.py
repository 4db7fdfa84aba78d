"""Your own archive: one CSV or Parquet file that lists its images, and no code.

Of rows that contradict one another none is taken: nothing says which of them is right.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from unicodedata import normalize

from pipeline.config.archive_params import Headings
from pipeline.config.records import hint, shown
from pipeline.ingest.report_headings import Translation
from pipeline.ingest.report_sections import section_text, sections
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive, SourceError
from pipeline.ingest.sources.list_places import Places
from pipeline.ingest.sources.parquet_list import parquet_rows
from pipeline.ingest.sources.tables import BLANKS, LONGEST_NAME, Row, parse_label, read_table, table_form
from pipeline.study import Reject, Study, View

SPLITS = {
    "train": ("train", "training", "tr"),
    "valid": ("valid", "validation", "validate", "val", "dev", "development", "tune"),
    "test": ("test", "testing", "holdout", "hold-out"),
}
SPLIT_WORDS = {"": "", **{word: split for split, words in SPLITS.items() for word in words}}
LATERALS = (("LEFT", "LATERAL"), ("RIGHT", "LATERAL"), ("LATERAL", "LEFT"), ("LATERAL", "RIGHT"))
VIEWS = {
    "PA": ("PA", "P A", "POSTEROANTERIOR", "POSTERO ANTERIOR", "POSTERIOR ANTERIOR", "POSTERO ANTERIOR PA"),
    "AP": ("AP", "A P", "ANTEROPOSTERIOR", "ANTERO POSTERIOR", "ANTERIOR POSTERIOR", "ANTERO POSTERIOR AP"),
    "FRONTAL": ("FRONTAL",),
    "LATERAL": ("LATERAL", "LAT", "L", "LL", "RL", *(f"{first} {then}" for first, then in LATERALS)),
    "": ("", "UNKNOWN"),
}
VIEW_WORDS = {word: view for view, words in VIEWS.items() for word in words}
# Words beside a view: how the patient was held, and what a view is a view of.
BESIDE = re.compile(
    r"\b(SUPINE|ERECT|UPRIGHT|STANDING|SITTING|SEMI|PORTABLE|MOBILE|VIEW|CHEST|PROJECTION|X[ -]?RAY|RADIOGRAPH)\b"
)
LABEL = "label:"
ROUNDED = re.compile(r"\d(?:[.,]\d+)?[eE]\+\d+")  # as a spreadsheet shows a long number
# Labels of all studies, and ten for each byte that the list has in the archive: a small file may say many, and each
# takes 85 bytes of memory.
MAX_LABELS = 1_000_000
REMEMBERED = 64  # texts
SECTIONS = ("findings", "impression")
TEXTS = (*SECTIONS, "report")
COLUMNS = ("study", "patient", "view", "split", *TEXTS)
# What a reason may say back: a number, or a view. Anything else may be a name, where cells are in the wrong columns.
QUOTED_NUMBER, QUOTED_VIEW = re.compile(r"[+-]?[\d.,]{1,12}"), re.compile(r"[A-Za-z ./-]{1,16}")


def read_manifest(files: Archive, name: str, headings: Headings) -> Iterator[Study | Reject]:
    """Studies of a manifest, in order of their first row.

    One row an image. Columns, in any case, of which all but ``image`` may be absent:

    * ``image``: the file below the archive's root, in a pack as ``pack.zip!/path`` (``list_places``);
    * ``study``, ``patient``: ids, else the image's and the study's; ``view``: PA, AP, frontal or lateral;
    * ``findings`` and ``impression``, or ``report``, whose sections are taken as MIMIC-CXR's are;
    * ``label:<class>``: 1, 0, -1 (uncertain) or blank; ``split``: train, valid or test, else train.

    Rows of a study say the same of it, or nothing: one whose rows contradict one another is rejected, and so are
    studies that claim the same image. Ids are NFC, whatever the list's form.

    Args:
        headings: of reports in another language than English.

    Raises:
        SourceError: the manifest is missing, damaged or without a column ``image``; a study is in two splits (a
            patient may be: public splits do that); or a split has lost all its rows.
    """
    _check_listed(files, name)
    reading = _Reading(files, name, Translation(headings))
    yield from reading.studies(manifest_rows(files, name))
    files.notes.extend(f"{name}: {said}" for said in reading.ignored())


def manifest_rows(files: Archive, name: str) -> Iterator[Row]:
    """The rows of a manifest as they are.

    Raises:
        SourceError: the manifest is missing, damaged or without a column ``image``.
    """
    _check_listed(files, name)
    if name.lower().endswith(".parquet"):
        yield from parquet_rows(files, name, ("image", *COLUMNS))
        return
    form = table_form(files.dataset, files.files, name, ["image"], COLUMNS)
    if form.encoding == "cp1252":
        files.notes.append(f"{name} is not UTF-8; read as cp1252 (Windows, western Europe)")
    yield from read_table(files.dataset, files.files, name, form)


def _check_listed(files: Archive, name: str) -> None:
    if why := dict(files.problems).get(posixpath.normpath(name)):
        raise SourceError(f"{files.dataset}: {files.files.root}/{name}: {why}")


@dataclass
class _Open:
    """What the rows of one study have said so far."""

    split: str = ""  # "" = none of them names one
    labels: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # findings and impression
    unread: bool = False  # there is a text without either
    views: dict[str, View] = field(default_factory=dict)  # by id
    rows: list[str] = field(default_factory=list)  # where they are
    wrong: str = ""


class _Reading:
    """One pass over a manifest."""

    def __init__(self, files: Archive, name: str, headings: Translation) -> None:
        self.files, self.headings = files, headings
        self.name = name
        self.at = f"{files.dataset}: {files.files.root}/{name}"
        self.places = Places(files)
        self.found: dict[tuple[str, str], _Open] = {}
        self.claims: dict[str, tuple[str, str]] = {}  # image -> patient and study
        # A small file may say a long text often; a few are remembered.
        self._clean, self._cut = lru_cache(REMEMBERED)(section_text), lru_cache(REMEMBERED)(sections)
        handle, size = files.files.stream(name)
        handle.close()
        self.cells, self.most_cells = 0, MAX_LABELS + 10 * size  # with labels
        self.classes: dict[str, str] | None = None  # of the columns label:
        self.patients: dict[str, str] = {}  # study -> its patient
        self.nameless: set[str] = set()  # studies of which a row named no patient before one did
        self.no_split = ""  # where the first row without a known one is
        self.others: dict[str, int] = {}  # columns that are not read -> labels in them, -1 = something else, too

    def studies(self, rows: Iterator[Row]) -> Iterator[Study | Reject]:
        dataset = self.files.dataset
        for row in rows:
            self.files.rows[self.name] += 1
            if why := self._take(row):
                yield Reject(dataset, row.where, "row", why)
        lost = [split for split in SPLITS if split not in {said.split or "train" for said in self.found.values()}]
        if self.no_split and lost:
            raise SourceError(
                f"{self.at}: {self.no_split}: split is none of {', '.join(SPLITS)}, blank, and no row is {lost[-1]}"
            )
        for (patient, study), said in self.found.items():
            if said.wrong:
                yield from (Reject(dataset, where, "row", said.wrong) for where in said.rows)
                continue
            findings, impression = said.texts.get("findings"), said.texts.get("impression")
            if said.unread and not said.texts:
                yield Reject(dataset, said.rows[0], "text", "no findings and no impression are found in its text")
            views = tuple(said.views.values())
            yield Study(dataset, patient, study, said.split or "train", views, findings, impression, said.labels)

    def _sections(self, cells: dict[str, str]) -> dict[str, str | None]:
        """What a row says in its columns of text: findings and impression, each None if there are no words."""
        found = {key: self._clean(cells[key]) for key in SECTIONS if cells.get(key)}
        if not any(found.values()) and cells.get("report"):
            found |= dict(zip(SECTIONS, self._cut(self.headings.english(cells["report"])), strict=True))
        return found

    def _take(self, row: Row) -> str:
        """Add a row to its study; why it cannot be, else ""."""
        if row.wrong:
            return row.wrong
        if self.classes is None:
            self.classes = self._classes_of(row.cells)
        # What pandas and R write for nothing says nothing, in any column.
        cells = {column: "" if cell.lower() in BLANKS else cell for column, cell in row.cells.items()}
        labels = dict[str, int]()
        for column, cell in cells.items():
            if (cls := self.classes.get(column)) is None:
                self._other(column, cell)
                continue
            try:
                value = parse_label(cell)
            except ValueError:
                name = column if len(column) <= LONGEST_NAME else shown(column)
                return f"{name}{_quoted(cell, QUOTED_NUMBER)} is none of 1, 0, -1, blank"
            if value is not None:
                labels[cls] = value
        self.cells += len(labels)
        if self.cells > self.most_cells:
            raise SourceError(f"{self.at}: more than {self.most_cells:,} labels; leave out columns, or rows")
        if any(len(cells.get(key, "")) > archive.MAX_REPORT for key in TEXTS):
            return "a text is too large to be a report"
        if not cells["image"]:
            return "no image is named"
        split = SPLIT_WORDS.get(cells.get("split", "").lower())  # "" where the cell is blank
        if split is None:
            self.no_split = self.no_split or row.where
            return f"split is none of {', '.join(SPLITS)}, blank"
        position = view_of(cells.get("view", ""))
        if position is None:
            return f"view{_quoted(cells['view'], QUOTED_VIEW)} is none of PA, AP, frontal, lateral, blank"
        for key in ("patient", "study"):
            if ROUNDED.fullmatch(cells.get(key, "")):
                return f"{key} is a number that a spreadsheet rounded; format the column as text and save it again"
        path, identity = self.places.of(cells["image"])
        study = normalize("NFC", cells.get("study", "")) or identity
        return self._add(self._ids(study, cells), split, labels, View(identity, position, path), cells, row.where)

    def _classes_of(self, cells: Iterable[str]) -> dict[str, str]:
        """Column -> class, of those that are labels."""
        found: dict[str, str] = {}
        for column in cells:
            kind, colon, cls = column.partition(":")
            if f"{kind.lower()}{colon}" == LABEL:
                name = normalize("NFC", cls.strip())
                if not name or name.casefold() in map(str.casefold, found.values()):
                    raise SourceError(f"{self.at}: column {shown(column)}: no class, or one that another column has")
                found[column] = name
        return found

    def _ids(self, study: str, cells: dict[str, str]) -> tuple[str, str]:
        """Patient and study of a row. One that names no patient is of whom another row of its study names."""
        patient = normalize("NFC", cells.get("patient", ""))
        if not cells.get("study"):
            return patient or study, study
        if not patient:
            self.nameless.add(study)
            return self.patients.get(study, study), study
        if self.patients.setdefault(study, patient) == patient and study in self.nameless:
            self.nameless.discard(study)
            if patient != study and (said := self.found.pop((study, study), None)) is not None:
                self.found[patient, study] = said
                self.claims.update(dict.fromkeys(said.views, (patient, study)))
        return patient, study

    def _add(
        self, ids: tuple[str, str], split: str, labels: dict[str, int], view: View, cells: dict[str, str], where: str
    ) -> str:
        said = self.found.setdefault(ids, _Open())
        if split and said.split not in ("", split):
            raise SourceError(f"{self.at}: {where}: its study is in two splits")
        said.split = said.split or split
        said.rows.append(where)
        before = said.views.setdefault(view.id, view)
        if before.path != view.path:
            raise SourceError(
                f"{self.at}: {where}: {shown(before.path)} and {shown(view.path)} are one name in two Unicode forms; "
                "rename one of the files"
            )
        if not before.position:
            said.views[view.id] = view
        elif view.position not in ("", before.position):
            said.wrong = said.wrong or "rows of one image name two views"
        owner = self.claims.setdefault(view.id, ids)
        if owner != ids:
            said.wrong = self.found[owner].wrong = "its image is listed for another study, too"
        for cls, value in labels.items():
            if said.labels.setdefault(cls, value) != value:
                said.wrong = said.wrong or f"rows of one study have two values of {LABEL}{cls[:LONGEST_NAME]}"
        for key, text in self._sections(cells).items():
            if text is None:
                said.unread = True
            elif said.texts.setdefault(key, text) != text:
                said.wrong = said.wrong or f"rows of one study have two texts ({key})"
        return ""

    def _other(self, column: str, cell: str) -> None:
        """Look at a cell of a column that is not read."""
        if column in ("image", *COLUMNS) or self.others.get(column, 0) < 0:
            return
        try:
            self.others[column] = self.others.get(column, 0) + (parse_label(cell) is not None)
        except ValueError:
            self.others[column] = -1

    def ignored(self) -> Iterator[str]:
        """What whoever wrote the list should know of columns that are not read."""
        for column, labels in self.others.items():
            if labels > 0:
                yield f"column {shown(column)} is not read; if it is a label, name it {shown(LABEL + column)}"
            else:
                yield f"column {shown(column)} is not read{hint(column.lower(), COLUMNS)}"


@lru_cache(maxsize=4096)
def view_of(said: str) -> str | None:
    """The position that a list's words name, or ``None``: ``AP SUPINE``, ``postero-anterior``, ``L``, ``Frontal``."""
    words = " ".join(re.sub(r"[^A-Z]+", " ", BESIDE.sub(" ", said.upper().replace("_", " "))).split())
    found = VIEW_WORDS.get(words)
    return VIEW_WORDS.get(words.replace("FRONTAL", "").strip()) if found is None else found  # "Frontal AP"


def _quoted(cell: str, form: re.Pattern[str]) -> str:
    """A value as a reason may say it."""
    return f" {cell!r}" if form.fullmatch(cell) else ""
