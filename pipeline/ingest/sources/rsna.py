"""RSNA Pneumonia Detection Challenge, stage 2 (Shih et al. 2019; Kaggle)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pipeline.datasets import facts
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.ingest.sources.named_images import images_by_stem
from pipeline.ingest.sources.tables import image_rows, parse_label
from pipeline.storage.files import base_name
from pipeline.study import Reject, Study, View

(PNEUMONIA,) = facts("rsna").classes
MAPPINGS = "pneumonia-challenge-dataset-mappings_2018.json"


def read_rsna(files: Archive, split: str = "paper") -> Iterator[Study | Reject]:
    """One study an image of the labelled (train) part, split 70 / 15 / 15.

    The label file has one row a box; an image is positive for Pneumonia where ``Target`` is 1. The challenge's
    ``patientId`` identifies an image, not a person; the person is known through the image's name in ChestX-ray14, which
    the RSNA's published file of mappings gives.

    Args:
        split: ``paper``: by image (paper Table 1: 18,678 / 4,003 / 4,003). ``patient``: by ChestX-ray14's patient.

    Raises:
        SourceError: stage_2_train_labels.csv is missing, or, to split by patient, the file of mappings.
    """
    file = archive.required_table(files, ["stage_2_train_labels.csv"])
    targets: dict[str, int] = {}
    for row in image_rows(files, file, ["patientId", "Target"]):
        try:
            target = parse_label(row["Target"])
        except ValueError:
            target = None
        if target in (0, 1):
            targets[row["patientId"]] = max(targets.get(row["patientId"], 0), target)
        else:
            yield Reject("rsna", row["patientId"], "row", "Target is neither 1 nor 0")
    on_disk = images_by_stem(files)
    ids = sorted(targets)
    person = _patients(files) if split == "patient" else {}
    units = sorted({person.get(image, image) for image in ids}) if person else ids
    side = dict(zip(units, archive.train_valid_test(len(units)), strict=True))
    for image in ids:
        own = person.get(image, image)
        view = View(id=image, path=on_disk.get(image, ""))
        yield Study("rsna", own, image, side[own], (view,), labels={PNEUMONIA: targets[image]})


def _patients(files: Archive) -> dict[str, str]:
    """RSNA image -> ChestX-ray14 patient, "nih" and five digits or more."""
    name = next((n for n in files.names if base_name(n) == MAPPINGS), None)
    if name is None:
        raise archive.SourceError(
            f"rsna: sources.rsna.split: patient needs {MAPPINGS} below {files.files.root}; the RSNA publishes it on "
            "its page of the Pneumonia Detection Challenge 2018"
        )
    try:
        entries = json.loads(archive.content(files, name))
        return {entry["subset_img_id"]: f"nih{int(entry['img_id'].partition('_')[0])}" for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise archive.SourceError(
            f"rsna: {files.files.root}/{name}: damaged ({type(error).__name__}); download it again"
        ) from None
