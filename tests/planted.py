"""A hospital's archive with words in every place that a name can be in, and a search for them in all that a run leaves.

The words are made up, so that nothing else holds them; each says where it was planted.
"""

import csv
import io
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import yaml
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

# Not written out, since this file is searched as well.
WORDS = tuple(f"zyx{place}" for place in ("header", "file", "rejected", "report", "column"))
HEADER, FILE, REJECTED, REPORT, COLUMN = WORDS
# Where a word may be found: docs/reliability.md says so.
ALLOWED = {
    REPORT: ("data/index/own.parquet", "data/shards/own/", "data/corpus/resnet_mcc/studies.parquet"),
    REJECTED: ("data/shards/own/rejects.parquet",),
}
STUDIES = 36
FINDING = "COVID-19"  # a class that no file of prompts knows


def plant(clone: Path) -> None:
    """Write the archive below data/own of a clone, and make it a source and training set of the run resnet_mcc."""
    archive = clone / "data" / "own"
    archive.mkdir(parents=True)
    rows = []
    for number in range(STUDIES):
        name = f"{FILE}_{number}.dcm" if number else f"{REJECTED}.dcm"
        (archive / name).write_bytes(_dicom(number) if number else _dicom(1)[:900])
        said = f"Mrs {REPORT.capitalize()} was seen again." * 3 if number in (5, 6) else f"Opacity number {number}."
        split = ("train", "test", "valid")[number % 3]
        label = ("1", "0", "-1", "")[number // 3 % 4]
        rows.append([name, f"s{number}", f"p{number}", f"FINDINGS: {said}\nIMPRESSION: Normal heart.", COLUMN])
        rows[-1] += [split, label]
    header = ["image", "study", "patient", "report", "surname", "split", f"label:{FINDING}"]
    with (archive / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    params = yaml.safe_load((clone / "params.yaml").read_text())
    params["sources"]["own"] = {
        **{"reader": "manifest", "path": "data/own", "manifest": "list.csv"},
        "stamp": "data/fingerprints/own.json",
        "about": {
            **{"name": "A hospital", "classes": [FINDING], "patients": True},
            "tests": ["classification", "retrieval"],
        },
    }
    params["runs"]["resnet_mcc"]["datasets"].append("own")
    (clone / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def _dicom(number: int) -> bytes:
    """A radiograph whose header names somebody wherever there is room."""
    grey = np.random.default_rng(number).integers(0, 4096, (9, 8)).astype(np.uint16)
    pixels = cv2.resize(grey, (80, 96), interpolation=cv2.INTER_CUBIC)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number + 1}"
    for keyword in ("PatientName", "PatientID", "InstitutionName", "StudyDescription", "SeriesDescription"):
        setattr(data, keyword, HEADER)
    for keyword in ("ReferringPhysicianName", "StudyID", "PatientComments", "ProtocolName", "PatientAddress"):
        setattr(data, keyword, HEADER)
    data.private_block(0x0011, HEADER, create=True).add_new(1, "LO", HEADER)
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.ViewPosition = "PA"
    data.PixelData = pixels.tobytes()
    file = io.BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def found_in(root: Path) -> Iterator[tuple[str, str]]:
    """(word, file) for each word in each file below a folder, whatever the file is packed in."""
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
        text = b"\n".join([str(path.relative_to(root)).encode(), *_contents(path.read_bytes(), path)]).lower()
        for word in WORDS:
            if word.encode() in text:
                yield word, path.relative_to(root).as_posix()


def _contents(data: bytes, path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what can be read of them unpacked."""
    yield data
    if data[:4] == b"PAR1":
        yield str(pq.read_table(io.BytesIO(data)).to_pylist()).encode()
    elif data[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            yield from map(archive.read, archive.namelist())
    elif data[:6] == b"SQLite":
        with sqlite3.connect(path) as db:
            yield "\n".join(db.iterdump()).encode()
    elif data[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            yield "\n".join(archive.getnames()).encode()
    elif data[:2] in (b"x\x01", b"x\x9c", b"x\xda"):  # an object of git
        yield zlib.decompress(data)
