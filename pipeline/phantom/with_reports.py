"""The three archives that publish report text: MIMIC-CXR-JPG, CheXpert (with CheXpert5x200) and Open-I."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import cv2

from pipeline.phantom import dicom, labels, prose
from pipeline.phantom.cases import EVERYTHING, Case, only, plan
from pipeline.phantom.findings import Finding, compatible, draw_finding
from pipeline.phantom.picture import render_picture, write_picture
from pipeline.phantom.plate import Image
from pipeline.phantom.with_labels import Rows, write_csv

_STUDY_VIEWS = {
    ("PA",): 0.1,
    ("AP",): 0.3,
    ("PA", "LATERAL"): 0.42,
    ("AP", "LATERAL"): 0.05,
    ("AP", "PA"): 0.05,
    ("PA", "LATERAL", "LATERAL"): 0.08,
}


def _jpeg(path: Path, image: Image) -> tuple[int, int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, image, [cv2.IMWRITE_JPEG_QUALITY, 95])
    return image.shape[0], image.shape[1]


def write_csv_gz(path: Path, header: Sequence[str], rows: Rows) -> None:
    """Write a gzipped table whose bytes do not depend on the clock."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed:
        packed.write(text.getvalue().encode())


# ---- MIMIC-CXR-JPG 2.0.0 with the reports of MIMIC-CXR


def mimic_cxr_plan(studies: int, seed: int) -> list[Case]:
    """Every seventh study is the previous patient's second."""
    cases = plan("mimic_cxr", studies, seed, EVERYTHING, _STUDY_VIEWS)
    return [replace(c, patient=cases[_first_study(c.number)].patient) for c in cases]


def _first_study(number: int) -> int:
    return number - (number % 7 == 6)


def mimic_cxr_ids(case: Case) -> tuple[int, int]:
    """Subject and study id."""
    subject = 10_000_000 + (_first_study(case.number) * 3_141_593 + 32) % 10_000_000
    return subject, 50_000_000 + (case.number * 3_141_593 + 414_267) % 10_000_000


def mimic_cxr_case(case: Case, root: Path, size: int) -> Rows:
    """Write a study's JPEGs and its report; returns a row an image, with everything the three tables need."""
    rng = case.rng("file")
    first = _first_study(case.number)
    subject, study = mimic_cxr_ids(case)
    folder = root / "files" / f"p{subject // 1_000_000}" / f"p{subject}"
    folder.mkdir(parents=True, exist_ok=True)
    p = case.patient
    report = prose.mimic_report(case.findings, case.views, p.age, p.sex, case.rng("report"))
    (folder / f"s{study}.txt").write_text(report, encoding="utf-8")
    split = "validate" if first % 25 in (3, 14) else "test" if first % 5 == 1 else "train"
    date, time = (
        21_000_101 + int(rng.integers(90)) * 10_000 + int(rng.integers(12)) * 100,
        f"{rng.uniform(0, 235_959):.3f}",
    )
    rows: Rows = []
    for n, view in enumerate(case.views):
        name = "-".join(rng.bytes(4).hex() for _ in range(5))
        shape = _jpeg(
            folder / f"s{study}" / f"{name}.jpg", render_picture(p, case.findings, view, size, case.view_seed(n)).image
        )
        coded = "LL" if view == "LATERAL" and rng.random() < 0.2 else view
        rows.append([name, study, subject, split, view, coded, *shape, date, time, case.number])
    return rows


def mimic_cxr_tables(root: Path, cases: Sequence[Case], rows: Rows) -> None:
    """The split, metadata and CheXpert-label tables of MIMIC-CXR-JPG."""
    write_csv_gz(
        root / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id", "study_id", "subject_id", "split"], [r[:4] for r in rows]
    )
    names = (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
        "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
    )
    meaning = {"PA": "postero-anterior", "AP": "antero-posterior", "LATERAL": "lateral"}
    table = []
    for name, study, subject, _, view, coded, height, width, date, time, _ in rows:
        step = "CHEST (PORTABLE AP)" if view == "AP" else "CHEST (PA AND LAT)"
        table.append([name, subject, study, step, coded, height, width, date, time, step, meaning[view], "Erect"])
    write_csv_gz(root / "mimic-cxr-2.0.0-metadata.csv.gz", names.split(","), table)
    order = sorted(labels.CHEXPERT)
    seen: dict[int, list[Any]] = {}
    for row in rows:
        case = cases[row[10]]
        seen[row[1]] = [row[2], row[1], *chexpert_cells(case, order)]
    write_csv_gz(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ["subject_id", "study_id", *order], list(seen.values()))


def chexpert_cells(case: Case, order: Sequence[str], certain: Sequence[str] = ()) -> list[str]:
    """A study's label cells as an automatic labeller leaves them: 1.0, 0.0, -1.0 or blank (not mentioned).

    The classes ``certain`` are never marked uncertain.
    """
    rng = case.rng("labels")
    positive = labels.chexpert(case.findings)
    cells = {}
    for name in labels.CHEXPERT:
        chance = rng.random()
        if name in positive:
            cells[name] = "-1.0" if chance < 0.06 and name not in (*certain, "No Finding") else "1.0"
        elif name == "No Finding":
            cells[name] = ""
        else:
            cells[name] = "0.0" if chance < 0.4 else "-1.0" if chance > 0.985 and name not in certain else ""
    return [cells[name] for name in order]


# ---- CheXpert-v1.0-small, and CheXpert5x200 among its training images

_CHEXPERT_KINDS = (
    "cardiomegaly",
    "enlarged cardiomediastinum",
    "pleural effusion",
    "pneumothorax",
    "consolidation",
    "pneumonia",
    "edema",
    "atelectasis",
    "nodule",
    "mass",
    "lung opacity",
    "rib fracture",
    "support devices",
    "pleural thickening",
)
_CHEXPERT_VIEWS = {("AP",): 0.5, ("PA", "LATERAL"): 0.28, ("AP", "LATERAL"): 0.1, ("PA",): 0.12}
_BESIDE = ("support devices", "rib fracture", "nodule", "pneumothorax", "pleural thickening")


def chexpert_plan(studies: int, seed: int) -> list[Case]:
    """The studies, every sixth a second one of its patient, then those that CheXpert5x200 is drawn from."""
    each = max(8, studies // 35)
    kinds = {**only(_CHEXPERT_KINDS), "pneumothorax": 16, "pneumonia": 12, "edema": 10, "enlarged cardiomediastinum": 7}
    cases = plan("chexpert", studies + 5 * each, seed, kinds, _CHEXPERT_VIEWS)
    planned = [replace(c, patient=cases[_first_chexpert(c.number)].patient) for c in cases[:studies]]
    for case in cases[studies:]:
        rng = case.rng("5x200")
        kind = labels.CHEXPERT5[(case.number - studies) % 5].lower()
        findings: list[Finding] = [draw_finding(kind, rng)]
        beside = str(rng.choice(_BESIDE))
        if rng.random() < 0.4 and compatible(beside, findings):
            findings.append(draw_finding(beside, rng))
        planned.append(replace(case, findings=tuple(findings), views=case.views[:1], listed=True))
    return planned


def _first_chexpert(number: int) -> int:
    return number - (number % 6 == 5)


def chexpert_case(case: Case, root: Path, size: int) -> Rows:
    """Write a study's JPEGs; returns a row an image, its split and its case number first."""
    first = case.number if case.listed else _first_chexpert(case.number)
    valid = first % 10 == 3 and not case.listed
    p = case.patient
    rows: Rows = []
    for n, view in enumerate(case.views):
        side = "lateral" if view == "LATERAL" else "frontal"
        patient = first + (64_541 if valid else 1)
        folder = f"{'valid' if valid else 'train'}/patient{patient:05d}/study{case.number - first + 1}"
        inside = f"{folder}/view{n + 1}_{side}.jpg"
        _jpeg(root / inside, render_picture(p, case.findings, view, size, case.view_seed(n)).image)
        about = ["Male" if p.sex == "M" else "Female", p.age, side.capitalize(), "" if side == "lateral" else view]
        rows.append([valid, case.number, f"CheXpert-v1.0-small/{inside}", *about])
    return rows


def chexpert_tables(root: Path, cases: Sequence[Case], rows: Rows) -> None:
    """train.csv, valid.csv and chexpert_5x200.csv."""
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *labels.CHEXPERT]
    train, valid, listed = [], [], []
    for is_valid, number, *about in rows:
        case = cases[number]
        positive = labels.chexpert(case.findings)
        if is_valid:
            valid.append([*about, *("1.0" if c in positive else "0.0" for c in labels.CHEXPERT)])
            continue
        train.append([*about, *chexpert_cells(case, labels.CHEXPERT, labels.CHEXPERT5 if case.listed else ())])
        if case.listed:
            text = prose.impression_text(case.findings, case.rng("report"))
            listed.append([about[0], text, *(int(c in positive) for c in labels.CHEXPERT5)])
    write_csv(root / "train.csv", header, train)
    write_csv(root / "valid.csv", header, valid)
    write_csv(root / "chexpert_5x200.csv", ["Path", "Report Impression", *labels.CHEXPERT5], listed)


# ---- Open-I: one XML a report; PNGs for most images, DICOM for the others


def openi_plan(studies: int, seed: int) -> list[Case]:
    """All findings; mostly a frontal and a lateral view."""
    return plan("openi", studies, seed, EVERYTHING, {("PA", "LATERAL"): 0.85, ("PA",): 0.1, ("AP",): 0.05}, normal=0.36)


def openi_case(case: Case, root: Path, size: int) -> Rows:
    """Write one report and its images; a third of the reports have DICOM images, 48 % of those MONOCHROME1."""
    rng, uid, p = case.rng("file"), case.number + 1, case.patient
    as_dicom, inverted = case.number % 3 == 2, bool(rng.random() < 0.48)
    rows: Rows = []
    images = []
    for n, view in enumerate(case.views):
        stem = f"{uid}_IM-{uid:04d}-{(n + 3) * 1000 + 1}"
        image = render_picture(p, case.findings, view, size, case.view_seed(n)).image
        if as_dicom:
            folder = root / "NLMCXR_dcm" / str(uid)
            folder.mkdir(parents=True, exist_ok=True)
            dicom.write_deep(
                folder / f"{stem}.dcm", image, dicom.uid(rng), str(uid), p.sex, p.age, view, 12, inverted, False
            )
        else:
            (root / "NLMCXR_png").mkdir(parents=True, exist_ok=True)
            write_picture(root / "NLMCXR_png" / f"CXR{uid}_{stem}.png", image)
        images.append(stem)
        rows.append([uid, f"{stem}.dcm.png", "Lateral" if view == "LATERAL" else "Frontal"])
    (root / "ecgen-radiology").mkdir(parents=True, exist_ok=True)
    (root / "ecgen-radiology" / f"{uid}.xml").write_text(_xml(case, uid, images), encoding="utf-8")
    return rows


def _xml(case: Case, uid: int, images: Sequence[str]) -> str:
    rng = case.rng("report")
    form = rng.random()
    sections = {
        "COMPARISON": str(rng.choice(("None.", "XXXX, XXXX.", "Chest radiograph XXXX"))),
        "INDICATION": str(
            rng.choice(("Chest pain", "XXXX-year-old with dyspnea", "Cough and fever", "Positive TB test"))
        ),
        "FINDINGS": "" if form < 0.13 else prose.findings_text(case.findings, rng, case.views[0], case.patient.sex),
        "IMPRESSION": "" if 0.13 <= form < 0.15 else prose.impression_text(case.findings, rng),
    }
    abstract = "\n".join(
        f'            <AbstractText Label="{k}">{escape(v)}</AbstractText>'
        if v
        else f'            <AbstractText Label="{k}"/>'
        for k, v in sections.items()
    )
    terms = [
        f.kind.capitalize() + (f"/{f.side}" if f.side else "") + (f"/{f.severity}" if f.severity else "")
        for f in case.findings
    ]
    mesh = "\n".join(f"      <major>{escape(t)}</major>" for t in terms or ["normal"])
    figures = "\n".join(
        f'   <parentImage id="CXR{uid}_{stem}">\n      <figureId>F{n}</figureId>\n      <caption>Xray Chest</caption>\n'
        f'      <panel type="single">\n         <url>/phantom/CXR{uid}_{stem}.jpg</url>\n'
        "         <imgModality>7</imgModality>\n      </panel>\n   </parentImage>"
        for n, stem in enumerate(images, 1)
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{uid}"/>
   <pmcId id="{uid}"/>
   <docSource>CXR</docSource>
   <IUXRId id="{uid}"/>
   <articleURL/>
   <articleDate>2013-08-01</articleDate>
   <articleType>XR</articleType>
   <publisher>PHANTOM</publisher>
   <title>PHANTOM: synthetic report, no patient</title>
   <note>Synthetic.</note>
   <specialty>pulmonary diseases</specialty>
   <subset>CXR</subset>
   <MedlineCitation Owner="PHANTOM" Status="synthetic">
      <Article PubModel="Electronic">
         <Journal>
            <JournalIssue>
               <PubDate>
                  <Year>2013</Year>
                  <Month>08</Month>
                  <Day>01</Day>
               </PubDate>
            </JournalIssue>
         </Journal>
         <ArticleTitle>PHANTOM: synthetic report, no patient</ArticleTitle>
         <Abstract>
{abstract}
         </Abstract>
         <Language>eng</Language>
         <PublicationTypeList>
            <PublicationType>Radiology Report</PublicationType>
         </PublicationTypeList>
      </Article>
   </MedlineCitation>
   <MeSH>
{mesh}
   </MeSH>
{figures}
</eCitation>
"""


def openi_tables(root: Path, cases: Sequence[Case], rows: Rows) -> None:
    """indiana_projections.csv; its names are those of the DICOM files with .png appended, as published."""
    write_csv(root / "indiana_projections.csv", ["uid", "filename", "projection"], rows)
