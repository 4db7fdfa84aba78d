"""Phantom archives: layouts read back with independent code, findings seen where the labels and reports say."""

from __future__ import annotations

import csv
import gzip
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from pipeline.phantom import archives, labels, prose
from pipeline.phantom.anatomy import draw_patient
from pipeline.phantom.findings import KINDS, Finding, draw_finding
from pipeline.phantom.picture import render_picture
from pipeline.phantom.with_labels import run_lengths, vindr_cxr_plan
from pipeline.phantom.with_reports import chexpert_plan, mimic_cxr_plan
from pipeline.storage.unchanged import NOTE
from pipeline.tracking import mlflow_runs
from stages import phantom as stage

ROOT = Path(__file__).parents[1]
STUDIES, SIZE = 24, 96
VINDR18 = [
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Lung tumor",
    "Pneumonia",
    "Tuberculosis",
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("phantom")
    for name in archives.LAYOUTS:
        archives.write_archive(name, base / name, STUDIES, SIZE, seed=3, workers=1)
    return base


def table(path: Path) -> list[dict[str, str]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return list(csv.DictReader(text.splitlines()))


@pytest.mark.parametrize("name", archives.LAYOUTS)
def test_marked_complete_and_synthetic(root: Path, name: str) -> None:
    mark = json.loads((root / name / "PHANTOM.json").read_text())
    assert mark["phantom"] is True and mark["archive"] == name and mark["studies"] == STUDIES
    assert mark["files"] == sum(p.is_file() for p in (root / name).rglob("*")) - 1
    assert "synthetic" in (root / name / "PHANTOM.txt").read_text()
    assert not list(root.glob("*.partial"))


@pytest.mark.parametrize("name", ["mimic_cxr", "vindr_cxr"])
def test_same_bytes_whatever_the_workers_other_bytes_for_another_seed(root: Path, tmp_path: Path, name: str) -> None:
    before = json.loads((root / name / "PHANTOM.json").read_text())
    assert archives.write_archive(name, tmp_path / "two", STUDIES, SIZE, seed=3, workers=2) == before
    if name == "vindr_cxr":
        assert (
            archives.write_archive(name, tmp_path / "two", STUDIES, SIZE, seed=4, workers=1)["sha256"]
            != before["sha256"]
        )


def test_mimic_layout(root: Path) -> None:
    base = root / "mimic_cxr"
    split, meta = (table(base / f"mimic-cxr-2.0.0-{n}.csv.gz") for n in ("split", "metadata"))
    assert [r["dicom_id"] for r in split] == [r["dicom_id"] for r in meta]
    assert {r["split"] for r in split} == {"train", "validate", "test"}
    assert {r["ViewPosition"] for r in meta} <= {"PA", "AP", "LATERAL", "LL"}
    for s, m in zip(split, meta, strict=True):
        folder = base / f"files/p{s['subject_id'][:2]}/p{s['subject_id']}"
        image = cv2.imread(str(folder / f"s{s['study_id']}" / f"{s['dicom_id']}.jpg"), cv2.IMREAD_UNCHANGED)
        assert image.shape == (int(m["Rows"]), int(m["Columns"])) and min(image.shape) == SIZE
        report = (folder / f"s{s['study_id']}.txt").read_text()
        assert "FINAL REPORT" in report and max(map(len, report.splitlines())) <= 80
    patients = {}
    for s in split:
        assert patients.setdefault(s["subject_id"], s["split"]) == s["split"]
    assert len({s["study_id"] for s in split}) == STUDIES > len(patients)
    studies = table(base / "mimic-cxr-2.0.0-chexpert.csv.gz")
    assert len(studies) == STUDIES and set(labels.CHEXPERT) < set(studies[0])


def test_mimic_split_sizes_and_sections() -> None:
    cases = mimic_cxr_plan(800, 0)
    tests = sum((c.number - (c.number % 7 == 6)) % 5 == 1 for c in cases)
    assert 120 <= tests <= 200
    texts = [prose.mimic_report(c.findings, c.views, 50, "F", c.rng("report")) for c in cases]
    has = Counter(("FINDINGS:" in t, "IMPRESSION:" in t) for t in texts)
    assert all(has[k] > 10 for k in ((True, True), (True, False), (False, True), (False, False)))
    assert has[True, True] > 500


def test_chexpert_layout_and_the_5x200_list(root: Path) -> None:
    base = root / "chexpert"
    train, valid, listed = (table(base / f"{n}.csv") for n in ("train", "valid", "chexpert_5x200"))
    assert list(train[0])[:5] == ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA"] and len(train[0]) == 19
    for row in train + valid:
        assert (base / row["Path"].removeprefix("CheXpert-v1.0-small/")).is_file()
        assert ("frontal" in row["Path"]) == (row["Frontal/Lateral"] == "Frontal") == (row["AP/PA"] != "")
    assert {v for r in train for v in list(r.values())[5:]} == {"1.0", "0.0", "-1.0", ""}
    assert {v for r in valid for v in list(r.values())[5:]} == {"1.0", "0.0"}
    by_path = {r["Path"]: r for r in train}
    per_class = Counter()
    for row in listed:
        positive = [c for c in labels.CHEXPERT5 if row[c] == "1"]
        assert [c for c in labels.CHEXPERT5 if by_path[row["Path"]][c] == "1.0"] == positive and len(positive) == 1
        assert by_path[row["Path"]]["Frontal/Lateral"] == "Frontal" and row["Report Impression"]
        per_class[positive[0]] += 1
    assert set(per_class.values()) == {8} and len(per_class) == 5
    own = [r["Path"].split("/")[2] for r in listed]
    assert sum(r["Path"].split("/")[2] in own for r in train) == len(listed)  # patients of their own


def test_chexpert_keeps_its_studies() -> None:
    cases = chexpert_plan(700, 0)
    assert sum(c.listed for c in cases) == 100 and len(cases) == 800


def test_chestxray14_layout(root: Path) -> None:
    base = root / "chestxray14"
    header = (base / "Data_Entry_2017_v2020.csv").read_text().splitlines()[0]
    assert header.startswith("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient ")
    assert header.endswith("OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]")
    rows = table(base / "Data_Entry_2017_v2020.csv")
    for row in rows:
        image = cv2.imread(str(base / "images" / row["Image Index"]), cv2.IMREAD_UNCHANGED)
        assert image.shape == (SIZE, SIZE) and image.dtype == np.uint8
    lists = [(base / f"{n}_list.txt").read_text().split() for n in ("train_val", "test")]
    assert sorted(lists[0] + lists[1]) == sorted(r["Image Index"] for r in rows)
    assert not {n[:8] for n in lists[0]} & {n[:8] for n in lists[1]}


def _windowed(path: Path) -> tuple[np.ndarray, object]:
    """Independent reading: window, then invert MONOCHROME1."""
    import pydicom

    ds = pydicom.dcmread(path)
    low = ds.WindowCenter - ds.WindowWidth / 2
    image = np.clip((ds.pixel_array.astype(float) - low) / ds.WindowWidth, 0, 1)
    return (1 - image if ds.PhotometricInterpretation == "MONOCHROME1" else image), ds


def test_vindr_layout(root: Path) -> None:
    base = root / "vindr_cxr"
    train, test = (table(base / f"annotations/image_labels_{n}.csv") for n in ("train", "test"))
    assert list(test[0])[1:] == list(labels.VINDR) == list(train[0])[2:] and len(labels.VINDR) == 28
    assert set(Counter(r["image_id"] for r in train).values()) == {3}
    on_disk = {p.stem for p in (base / "train").glob("*.dicom")}, {p.stem for p in (base / "test").glob("*.dicom")}
    assert on_disk == ({r["image_id"] for r in train}, {r["image_id"] for r in test})
    assert 0.3 < len(test) / STUDIES < 0.5
    seen = Counter()
    for path in base.glob("*/*.dicom"):
        image, ds = _windowed(path)
        seen[ds.PhotometricInterpretation] += 1
        seen[ds.file_meta.TransferSyntaxUID.name] += 1
        assert ds.BitsAllocated == 16 and 12 <= ds.BitsStored <= 14 and ds.pixel_array.max() > 255
        h, w = image.shape
        air, spine = (
            image[: h // 12, : w // 12].mean(),
            image[h // 2 : 3 * h // 4, int(0.48 * w) : int(0.52 * w)].mean(),
        )
        assert air < 0.2 and spine > 0.4 and 0.1 < image.mean() < 0.8
    assert len(seen) == 4  # both photometric interpretations, both transfer syntaxes


def test_rsna_layout(root: Path) -> None:
    base = root / "rsna"
    boxes, detail = table(base / "stage_2_train_labels.csv"), table(base / "stage_2_detailed_class_info.csv")
    assert {p.stem for p in (base / "stage_2_train_images").glob("*.dcm")} == {r["patientId"] for r in boxes}
    assert {r["class"] for r in detail} == {"Lung Opacity", "Normal", "No Lung Opacity / Not Normal"}
    named = {r["patientId"]: r["class"] for r in detail}
    positive = {r["patientId"] for r in boxes if r["Target"] == "1"}
    assert 0.25 < len(positive) / STUDIES < 0.45
    for r in boxes:
        assert (r["Target"] == "1") == (named[r["patientId"]] == "Lung Opacity") == (r["width"] != "")
        if r["Target"] == "1":
            x, y, w, h = (float(r[k]) for k in ("x", "y", "width", "height"))
            assert x >= 0 and x + w <= SIZE and y >= 0 and y + h <= SIZE and min(w, h) > 0.08 * SIZE


def _decode(text: str) -> np.ndarray:
    mask, at = np.zeros(1024 * 1024, bool), 0
    numbers = [int(n) for n in text.split()]
    for skip, length in zip(numbers[::2], numbers[1::2], strict=True):
        at += skip
        mask[at : at + length] = True
        at += length
    return mask.reshape(1024, 1024).T


def test_siim_layout(root: Path) -> None:
    import pydicom

    base = root / "siim"
    assert (base / "train-rle.csv").read_text().startswith("ImageId, EncodedPixels\n")
    outlines: dict[str, list[str]] = {}
    for row in table(base / "train-rle.csv"):
        outlines.setdefault(row["ImageId"], []).append(row[" EncodedPixels"].strip())
    files = {p.stem: p for p in base.glob("dicom-images-train/*/*/*.dcm")}
    assert files.keys() == outlines.keys()
    positive = {k: v for k, v in outlines.items() if v != ["-1"]}
    assert 0.25 < len(positive) / STUDIES < 0.45
    for name, runs in positive.items():
        mask = np.any([_decode(r) for r in runs], 0)
        ds = pydicom.dcmread(files[name])
        assert ds.file_meta.TransferSyntaxUID.name.startswith("JPEG Baseline") and ds.BitsStored == 8
        image = cv2.resize(ds.pixel_array, (1024, 1024))
        assert 0.005 < mask.mean() < 0.25
        assert image[mask].mean() + 15 < image[mask[:, ::-1]].mean()  # air: darker than the other side


def test_run_lengths_by_hand() -> None:
    mask = np.zeros((1024, 1024), np.uint8)
    mask[2:5, 0] = 1
    mask[1:3, 1] = 1
    assert run_lengths(mask) == f"2 3 {1024 - 5 + 1} 2"
    assert (_decode(run_lengths(mask)) == mask).all()


def test_openi_layout(root: Path) -> None:
    base = root / "openi"
    named = {r["filename"].removesuffix(".dcm.png"): r["projection"] for r in table(base / "indiana_projections.csv")}
    seen = Counter()
    for path in (base / "ecgen-radiology").glob("*.xml"):
        tree = ET.parse(path).getroot()
        assert tree.tag == "eCitation"
        parts = tree.findall("MedlineCitation/Article/Abstract/AbstractText")
        assert [a.get("Label") for a in parts] == ["COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION"]
        assert parts[2].text or parts[3].text
        for image in tree.findall("parentImage"):
            stem = image.get("id", "").removeprefix(f"CXR{path.stem}_")
            assert named[stem] in ("Frontal", "Lateral")
            png, dcm = base / f"NLMCXR_png/CXR{path.stem}_{stem}.png", base / f"NLMCXR_dcm/{path.stem}/{stem}.dcm"
            assert png.is_file() != dcm.is_file()
            seen["dicom" if dcm.is_file() else "png"] += 1
            if dcm.is_file():
                seen[_windowed(dcm)[1].PhotometricInterpretation] += 1
    assert 0.15 < seen["dicom"] / sum((seen["dicom"], seen["png"])) < 0.5
    assert seen["MONOCHROME1"] and seen["MONOCHROME2"]


@pytest.mark.parametrize("kind", KINDS)
def test_finding_shows_on_its_side_and_in_its_zone(kind: str) -> None:
    """A finding changes the picture by more than noise, more on its own side, and near its own zone."""
    rng = np.random.default_rng(11)
    for _ in range(3):
        patient, f = draw_patient(rng), draw_finding(kind, rng)
        views = {}
        for position in ("PA", "LATERAL"):
            healthy, ill = (render_picture(patient, fs, position, 80, 5).image for fs in ((), (f,)))
            views[position] = np.abs(ill - healthy)
        change = views["PA"]
        assert (change > 0.1).mean() > 0.006, "too faint or too small to be learnt at 80 pixels"
        right, left = change[:, :40].sum(), change[:, 40:].sum()
        if f.side in ("right", "left") and kind != "mediastinal shift":
            assert (right > 2 * left) if f.side == "right" else (left > 2 * right)
        if f.zone and kind != "pulmonary fibrosis":
            centre = (change.sum(1) * np.arange(len(change))).sum() / change.sum() / len(change)
            low, high = {"upper": (0.15, 0.42), "mid": (0.3, 0.58), "lower": (0.45, 0.8)}[f.zone]
            assert low < centre < high
        if kind != "mediastinal shift":
            assert (views["LATERAL"] > 0.06).mean() > 0.004


def test_severity_shows() -> None:
    patient = draw_patient(np.random.default_rng(0))
    areas = []
    for severity in ("small", "moderate", "large"):
        f = Finding("pleural effusion", "left", "", severity, "", 1)
        change = render_picture(patient, (f,), "PA", 80, 5).image - render_picture(patient, (), "PA", 80, 5).image
        areas.append((change > 0.15).mean())
    assert areas[0] < areas[1] < areas[2]


def test_picture_contract() -> None:
    patient = draw_patient(np.random.default_rng(0))
    image = render_picture(patient, (), "AP", 100, 5).image
    assert image.shape == (120, 100) and image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1
    assert (image == render_picture(patient, (), "AP", 100, 5).image).all()
    with pytest.raises(ValueError, match="OBLIQUE"):
        render_picture(patient, (), "OBLIQUE", 100, 5)


def test_prevalence() -> None:
    for cases in (vindr_cxr_plan(500, 0), mimic_cxr_plan(800, 0)):
        seen = Counter(name for c in cases for name in labels.vindr(c.findings))
        assert {c for c in VINDR18 if seen[c] < 0.05 * len(cases)} == set()
        assert 0.25 < seen["No finding"] / len(cases) < 0.4
        assert all(len(c.findings) <= 4 for c in cases)


def test_reports_affirm_what_is_drawn_and_deny_only_what_is_not() -> None:
    affirmed, drawn = Counter(), Counter()
    for case in mimic_cxr_plan(400, 1):
        rng = case.rng("test")
        text = prose.findings_text(case.findings, rng) + " " + prose.impression_text(case.findings, rng)
        sentences = [s.lower() for s in re.split(r"(?<=\.)\s+", text)]
        present = labels.vindr(case.findings)
        for name in VINDR18:
            said = [s for s in sentences if re.search(rf"\b{re.escape(name.lower())}\b", s)]
            denied = [s for s in said if re.search(r"\b(no|not|nor)\b", s)]
            if name in present:
                assert denied == [], name
                drawn[name] += 1
                affirmed[name] += bool(said)
            else:
                assert said == denied, name
    # "Lung Opacity" is an umbrella: consolidation or pneumonia is mostly called by its own name.
    least = {name: 0.3 if name == "Lung Opacity" else 0.6 for name in VINDR18}
    assert {n for n in VINDR18 if affirmed[n] <= least[n] * drawn[n]} == set()


def test_short_sentences_are_specific() -> None:
    rng = np.random.default_rng(0)
    f = Finding("pleural effusion", "right", "", "large")
    assert prose.sentence(f, rng, short=True) == "Large right pleural effusion."
    f = Finding("consolidation", "left", "upper")
    assert prose.sentence(f, rng, short=True) == "Left upper lobe consolidation."


def test_what_cannot_be_written_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="padchest"):
        archives.write_archive("padchest", tmp_path / "a", 20, 64, 0)
    with pytest.raises(ValueError, match="at least 20 studies"):
        archives.write_archive("siim", tmp_path / "a", 3, 64, 0)
    (tmp_path / "real").mkdir()
    (tmp_path / "real/scan.dcm").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="no phantom"):
        archives.write_archive("siim", tmp_path / "real", 20, 64, 0)
    assert (tmp_path / "real/scan.dcm").is_file()


def test_a_phantom_half_replaced_is_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the earlier one is taken away, or between the two renames."""
    remove, place = shutil.rmtree, tmp_path / "siim"
    mark = archives.write_archive("siim", place, 20, 64, 0, 1)

    def killed(path: Path, **how: bool) -> None:
        if path.exists() and not path.name.endswith(".partial"):
            (path / "PHANTOM.json").unlink()
            raise KeyboardInterrupt
        remove(path, **how)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        archives.write_archive("siim", place, 20, 64, 1, 1)
    monkeypatch.undo()
    assert archives.write_archive("siim", place, 20, 64, 0, 1) == mark
    place.rename(tmp_path / "siim.earlier")
    assert archives.write_archive("siim", place, 20, 64, 0, 1) == mark
    assert [p.name for p in tmp_path.iterdir()] == ["siim"]


def test_the_stage_draws_what_changed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").symlink_to(ROOT / "params.yaml")
    (tmp_path / "pipeline").symlink_to(ROOT / "pipeline")
    (tmp_path / "stages").symlink_to(ROOT / "stages")
    monkeypatch.setattr(mlflow_runs, "stage_run", lambda *_: nullcontext(Mock()))
    (tmp_path / "data/settings").mkdir(parents=True)

    def drawn(**studies: int) -> dict[str, tuple[str, float]]:
        settings = {"seed": 0, "size": 64, "archives": studies}
        (tmp_path / "data/settings/phantom.json").write_text(json.dumps(settings))
        stage.main()
        found = {p.stem: p for p in Path("data/phantom/stamps").iterdir()}
        for name, stamp in found.items():
            assert stamp.read_bytes() == Path(f"data/phantom/{name}/PHANTOM.json").read_bytes()
        return {n: (p.read_text(), Path(f"data/phantom/{n}/PHANTOM.txt").stat().st_mtime_ns) for n, p in found.items()}

    first, second = drawn(rsna=20, siim=20), drawn(rsna=20, siim=21)
    assert first["rsna"] == second["rsna"] and first["siim"][0] != second["siim"][0]
    assert drawn(siim=21) == {"siim": second["siim"]}  # the stamp of one that params.yaml does not name is gone
    for damage in (NOTE, "PHANTOM.json", "PHANTOM.txt"):
        (Path("data/phantom/siim") / damage).unlink()
        assert drawn(siim=21)["siim"][0] == second["siim"][0]
    image = next(Path("data/phantom/siim").rglob("*.dcm"))
    whole = image.read_bytes()
    image.write_bytes(b"")
    assert drawn(siim=21)["siim"][0] == second["siim"][0] and image.read_bytes() == whole
    assert drawn() == {}


FULL = """
import resource, sys
from pathlib import Path
from pipeline.phantom.archives import write_archive

resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # as a disk with room for 300 bytes
try:
    write_archive(sys.argv[1], Path(sys.argv[2]), 20, 64, 0, workers=1)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["mimic_cxr", "chestxray14", "rsna"])  # JPEG, PNG, DICOM
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    place = tmp_path / name
    done = subprocess.run([sys.executable, "-c", FULL, name, str(place)], capture_output=True, text=True, check=True)
    said = f"{place}: cannot be written (File too large); make room there, or draw less (phantom.archives.{name}, "
    assert done.stdout.startswith(said) and done.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())
