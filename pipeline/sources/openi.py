"""Open-I, the Indiana University chest X-ray collection (Demner-Fushman et al. 2016)."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.params import Source
from pipeline.reports import clean
from pipeline.sources import archive
from pipeline.study import Reject, Study, View

MAX_REPORT = 1 << 20  # bytes; the real ones are 10 kB
# One image is CXR1_1_IM-0001-3001 in the reports, 1_IM-0001-3001.dcm in the DICOM archive and
# 1_IM-0001-3001.dcm.png in the csv that says which images are frontal: this much of it they share.
IMAGE_ID = re.compile(r"(\d+)_IM-\d[\d-]*")
# The csv says no more than Frontal; the collection's captions call its frontal images PA.
PROJECTIONS = {"FRONTAL": "PA", "LATERAL": "LATERAL"}


def read_openi(source: Source) -> Iterator[Study | Reject]:
    """One study a report that has findings or impression and at least one image; all are test (paper Table 1).

    Reports are read from a folder of XML files or, in place, from ``NLMCXR_reports.tgz``. A view's position comes from
    ``indiana_projections.csv`` where that is there; ingest fills it from a DICOM's own ViewPosition otherwise.

    Raises:
        SourceError: the archive folder or the reports are missing, or the tgz is damaged.
    """
    root = archive.root("openi", source.path)
    position: dict[str, str] = {}
    projections = archive.find_table(root, ["indiana_projections.csv"])
    if projections:
        for row in archive.rows("openi", projections, ["filename", "projection"]):
            position[_image_key(row["filename"])] = PROJECTIONS.get(row["projection"].upper(), "")
    on_disk: dict[str, str] = {}
    for stem, path in archive.by_stem(archive.images(root)).items():
        on_disk.setdefault(_image_key(stem), path)
    for name, content in sorted(_reports(root), key=lambda report: _number(report[0])):
        study = _study(name, content)
        if isinstance(study, Study):
            keys = [_image_key(view.id) for view in study.views]
            study = study.with_views(
                View(id=view.id, position=position.get(key, ""), path=on_disk.get(key, ""))
                for view, key in zip(study.views, keys, strict=True)
            )
        yield study


def _study(name: str, content: bytes) -> Study | Reject:
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        tree: Any = fromstring(content, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError):
        return Reject("openi", name, "study", "report is not well-formed XML")
    text: dict[str, str | None] = {}
    for element in tree.iter("AbstractText"):
        text.setdefault(element.get("Label", "").upper(), clean("".join(element.itertext())))
    findings, impression = text.get("FINDINGS"), text.get("IMPRESSION")
    if findings is None and impression is None:
        return Reject("openi", name, "study", "neither findings nor impression")
    images = dict.fromkeys(element.get("id", "") for element in tree.iter("parentImage"))
    views = tuple(View(id=image) for image in images if image)
    if not views:
        return Reject("openi", name, "study", "the report lists no image")
    report = f"CXR{PurePosixPath(name).stem}"
    return Study("openi", report, report, "test", views, findings, impression)


def _reports(root: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of every report."""
    folder = root / "ecgen-radiology" if (root / "ecgen-radiology").is_dir() else root
    files = list(folder.glob("*.xml"))
    if files:
        for file in files:
            yield file.name, file.read_bytes() if file.stat().st_size <= MAX_REPORT else b""
        return
    packed = next((root / n for n in ("NLMCXR_reports.tgz", "NLMCXR_reports.tar.gz") if (root / n).is_file()), None)
    if packed is None:
        raise archive.SourceError(
            f"openi: no reports: neither {folder}/*.xml nor {root / 'NLMCXR_reports.tgz'}. "
            f"To get them: {archive.WHERE['openi']}"
        )
    try:
        with tarfile.open(packed, "r:gz") as tar:
            for member in tar:
                handle = tar.extractfile(member) if member.isfile() and member.name.endswith(".xml") else None
                if handle:
                    yield PurePosixPath(member.name).name, handle.read() if member.size <= MAX_REPORT else b""
    except (OSError, EOFError, tarfile.TarError) as error:
        raise archive.SourceError(f"openi: {packed}: damaged ({type(error).__name__}); download it again") from None


def _number(name: str) -> tuple[int, str]:
    """Sort key: 2.xml before 10.xml."""
    stem = PurePosixPath(name).stem
    return (int(stem) if stem.isdecimal() else -1, stem)


def _image_key(name: str) -> str:
    match = IMAGE_ID.search(name)
    return match.group(0) if match else PurePosixPath(name).stem
