"""MIMIC-CXR-JPG 2.x images with MIMIC-CXR's free-text reports (Johnson et al. 2019; PhysioNet)."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.params import Source
from pipeline.reports import sections
from pipeline.sources import archive
from pipeline.study import Reject, Study, View

SPLITS = {"train": "train", "validate": "valid", "test": "test"}
# ViewPosition of the metadata file; its other values (LAO, SWIMMERS, AP AXIAL ...) are neither frontal nor lateral.
POSITIONS = {"PA": "PA", "AP": "AP", "LATERAL": "LATERAL", "LL": "LATERAL"}


def read_mimic_cxr(source: Source) -> Iterator[Study | Reject]:
    """Studies of the official split file whose report has findings or impression.

    Layout: ``files/p10/p10000032/s50414267/<dicom_id>.jpg`` and ``files/p10/p10000032/s50414267.txt``; reports may lie
    under another root, ``source.reports``.

    Raises:
        SourceError: the archive folder, a label file or the whole report tree is missing.
    """
    root = archive.root("mimic_cxr", source.path)
    reports = archive.root("mimic_cxr", source.reports) if source.reports else root
    versions = [f"mimic-cxr-{v}" for v in ("2.0.0", "2.1.0", "2.0.1")]
    split_file = archive.table("mimic_cxr", root, [f"{v}-split.csv" for v in versions])
    metadata = archive.table("mimic_cxr", root, [f"{v}-metadata.csv" for v in versions])
    position = {
        row["dicom_id"]: POSITIONS.get(row["ViewPosition"].upper(), "")
        for row in archive.rows("mimic_cxr", metadata, ["dicom_id", "ViewPosition"])
    }
    studies: dict[tuple[str, str, str], list[str]] = {}
    for row in archive.rows("mimic_cxr", split_file, ["dicom_id", "study_id", "subject_id", "split"]):
        if row["split"] in SPLITS:
            key = (row["subject_id"], row["study_id"], SPLITS[row["split"]])
            studies.setdefault(key, []).append(row["dicom_id"])
        else:
            yield Reject("mimic_cxr", row["dicom_id"], "row", "split is none of train, validate, test")
    if not (reports / "files").is_dir():
        raise archive.SourceError(
            f"mimic_cxr: no report tree {reports / 'files'}; set sources.mimic_cxr.reports to where "
            f"mimic-cxr-reports.zip was unpacked. To get it: {archive.WHERE['mimic_cxr']}"
        )
    on_disk = archive.by_stem(archive.images(root))
    for (patient, study, split), dicoms in studies.items():
        name = f"files/p{patient[:2]}/p{patient}/s{study}.txt"
        try:
            text = (reports / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            yield Reject("mimic_cxr", name, "study", "report missing or unreadable")
            continue
        findings, impression = sections(text)
        if findings is None and impression is None:
            yield Reject("mimic_cxr", name, "study", "neither findings nor impression")
            continue
        views = tuple(View(id=d, position=position.get(d, ""), path=on_disk.get(d, "")) for d in dicoms)
        yield Study("mimic_cxr", patient, study, split, views, findings, impression)
