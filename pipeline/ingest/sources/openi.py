"""Open-I, the Indiana University chest X-ray collection (Demner-Fushman et al. 2016)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pipeline.datasets import facts
from pipeline.ingest.report_sections import clean_text
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.ingest.sources.named_images import images_by_stem
from pipeline.ingest.sources.tables import table_rows
from pipeline.storage.files import FilesError, Gone, base_name
from pipeline.study import Reject, Study, View

# One image is CXR1_1_IM-0001-3001 in the reports, 1_IM-0001-3001.dcm in the DICOM archive and
# 1_IM-0001-3001.dcm.png in the csv that says which images are frontal: this much of it they share.
IMAGE_ID = re.compile(r"(\d+)_IM-\d[\d-]*")
# The csv says no more than Frontal; the collection's captions call its frontal images PA.
PROJECTIONS = {"FRONTAL": "PA", "LATERAL": "LATERAL"}
HELD = 0.2  # share of the reports for validation and test, where there is a training split


def read_openi(files: Archive, split: str = "paper") -> Iterator[Study | Reject]:
    """One study a report that has findings or impression and at least one image.

    Reports are XML files, loose or in ``NLMCXR_reports.tgz``. A view's position comes from ``indiana_projections.csv``
    where that is there; ingest fills it from a DICOM's own header otherwise.

    Args:
        split: ``paper``: all are test (paper Table 1). ``patient``: 80 / 10 / 10 over all reports, usable or not; the
            archive names no patients, so that a report with all its images counts as one.

    Raises:
        SourceError: the reports are missing.
    """
    position: dict[str, str] = {}
    projections = archive.find_table(files, ["indiana_projections.csv"])
    if projections:
        for row in table_rows(files, projections, ["filename", "projection"]):
            position[_image_key(row["filename"])] = PROJECTIONS.get(row["projection"].upper(), "")
    on_disk: dict[str, str] = {}
    for stem, path in images_by_stem(files).items():
        on_disk.setdefault(_image_key(stem), path)
    reports = sorted((name for name in files.names if name.endswith(".xml")), key=lambda name: _number(base_name(name)))
    if not reports:
        damaged = [name for name, _ in files.problems if "reports" in name]
        raise archive.SourceError(
            f"{files.dataset}: no report (*.xml) below {files.files.root}, loose or in NLMCXR_reports.tgz"
            f"{' (it is damaged: download it again)' if damaged else ''}. To get them: {facts('openi').access}"
        )
    units = list(dict.fromkeys(map(base_name, reports)))  # a report may be there twice, loose and packed
    sides = archive.train_valid_test(len(units), HELD) if split == "patient" else ["test"] * len(units)
    side = dict(zip(units, sides, strict=True))
    for name in reports:
        try:
            study = _study(
                files.dataset, base_name(name), side[base_name(name)], files.files.read(name, archive.MAX_REPORT)
            )
        except Gone:
            raise
        except FilesError as error:
            yield Reject(files.dataset, base_name(name), "study", f"report: {error}")
            continue
        if isinstance(study, Study):
            keys = [_image_key(view.id) for view in study.views]
            study = study.with_views(
                View(id=view.id, position=position.get(key, ""), path=on_disk.get(key, ""))
                for view, key in zip(study.views, keys, strict=True)
            )
        yield study


def _study(dataset: str, name: str, side: str, content: bytes) -> Study | Reject:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        tree: Any = fromstring(content, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, LookupError):  # the last: an encoding nobody knows
        return Reject(dataset, name, "study", "report is not well-formed XML")
    text: dict[str, str | None] = {}
    for element in tree.iter("AbstractText"):
        label = element.get("Label", "").upper()
        if label in ("FINDINGS", "IMPRESSION") and label not in text:  # others may be in one another, a thousand deep
            text[label] = clean_text("".join(element.itertext()))
    findings, impression = text.get("FINDINGS"), text.get("IMPRESSION")
    if findings is None and impression is None:
        return Reject(dataset, name, "study", "neither findings nor impression")
    images = dict.fromkeys(element.get("id", "") for element in tree.iter("parentImage"))
    views = tuple(View(id=image) for image in images if image)
    if not views:
        return Reject(dataset, name, "study", "the report lists no image")
    report = f"CXR{PurePosixPath(name).stem}"
    return Study(dataset, report, report, side, views, findings, impression)


def _number(name: str) -> tuple[int, str]:
    """Sort key: 2.xml before 10.xml."""
    stem = PurePosixPath(name).stem
    digits = stem.lstrip("0")  # of any length: Python makes no number of more than 4,300
    return (len(digits), digits) if stem.isdecimal() else (-1, stem)


def _image_key(name: str) -> str:
    match = IMAGE_ID.search(name)
    return match.group(0) if match else PurePosixPath(name).stem
