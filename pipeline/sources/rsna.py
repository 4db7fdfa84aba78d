"""RSNA Pneumonia Detection Challenge, stage 2 (Shih et al. 2019; Kaggle)."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.params import Source
from pipeline.sources import archive
from pipeline.study import Reject, Study, View


def read_rsna(source: Source) -> Iterator[Study | Reject]:
    """One study an image of the labelled (train) part, split 70 / 15 / 15 (paper Table 1: 18,678 / 4,003 / 4,003).

    The label file has one row a box; an image is positive for Pneumonia where ``Target`` is 1. The challenge's
    ``patientId`` identifies an image, not a person.

    Raises:
        SourceError: the archive folder or stage_2_train_labels.csv is missing.
    """
    root = archive.root("rsna", source.path)
    file = archive.table("rsna", root, ["stage_2_train_labels.csv"])
    targets: dict[str, int] = {}
    for row in archive.rows("rsna", file, ["patientId", "Target"]):
        if row["Target"] in ("0", "1"):
            targets[row["patientId"]] = max(targets.get(row["patientId"], 0), int(row["Target"]))
        else:
            yield Reject("rsna", row["patientId"], "row", "Target is neither 1 nor 0")
    on_disk = archive.by_stem(archive.images(root))
    ids = sorted(targets)
    for image, split in zip(ids, archive.train_valid_test(len(ids)), strict=True):
        view = View(id=image, path=on_disk.get(image, ""))
        yield Study("rsna", image, image, split, (view,), labels={"Pneumonia": targets[image]})
