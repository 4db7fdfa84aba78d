"""ChestX-ray14 (Wang et al. 2017; NIH Clinical Center)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipeline.sources import archive
from pipeline.sources.archive import Archive
from pipeline.study import Reject, Study, View

NAMES = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Thickening"}  # archive -> ours
CLASSES = (
    "Atelectasis", "Cardiomegaly", "Pleural Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural Thickening", "Hernia",
)  # fmt: skip


def read_chestxray14(files: Archive, split: str = "paper") -> Iterator[Study | Reject]:
    """One study an image, split 80 / 20 over the whole archive. All 14 classes are 1 or 0.

    Args:
        split: ``paper``: by image, as the paper's counts (Table 1) demand; 7,977 patients then stand on both sides.
            ``patient``: by patient (90,057 / 22,063 images).

    Raises:
        SourceError: Data_Entry_2017*.csv is missing.
    """
    file = archive.table(files, ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"])
    columns = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    rows = list(archive.rows(files, file, columns))
    on_disk = archive.by_stem(files.images)
    unit = "Patient ID" if split == "patient" else "Image Index"
    units = list(dict.fromkeys(row[unit] for row in rows))  # the file is sorted by patient, then image
    side = dict(zip(units, archive.train_valid(len(units)), strict=True))
    for row in rows:
        found = {NAMES.get(name, name) for name in row["Finding Labels"].split("|")} - {"No Finding"}
        if not found <= set(CLASSES):
            yield Reject("chestxray14", row["Image Index"], "row", "a finding label is none of the 14 or No Finding")
            continue
        name = PurePosixPath(row["Image Index"]).stem
        position = row["View Position"] if row["View Position"] in ("PA", "AP") else ""
        labels = {c: int(c in found) for c in CLASSES}
        view = View(id=name, position=position, path=on_disk.get(name, ""))
        yield Study("chestxray14", row["Patient ID"], name, side[row[unit]], (view,), labels=labels)
