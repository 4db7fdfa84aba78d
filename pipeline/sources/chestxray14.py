"""ChestX-ray14 (Wang et al. 2017; NIH Clinical Center)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipeline.params import Source
from pipeline.sources import archive
from pipeline.study import Reject, Study, View

NAMES = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Thickening"}  # archive -> ours
CLASSES = (
    "Atelectasis", "Cardiomegaly", "Pleural Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
    "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural Thickening", "Hernia",
)  # fmt: skip


def read_chestxray14(source: Source) -> Iterator[Study | Reject]:
    """One study an image, split 80 / 20 by image over the whole archive, as the paper's counts (Table 1) demand.

    The split shares patients between train and valid: it is the paper's, not a clean one. All 14 classes are 1 or 0.

    Raises:
        SourceError: the archive folder or Data_Entry_2017*.csv is missing.
    """
    root = archive.root("chestxray14", source.path)
    file = archive.table("chestxray14", root, ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"])
    columns = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    rows = list(archive.rows("chestxray14", file, columns))
    on_disk = archive.by_stem(archive.images(root))
    for row, split in zip(rows, archive.train_valid(len(rows)), strict=True):
        found = {NAMES.get(name, name) for name in row["Finding Labels"].split("|")} - {"No Finding"}
        if not found <= set(CLASSES):
            yield Reject("chestxray14", row["Image Index"], "row", "a finding label is none of the 14 or No Finding")
            continue
        name = PurePosixPath(row["Image Index"]).stem
        position = row["View Position"] if row["View Position"] in ("PA", "AP") else ""
        labels = {c: int(c in found) for c in CLASSES}
        view = View(id=name, position=position, path=on_disk.get(name, ""))
        yield Study("chestxray14", row["Patient ID"], name, split, (view,), labels=labels)
