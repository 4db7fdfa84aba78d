"""SIIM-ACR Pneumothorax Segmentation (Kaggle 2019)."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.datasets import facts
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.ingest.sources.named_images import images_by_stem
from pipeline.ingest.sources.tables import image_rows
from pipeline.study import Reject, Study, View

# The challenge's stage 2 list (12,047 images) under the names it is found by; the paper's counts are of that one.
FILES = ("stage_2_train.csv", "train-rle.csv", "siim-pneumothorax-train-rle.csv", "siim-train-rle.csv")
(PNEUMOTHORAX,) = facts("siim").classes


def read_siim(files: Archive) -> Iterator[Study | Reject]:
    """One study an image, split 70 / 15 / 15 by image (paper Table 1 prints 8,422 / 1,808 / 1,807; it is 8,432).

    The mask file has one row a mask, so positive images may have several: splitting rows would put an image on both
    sides. An image is positive for Pneumothorax where its run-length mask is not ``-1``.

    Raises:
        SourceError: the mask file is missing.
    """
    file = archive.required_table(files, FILES)
    positive: dict[str, int] = {}
    for row in image_rows(files, file, ["ImageId", "EncodedPixels"]):
        mask = row["EncodedPixels"]
        if mask == "-1" or (mask and all(number.isdecimal() for number in mask.split())):
            positive[row["ImageId"]] = max(positive.get(row["ImageId"], 0), int(mask != "-1"))
        else:
            yield Reject("siim", row["ImageId"], "row", "EncodedPixels is neither -1 nor run lengths")
    on_disk = images_by_stem(files)
    ids = sorted(positive)
    for image, split in zip(ids, archive.train_valid_test(len(ids)), strict=True):
        view = View(id=image, path=on_disk.get(image, ""))
        yield Study("siim", image, image, split, (view,), labels={PNEUMOTHORAX: positive[image]})
