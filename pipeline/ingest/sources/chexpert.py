"""CheXpert (Irvin et al. 2019) and CheXpert5x200 (Huang et al. 2021, GLoRIA), which is its test split here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.datasets import facts
from pipeline.ingest.report_sections import clean_text
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.ingest.sources.named_images import images_by
from pipeline.ingest.sources.tables import image_rows, parse_label, read_rows, table_rows
from pipeline.storage.files import Files
from pipeline.study import Reject, Study, View

CHEXPERT_CLASSES = facts("chexpert").classes
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
PER_CLASS = 200  # images
LIST = "chexpert_5x200.csv"
PLUS = re.compile(r"(^|/)df_chexpert_plus_[^/]*\.csv(\.gz)?$")


@dataclass(frozen=True)
class _Row:
    key: str  # patient00001/study1/view1_frontal: what an image is called in every download
    patient: str
    study: str
    position: str
    labels: dict[str, int]

    @property
    def view(self) -> str:
        return PurePosixPath(self.key).name


@dataclass(frozen=True)
class _Sections:
    findings: str | None = None
    impression: str | None = None


def read_chexpert(files: Archive, list_5x200: str, seed: int) -> Iterator[Study | Reject]:
    """Train studies without the patients of CheXpert5x200, the valid studies, and CheXpert5x200, one image a study.

    Labels are taken as they are: 1, 0, -1; blank is not mentioned. Test studies carry five labels. Findings and
    impression come from CheXpert Plus (``df_chexpert_plus_*.csv``) if that is in the archive; the impression of a
    test study from the CheXpert5x200 list first. Images may be in ``train``/``valid``, in the folders or zip files of
    the batches ("CheXpert-v1.0 batch 2 (train 1)" ...) or in CheXpert-v1.0-small.

    Args:
        list_5x200: a list that is not in the archive ("" = none).

    Raises:
        SourceError: a label file or a given CheXpert5x200 list is missing.
    """
    tables = {split: archive.required_table(files, [f"{split}.csv"]) for split in ("train", "valid")}
    listed = find_list(files, list_5x200)
    on_disk = images_by(files, _key)
    train: list[_Row] = []
    for row in _rows(files, tables["train"]):
        if isinstance(row, Reject):
            yield row
        else:
            train.append(row)
    sections = _plus(files)
    test: list[tuple[_Row, str | None]] = []
    if listed is None:
        test += [(row, None) for row in draw_5x200(train, seed)]
    else:
        known = {row.key: row for row in train}
        for item in _list_rows(*listed, known):
            if isinstance(item, Reject):
                yield item
            else:
                test.append(item)
    held_out = {row.patient for row, _ in test}
    yield from _studies((row for row in train if row.patient not in held_out), "train", on_disk, sections)
    valid = []
    for row in _rows(files, tables["valid"]):
        if isinstance(row, Reject):
            yield row
        else:
            valid.append(row)
    yield from _studies(valid, "valid", on_disk, sections)
    for row, impression in test:
        labels = {name: row.labels.get(name, 0) for name in FIVE}
        view = View(id=row.view, position=row.position, path=on_disk.get(row.key, ""))
        impression = impression or sections.get((row.patient, row.study), _Sections()).impression
        yield Study(
            "chexpert", row.patient, f"{row.study}_{row.view}", "test", (view,), impression=impression, labels=labels
        )


def find_list(files: Archive, list_5x200: str) -> tuple[Files, str] | None:
    """The CheXpert5x200 list, as a file among others, or ``None`` where the user has none.

    Raises:
        SourceError: ``sources.chexpert.list_5x200`` names a file that does not exist.
    """
    if not list_5x200:
        name = archive.find_table(files, [LIST])
        return None if name is None else (files.files, name)
    place = Path(list_5x200)
    if not place.is_file():
        raise archive.SourceError(
            f"chexpert: sources.chexpert.list_5x200 {list_5x200} not found; leave it empty to draw a list"
        )
    return Files(str(place.parent), files.files.cache, follow_links=True), place.name


def draw_5x200(train: list[_Row], seed: int) -> list[_Row]:
    """A list by CheXpert5x200's rule: for each of the five classes 200 frontal images on which it alone of the five is
    positive and none of the others uncertain. Fewer where there are fewer than 800 such images: at most a quarter of
    them is taken, so that a small archive keeps patients to train on.
    """
    drawn = []
    for number, name in enumerate(FIVE):
        others = [other for other in FIVE if other != name]
        pool = [
            row
            for row in train
            if row.labels.get(name) == 1
            and not any(row.labels.get(other, 0) for other in others)
            and "_frontal" in row.view
        ]
        size = min(PER_CLASS, -(-len(pool) // 4))
        chosen = np.random.default_rng([seed, number]).permutation(len(pool))[:size]
        drawn += [pool[i] for i in sorted(chosen.tolist())]
    return drawn


def _rows(files: Archive, table: str) -> Iterator[_Row | Reject]:
    for cells in image_rows(files, table, ["Path", "Frontal/Lateral", "AP/PA", *CHEXPERT_CLASSES]):
        row = _row(cells, CHEXPERT_CLASSES)
        if isinstance(row, _Row):
            position = cells["AP/PA"].upper() if cells["AP/PA"].upper() in ("AP", "PA") else ""
            lateral = cells["Frontal/Lateral"].lower() == "lateral"
            row = _Row(row.key, row.patient, row.study, "LATERAL" if lateral else position, row.labels)
        yield row


def _list_rows(files: Files, name: str, known: dict[str, _Row]) -> Iterator[tuple[_Row, str | None] | Reject]:
    for cells in read_rows("chexpert", files, name, ["Path", *FIVE]):
        row = _row(cells, FIVE)
        if isinstance(row, Reject):
            yield row
        elif list(row.labels.values()).count(1) != 1:
            yield Reject("chexpert", row.key, "row", "not exclusively positive for one of the five classes")
        else:
            position = known[row.key].position if row.key in known else ""
            said = clean_text(cells.get("Report Impression", ""))
            yield _Row(row.key, row.patient, row.study, position, row.labels), said


def _row(cells: dict[str, str], classes: tuple[str, ...]) -> _Row | Reject:
    """A row's image and labels. The path's head, ``CheXpert-v1.0-small/train/`` or so, depends on the download."""
    path = cells["Path"].replace("\\", "/")
    parts = PurePosixPath(path).parts
    if len(parts) < 3 or not parts[-3].startswith("patient") or ".." in parts:
        return Reject("chexpert", path, "row", "path is not .../patient*/study*/view*")
    key = _key(path)
    labels = {}
    for name in classes:
        try:
            value = parse_label(cells[name])
        except ValueError:
            return Reject("chexpert", key, "row", f"label of {name} is none of 1, 0, -1, blank")
        if value is not None:
            labels[name] = value
    return _Row(key, parts[-3], parts[-2], "", labels)


def _key(name: str) -> str:
    return str(PurePosixPath(*PurePosixPath(name).parts[-3:]).with_suffix(""))


def _plus(files: Archive) -> dict[tuple[str, str], _Sections]:
    """(patient, study) -> report sections of CheXpert Plus (Chambon et al. 2024), empty without its csv file."""
    names = [name for name in files.names if PLUS.search(name)]
    found: dict[tuple[str, str], _Sections] = {}
    for name in names[:1]:
        for cells in table_rows(files, name, ["path_to_image", "section_findings", "section_impression"]):
            parts = PurePosixPath(cells["path_to_image"].replace("\\", "/")).parts
            if len(parts) >= 3 and (parts[-3], parts[-2]) not in found:
                said = _Sections(clean_text(cells["section_findings"]), clean_text(cells["section_impression"]))
                found[parts[-3], parts[-2]] = said
    return found


def _studies(
    rows: Iterator[_Row] | list[_Row], split: str, on_disk: dict[str, str], sections: dict[tuple[str, str], _Sections]
) -> Iterator[Study]:
    """Views of one examination, which share their labels, as one study."""
    studies: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        studies.setdefault((row.patient, row.study), []).append(row)
    for (patient, study), members in studies.items():
        views = tuple(View(id=row.view, position=row.position, path=on_disk.get(row.key, "")) for row in members)
        said = sections.get((patient, study), _Sections())
        yield Study("chexpert", patient, study, split, views, said.findings, said.impression, labels=members[0].labels)
