"""The four archives that publish labels but no reports: ChestX-ray14, VinDr-CXR, RSNA and SIIM.

Each has a plan (which examinations), a case writer (run in worker processes, returns the rows of its tables) and a
table writer.
"""

from __future__ import annotations

import csv
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.phantom import dicom, labels
from pipeline.phantom.cases import EVERYTHING, Case, only, plan
from pipeline.phantom.findings import Finding, draw_finding
from pipeline.phantom.picture import render_picture, write_picture
from pipeline.phantom.plate import Mask, boxes

Rows = list[list[Any]]
_SINGLE: dict[tuple[str, ...], float] = {("PA",): 0.65, ("AP",): 0.35}
_NIH_KINDS = (
    "cardiomegaly",
    "pleural effusion",
    "pneumothorax",
    "consolidation",
    "pneumonia",
    "edema",
    "atelectasis",
    "nodule",
    "mass",
    "infiltration",
    "emphysema",
    "pulmonary fibrosis",
    "pleural thickening",
    "hiatal hernia",
)
_CLEAR_KINDS = (  # abnormal without an opacity that could be taken for pneumonia
    "cardiomegaly",
    "pneumothorax",
    "nodule",
    "rib fracture",
    "support devices",
    "emphysema",
    "pleural thickening",
    "hiatal hernia",
    "aortic enlargement",
    "calcification",
    "mediastinal shift",
    "atelectasis",
    "pleural effusion",
)


def write_csv(path: Path, header: Sequence[str], rows: Rows) -> None:
    """Write a comma-separated table with Unix line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# ---- ChestX-ray14: 8-bit PNG, one row an image; patients come back for follow-up


def chestxray14_plan(studies: int, seed: int) -> list[Case]:
    """Pairs of images belong to one patient."""
    cases = plan(
        "chestxray14",
        studies,
        seed,
        {**only(_NIH_KINDS), "pneumothorax": 16, "pneumonia": 14, "hiatal hernia": 6, "nodule": 9, "mass": 9},
        _SINGLE,
    )
    return [replace(c, patient=cases[c.number - c.number % 2].patient) for c in cases]


def chestxray14_case(case: Case, root: Path, size: int) -> Rows:
    """Write one PNG."""
    patient, follow_up = case.number // 2 + 1, case.number % 2
    name = f"{patient:08d}_{follow_up:03d}.png"
    image = render_picture(case.patient, case.findings, case.views[0], size, case.view_seed(0), 1.0).image
    (root / "images").mkdir(parents=True, exist_ok=True)
    write_picture(root / "images" / name, image)
    found = "|".join(labels.nih(case.findings))
    age = case.patient.age + follow_up
    return [[name, found, follow_up, patient, age, case.patient.sex, case.views[0], 2500, 2500, 0.143, 0.143]]


def chestxray14_tables(root: Path, cases: Sequence[Case], rows: Rows) -> None:
    """Data_Entry_2017_v2020.csv, whose header cells hold commas, and the two official lists (by patient)."""
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    header += "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    write_csv(root / "Data_Entry_2017_v2020.csv", header.split(","), rows)
    for name, test in (("train_val_list.txt", False), ("test_list.txt", True)):
        listed = [r[0] for r in rows if (r[3] % 5 == 0) == test]
        (root / name).write_text("\n".join(listed) + "\n", encoding="utf-8")


# ---- VinDr-CXR: 16-bit DICOM, three readers an image in training, their consensus in the test set


def vindr_cxr_plan(studies: int, seed: int) -> list[Case]:
    """All findings; two fifths of the cases are the test set."""
    return plan("vindr_cxr", studies, seed, EVERYTHING, _SINGLE)


def _is_test(number: int) -> bool:
    return number % 5 in (1, 3)


def vindr_cxr_case(case: Case, root: Path, size: int) -> Rows:
    """Write one DICOM file: a third MONOCHROME1, a quarter JPEG 2000, 12 to 14 bits."""
    rng = case.rng("file")
    name = rng.bytes(16).hex()
    path = root / ("test" if _is_test(case.number) else "train") / f"{name}.dicom"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = render_picture(case.patient, case.findings, case.views[0], size, case.view_seed(0)).image
    p, bits = case.patient, int(rng.integers(12, 15))
    inverted, jpeg2000 = bool(rng.random() < 0.33), bool(rng.random() < 0.25)
    dicom.write_deep(path, image, dicom.uid(rng), name[:16], p.sex, p.age, case.views[0], bits, inverted, jpeg2000)
    truth = np.array([int(c in labels.vindr(case.findings)) for c in labels.VINDR])
    if _is_test(case.number):
        return [[name, *truth.tolist()]]
    readers = rng.permutation(17)[:3] + 1
    sure = int(rng.integers(3))  # one reader sees everything that was drawn
    rows: Rows = []
    for n, reader in enumerate(readers):
        seen = truth if n == sure else truth * (rng.random(len(truth)) > 0.1)
        seen[-1] = int(not seen[:-1].any())
        rows.append([name, f"R{reader}", *seen.tolist()])
    return rows


def vindr_cxr_tables(root: Path, cases: Sequence[Case], rows: Rows) -> None:
    """annotations/image_labels_train.csv (a row a reader) and image_labels_test.csv (a row an image)."""
    long = len(labels.VINDR) + 2
    folder = root / "annotations"
    write_csv(
        folder / "image_labels_train.csv", ["image_id", "rad_id", *labels.VINDR], [r for r in rows if len(r) == long]
    )
    write_csv(folder / "image_labels_test.csv", ["image_id", *labels.VINDR], [r for r in rows if len(r) < long])


# ---- RSNA Pneumonia: JPEG DICOM, boxes around the opacities


def _force(cases: list[Case], kind: str, share: int, others: float = 0.3) -> list[Case]:
    """Give ``share`` in 20 of the cases the finding ``kind``, alone or beside what they have."""
    forced = []
    for case in cases:
        rng = case.rng("force")
        if case.number * 7 % 20 < share:
            beside = [f for f in case.findings if f.kind in _CLEAR_KINDS and f.kind not in (kind, "pleural thickening")]
            first: Finding = draw_finding(kind, rng)
            case = replace(case, findings=(first, *(beside[:1] if rng.random() < others else [])))
        forced.append(case)
    return forced


def rsna_plan(studies: int, seed: int) -> list[Case]:
    """35 % pneumonia; of the others about two thirds are normal and one third abnormal without a lung opacity."""
    return _force(plan("rsna", studies, seed, only(_CLEAR_KINDS), _SINGLE, normal=0.65), "pneumonia", 7)


def rsna_case(case: Case, root: Path, size: int) -> Rows:
    """Write one DICOM file; returns one row a box: the label row and the detailed class."""
    rng = case.rng("file")
    name = str(uuid.UUID(bytes=rng.bytes(16), version=4))
    picture = render_picture(case.patient, case.findings, case.views[0], size, case.view_seed(0), 1.0)
    folder = root / "stage_2_train_images"
    folder.mkdir(parents=True, exist_ok=True)
    p = case.patient
    dicom.write_jpeg(folder / f"{name}.dcm", picture.image, dicom.uid(rng), name, p.sex, p.age, case.views[0])
    marks = picture.marked.get("pneumonia", [])
    if marks:
        return [[name, *boxes(m), 1, "Lung Opacity"] for m in marks]
    detail = "No Lung Opacity / Not Normal" if case.findings else "Normal"
    return [[name, "", "", "", "", 0, detail]]


def rsna_tables(root: Path, cases: Sequence[Case], rows: Rows) -> None:
    """stage_2_train_labels.csv and stage_2_detailed_class_info.csv."""
    write_csv(
        root / "stage_2_train_labels.csv", ["patientId", "x", "y", "width", "height", "Target"], [r[:6] for r in rows]
    )
    write_csv(root / "stage_2_detailed_class_info.csv", ["patientId", "class"], [[r[0], r[6]] for r in rows])


# ---- SIIM pneumothorax: JPEG DICOM three folders deep, run-length encoded outlines


def siim_plan(studies: int, seed: int) -> list[Case]:
    """35 % pneumothorax; the others hold anything else."""
    kinds = only(tuple(k for k in EVERYTHING if k != "pneumothorax"))
    return _force(plan("siim", studies, seed, kinds, _SINGLE, normal=0.6), "pneumothorax", 7)


def siim_case(case: Case, root: Path, size: int) -> Rows:
    """Write one DICOM file; returns one row an outline, or -1."""
    rng = case.rng("file")
    study, series, name = (dicom.uid(rng) for _ in range(3))
    folder = root / "dicom-images-train" / study / series
    folder.mkdir(parents=True, exist_ok=True)
    picture = render_picture(case.patient, case.findings, case.views[0], size, case.view_seed(0), 1.0)
    p = case.patient
    dicom.write_jpeg(folder / f"{name}.dcm", picture.image, name, name[-12:], p.sex, p.age, case.views[0])
    rows: Rows = []
    for mark in picture.marked.get("pneumothorax", []):
        outline = (cv2.resize(mark, (1024, 1024), interpolation=cv2.INTER_LINEAR) > 127).astype(np.uint8)
        parts = [outline]
        if rng.random() < 0.15:  # some images have an outline for the apex and one for the rest
            cut = int(np.median(np.nonzero(outline.any(1))[0]))
            parts = [
                np.where(np.arange(1024)[:, None] < cut, outline, 0),
                np.where(np.arange(1024)[:, None] >= cut, outline, 0),
            ]
        rows += [[name, run_lengths(part)] for part in parts]
    return rows or [[name, "-1"]]


def run_lengths(mask: Mask | npt.NDArray[np.int_]) -> str:
    """SIIM's encoding: down the columns, pairs of pixels skipped since the last run's end and pixels set."""
    flat = np.concatenate([[0], np.asarray(mask).T.reshape(-1), [0]]).astype(bool).astype(np.int8)
    starts, ends = np.nonzero(np.diff(flat) == 1)[0], np.nonzero(np.diff(flat) == -1)[0]
    skipped = starts - np.concatenate([[0], ends[:-1]])
    return " ".join(f"{a} {b}" for a, b in zip(skipped.tolist(), (ends - starts).tolist(), strict=True))


def siim_tables(root: Path, cases: Sequence[Case], rows: Rows) -> None:
    """train-rle.csv; the second column's name starts with a blank, as published."""
    write_csv(root / "train-rle.csv", ["ImageId", " EncodedPixels"], rows)
