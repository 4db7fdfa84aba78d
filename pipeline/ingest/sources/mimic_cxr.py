"""MIMIC-CXR-JPG 2.x images with MIMIC-CXR's free-text reports (Johnson et al. 2019; PhysioNet)."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.datasets import facts
from pipeline.ingest.report_sections import sections
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.ingest.sources.named_images import images_by_stem
from pipeline.ingest.sources.tables import image_rows, table_rows, whole_number
from pipeline.storage.files import base_name
from pipeline.study import Reject, Study, View

MIMIC_SPLITS = {"train": "train", "validate": "valid", "test": "test"}
# ViewPosition of the metadata file; its other values (LAO, SWIMMERS, AP AXIAL ...) are neither frontal nor lateral.
MIMIC_POSITIONS = {"PA": "PA", "AP": "AP", "LATERAL": "LATERAL", "LL": "LATERAL"}


def read_mimic_cxr(files: Archive, reports: Archive) -> Iterator[Study | Reject]:
    """Studies of the official split file whose report has findings or impression.

    Layout: ``files/p10/p10000032/s50414267/<dicom_id>.jpg`` (MIMIC-CXR-JPG) or ``.dcm`` (MIMIC-CXR: the split file is
    to be fetched from MIMIC-CXR-JPG, and without the metadata file the view is read from the DICOM).

    Args:
        reports: where ``s50414267.txt`` is, in a tree or in mimic-cxr-reports.zip; often ``files`` itself.

    Raises:
        SourceError: a label file or all reports are missing.
    """
    versions = [f"mimic-cxr-{v}" for v in ("2.0.0", "2.1.0", "2.0.1")]
    if reports is not files:  # of ``files`` they are counted already
        yield from (Reject("mimic_cxr", name, "file", reason) for name, reason in reports.problems)
    split_file = archive.required_table(files, [f"{v}-split.csv" for v in versions])
    on_disk = images_by_stem(files)
    position = {}
    tables = [f"{v}-metadata.csv" for v in versions]
    metadata = archive.find_table(files, tables)
    if metadata is None and not any(name.endswith(".dcm") for name in on_disk.values()):
        metadata = archive.required_table(files, tables)  # JPEG files do not say what view they are
    if metadata is not None:
        for row in table_rows(files, metadata, ["dicom_id", "ViewPosition"]):
            position[row["dicom_id"]] = MIMIC_POSITIONS.get(row["ViewPosition"].upper(), "")
    studies: dict[tuple[str, str, str], list[str]] = {}
    for row in image_rows(files, split_file, ["dicom_id", "study_id", "subject_id", "split"]):
        if row["split"] in MIMIC_SPLITS:
            key = (whole_number(row["subject_id"]), whole_number(row["study_id"]), MIMIC_SPLITS[row["split"]])
            studies.setdefault(key, []).append(row["dicom_id"])
        else:
            yield Reject("mimic_cxr", row["dicom_id"], "row", "split is none of train, validate, test")
    texts = {base_name(name): name for name in reports.names if name.endswith(".txt")}
    if not texts:
        raise archive.SourceError(
            f"mimic_cxr: no report (s*.txt) below {reports.files.root}; set sources.mimic_cxr.reports to "
            f"mimic-cxr-reports.zip or where it was unpacked. To get it: {facts('mimic_cxr').access}"
        )
    for (patient, study, split), dicoms in studies.items():
        name = f"files/p{patient[:2]}/p{patient}/s{study}.txt"
        text = reports.text(texts[f"s{study}.txt"]) if f"s{study}.txt" in texts else None
        if text is None:
            yield Reject("mimic_cxr", name, "study", "report missing or unreadable")
            continue
        findings, impression = sections(text)
        if findings is None and impression is None:
            yield Reject("mimic_cxr", name, "study", "neither findings nor impression")
            continue
        views = tuple(View(id=d, position=position.get(d, ""), path=on_disk.get(d, "")) for d in dicoms)
        yield Study("mimic_cxr", patient, study, split, views, findings, impression)
