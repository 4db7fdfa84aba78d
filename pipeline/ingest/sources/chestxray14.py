"""ChestX-ray14 (Wang et al. 2017; NIH Clinical Center)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from pipeline.datasets import facts
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive, SourceError
from pipeline.ingest.sources.named_images import images_by_stem
from pipeline.ingest.sources.tables import image_rows, whole_number
from pipeline.storage.files import base_name, decode_text
from pipeline.study import Reject, Study, View

NAMES = {"Effusion": "Pleural Effusion", "Pleural_Thickening": "Pleural Thickening"}  # archive -> ours
CHESTXRAY14_CLASSES = facts("chestxray14").classes
LISTS = ("train_val_list.txt", "test_list.txt")
VALID = 0.1  # share of the patients of the first list


def read_chestxray14(files: Archive, split: str = "paper") -> Iterator[Study | Reject]:
    """One study an image, split 80 / 20 over the whole archive. All 14 classes are 1 or 0.

    Args:
        split: ``paper``: by image, as the paper's counts (Table 1) demand; 7,977 patients then stand on both sides.
            ``patient``: by patient (90,057 / 22,063 images). ``official``: the owner's lists, which are by patient:
            test_list.txt (25,596 images) is the test set, a tenth of the patients of train_val_list.txt (86,524
            images) the validation set.

    Raises:
        SourceError: Data_Entry_2017*.csv or an official list is missing, or the lists have an image in common.
    """
    file = archive.required_table(files, ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"])
    columns = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    rows = [{**row, "Patient ID": whole_number(row["Patient ID"])} for row in image_rows(files, file, columns)]
    on_disk = images_by_stem(files)
    unit = "Image Index" if split == "paper" else "Patient ID"
    listed = _official(files) if split == "official" else {}
    # The file is sorted by patient, then image.
    units = list(dict.fromkeys(row[unit] for row in rows if listed.get(row["Image Index"]) != "test"))
    side = dict(zip(units, archive.train_valid(len(units), VALID if listed else 0.2), strict=True))
    for row in rows:
        found = {NAMES.get(name, name) for name in row["Finding Labels"].split("|")} - {"No Finding"}
        if not found <= set(CHESTXRAY14_CLASSES):
            yield Reject(files.dataset, row["Image Index"], "row", "a finding label is none of the 14 or No Finding")
            continue
        if listed and row["Image Index"] not in listed:
            yield Reject(files.dataset, row["Image Index"], "row", "the image is in neither of the official lists")
            continue
        name = PurePosixPath(row["Image Index"]).stem
        position = row["View Position"] if row["View Position"] in ("PA", "AP") else ""
        labels = {c: int(c in found) for c in CHESTXRAY14_CLASSES}
        view = View(id=name, position=position, path=on_disk.get(name, ""))
        part = "test" if listed.get(row["Image Index"]) == "test" else side[row[unit]]
        yield Study(files.dataset, row["Patient ID"], name, part, (view,), labels=labels)


def _official(files: Archive) -> dict[str, str]:
    """Image -> ``train`` or ``test``, as the two lists say."""
    found: dict[str, str] = {}
    for name, part in zip(LISTS, ("train", "test"), strict=True):
        paths = sorted((n for n in files.names if base_name(n) == name), key=lambda n: (n.count("/"), n))
        if not paths:
            raise SourceError(
                f"{files.dataset}: official list {name} not found below {files.files.root}. "
                f"To get it: {facts('chestxray14').access}; or set split: paper"
            )
        images = decode_text(archive.content(files, paths[0])).split()
        if both := found.keys() & set(images):
            raise SourceError(
                f"{files.dataset}: {files.files.root}/{paths[0]}: {len(both)} of its images are in {LISTS[0]}, too; "
                "download both lists again"
            )
        found |= dict.fromkeys(images, part)
    return found
