"""CheXpert (Irvin et al. 2019) and CheXpert5x200 (Huang et al. 2021, GLoRIA), which is its test split here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from pipeline.params import Source
from pipeline.reports import clean
from pipeline.sources import archive
from pipeline.study import Reject, Study, View

CLASSES = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
PER_CLASS = 200  # images
LIST = "chexpert_5x200.csv"


@dataclass(frozen=True)
class _Row:
    path: str  # below the archive root: train/patient00001/study1/view1_frontal.jpg
    patient: str
    study: str
    position: str
    labels: dict[str, int]


def read_chexpert(source: Source, seed: int) -> Iterator[Study | Reject]:
    """Train studies without the patients of CheXpert5x200, the valid studies, and CheXpert5x200, one image a study.

    Labels are taken as they are: 1, 0, -1; blank is not mentioned. Test studies carry five labels and the impression.

    Raises:
        SourceError: the archive folder, a label file or a given CheXpert5x200 list is missing.
    """
    root = archive.root("chexpert", source.path)
    files = {split: archive.table("chexpert", root, [f"{split}.csv"]) for split in ("train", "valid")}
    listed = list_file(source)
    on_disk = set(archive.images(root))
    train: list[_Row] = []
    for row in _rows(files["train"]):
        if isinstance(row, Reject):
            yield row
        else:
            train.append(row)
    test: list[tuple[_Row, str | None]] = []
    if listed is None:
        test += [(row, None) for row in draw_5x200(train, seed)]
    else:
        known = {row.path: row for row in train}
        for item in _list_rows(listed, known):
            if isinstance(item, Reject):
                yield item
            else:
                test.append(item)
    held_out = {row.patient for row, _ in test}
    yield from _studies((row for row in train if row.patient not in held_out), "train", on_disk)
    valid = []
    for row in _rows(files["valid"]):
        if isinstance(row, Reject):
            yield row
        else:
            valid.append(row)
    yield from _studies(valid, "valid", on_disk)
    for row, impression in test:
        labels = {name: row.labels.get(name, 0) for name in FIVE}
        name = PurePosixPath(row.path).stem
        view = View(id=name, position=row.position, path=row.path if row.path in on_disk else "")
        yield Study(
            "chexpert", row.patient, f"{row.study}_{name}", "test", (view,), impression=impression, labels=labels
        )


def list_file(source: Source) -> Path | None:
    """The CheXpert5x200 list, or ``None`` where the user has none.

    Raises:
        SourceError: ``sources.chexpert.list_5x200`` names a file that does not exist.
    """
    if not source.list_5x200:
        return archive.find_table(Path(source.path), [LIST])
    if not Path(source.list_5x200).is_file():
        raise archive.SourceError(
            f"chexpert: sources.chexpert.list_5x200 {source.list_5x200} not found; leave it empty to draw a list"
        )
    return Path(source.list_5x200)


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
            and "_frontal" in PurePosixPath(row.path).stem
        ]
        size = min(PER_CLASS, -(-len(pool) // 4))
        chosen = np.random.default_rng([seed, number]).permutation(len(pool))[:size]
        drawn += [pool[i] for i in sorted(chosen.tolist())]
    return drawn


def _rows(file: Path) -> Iterator[_Row | Reject]:
    for cells in archive.rows("chexpert", file, ["Path", "Frontal/Lateral", "AP/PA", *CLASSES]):
        row = _row(cells, CLASSES)
        if isinstance(row, _Row):
            position = cells["AP/PA"].upper() if cells["AP/PA"].upper() in ("AP", "PA") else ""
            lateral = cells["Frontal/Lateral"].lower() == "lateral"
            row = _Row(row.path, row.patient, row.study, "LATERAL" if lateral else position, row.labels)
        yield row


def _list_rows(file: Path, known: dict[str, _Row]) -> Iterator[tuple[_Row, str | None] | Reject]:
    for cells in archive.rows("chexpert", file, ["Path", "Report Impression", *FIVE]):
        row = _row(cells, FIVE)
        if isinstance(row, Reject):
            yield row
        elif list(row.labels.values()).count(1) != 1:
            yield Reject("chexpert", row.path, "row", "not exclusively positive for one of the five classes")
        else:
            position = known[row.path].position if row.path in known else ""
            yield _Row(row.path, row.patient, row.study, position, row.labels), clean(cells["Report Impression"])


def _row(cells: dict[str, str], classes: tuple[str, ...]) -> _Row | Reject:
    """A row's path and labels. The path's head, ``CheXpert-v1.0-small/`` or whatever, depends on the download."""
    parts = PurePosixPath(cells["Path"]).parts
    if len(parts) < 4 or not parts[-3].startswith("patient") or ".." in parts:
        return Reject("chexpert", cells["Path"], "row", "path is not .../<split>/patient*/study*/view*")
    path = "/".join(parts[-4:])
    labels = {}
    for name in classes:
        try:
            value = archive.label(cells[name])
        except ValueError:
            return Reject("chexpert", path, "row", f"label of {name} is none of 1, 0, -1, blank")
        if value is not None:
            labels[name] = value
    return _Row(path, parts[-3], parts[-2], "", labels)


def _studies(rows: Iterator[_Row] | list[_Row], split: str, on_disk: set[str]) -> Iterator[Study]:
    """Views of one examination, which share their labels, as one study."""
    studies: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        studies.setdefault((row.patient, row.study), []).append(row)
    for (patient, study), members in studies.items():
        views = tuple(
            View(id=PurePosixPath(row.path).stem, position=row.position, path=row.path if row.path in on_disk else "")
            for row in members
        )
        yield Study("chexpert", patient, study, split, views, labels=members[0].labels)
