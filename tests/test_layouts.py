"""The forms in which people have the archives: as published, packed, re-exported, or their own."""

import json
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from test_sources import REAL, chexpert, chexpert_row, mimic, put, read_all, real, splits

from pipeline.config.archive_params import Ingest, Source
from pipeline.config.checks import check_stamps
from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.datasets import archives
from pipeline.ingest.build import ingest_archive
from pipeline.ingest.images import read_view
from pipeline.ingest.sources import SourceError, open_archive, read_archive
from pipeline.ingest.sources.list_places import image_id
from pipeline.phantom.archives import write_archive
from pipeline.storage.index import read_studies
from pipeline.study import Study
from stages import run


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    """Every archive in its public layout, 20 studies each."""
    root = tmp_path_factory.mktemp("phantoms")
    for dataset in archives():
        write_archive(dataset, root / dataset, 20, 64, 0, workers=1)
    return root


def ingested(dataset, source, folder):
    """The studies an ingest writes, less where their shards are, and its rejects by reason."""
    options = Ingest(short_side=32, shard_size=50, workers=1)
    summary = ingest_archive(dataset, source, options, folder / "shards", folder / "index.parquet", folder / "work", 0)
    studies = read_studies(folder / "index.parquet")
    return [s.with_views(replace(v, shard="") for v in s.views) for s in studies], summary["reasons"]


def pack(source: Path, target: Path):
    """All files below a folder in one zip or tar.gz, under its name, in another order than the folder's."""
    files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.name[::-1])
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(source.parent))
    else:
        with tarfile.open(target, "w:gz", compresslevel=1) as archive:
            for file in files:
                archive.add(file, file.relative_to(source.parent))


@pytest.mark.parametrize("dataset", archives())
@pytest.mark.parametrize("form", ["whole.zip", "images.tar.gz"])
def test_packed_archives_give_the_same_shards(phantoms, tmp_path, dataset, form):
    loose, reasons = ingested(dataset, Source(dataset, str(phantoms / dataset), ""), tmp_path / "loose")
    assert len(loose) > 10
    packed = tmp_path / "packed"
    if form == "whole.zip":
        pack(phantoms / dataset, packed / form)
    else:  # label files beside packed images, as the NIH gives them
        shutil.copytree(phantoms / dataset, packed)
        for folder in [p for p in packed.iterdir() if p.is_dir()]:
            pack(folder, packed / f"{folder.name}.tar.gz")
            shutil.rmtree(folder)
    again, others = ingested(dataset, Source(dataset, str(packed), ""), tmp_path / "again")
    assert again == loose and others == reasons


def test_mimic_reports_in_their_zip_and_images_as_dicom(phantoms, tmp_path):
    whole, _ = ingested("mimic_cxr", Source("mimic_cxr", str(phantoms / "mimic_cxr"), ""), tmp_path / "whole")
    shutil.copytree(phantoms / "mimic_cxr", tmp_path / "images")
    reports = list((tmp_path / "images").rglob("s*.txt"))
    with zipfile.ZipFile(tmp_path / "mimic-cxr-reports.zip", "w") as archive:
        for report in reports:
            archive.write(report, report.relative_to(tmp_path / "images"))
            report.unlink()
    source = Source("mimic_cxr", str(tmp_path / "images"), "", reports=str(tmp_path / "mimic-cxr-reports.zip"))
    assert ingested("mimic_cxr", source, tmp_path / "zip")[0] == whole
    with pytest.raises(SourceError, match=r"mimic-cxr-reports\.zip"):
        read_all("mimic_cxr", tmp_path / "images", reports=str(tmp_path / "none" / "mimic-cxr-reports.zip"))


def test_mimic_dicom_needs_no_metadata_file_but_jpeg_does(tmp_path):
    mimic(tmp_path, ["FINDINGS: Clear."])
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(SourceError, match="metadata"):
        read_all("mimic_cxr", tmp_path)
    image = tmp_path / "files/p10/p10000032/s50000000/d0-1.jpg"
    image.rename(image.with_suffix(".dcm"))
    ((study,), _) = read_all("mimic_cxr", tmp_path)
    assert [(v.position, v.path[-8:]) for v in study.views] == [("", "d0-1.dcm"), ("", "")]


def test_chexpert_in_batches_with_chexpert_plus(tmp_path):
    rows = [chexpert_row(n, prefix="CheXpert-v1.0/", Edema="1.0") for n in range(1, 9)]
    chexpert(tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)", rows, "CheXpert-v1.0/")
    for n in range(1, 9):
        folder = f"CheXpert-v1.0 batch {2 + n % 2} (train {1 + n % 2})"
        put(tmp_path, f"{folder}/patient{n:05}/study1/view1_frontal.jpg")
    put(tmp_path, "CheXpert-v1.0 batch 1 (validate & csv)/valid/patient00900/study1/view1_frontal.jpg")
    plus = [["path_to_image", "section_findings", "section_impression"]]
    plus += [[f"train/patient{n:05}/study1/view1_frontal.jpg", "", f"1. Edema {n} ."] for n in range(1, 9)]
    put(tmp_path, "df_chexpert_plus_240401.csv", plus)
    studies, rejects = read_all("chexpert", tmp_path)
    assert not rejects and len(studies) == 9 and splits(studies)["test"] == 2
    assert all(v.path.endswith(f"{s.patient}/study1/view1_frontal.jpg") for s in studies for v in s.views)
    said = {s.patient: (s.findings, s.impression) for s in studies}
    assert said["patient00003"] == (None, "1. Edema 3.") and said["patient00900"] == (None, None)
    assert all(s.impression for s in studies if s.split == "test")  # which makes retrieval possible without the list


def test_vindr_re_exported_as_png(phantoms, tmp_path):
    from PIL import Image

    shutil.copytree(phantoms / "vindr_cxr", tmp_path / "png")
    for file in (tmp_path / "png").rglob("*.dicom"):
        Image.fromarray(read_view(file.read_bytes())[0]).save(file.with_suffix(".png"))
        file.unlink()
    studies, reasons = ingested("vindr_cxr", Source("vindr_cxr", str(tmp_path / "png"), ""), tmp_path / "a")
    whole, _ = ingested("vindr_cxr", Source("vindr_cxr", str(phantoms / "vindr_cxr"), ""), tmp_path / "b")
    assert [(s.study, s.split, s.labels) for s in studies] == [(s.study, s.split, s.labels) for s in whole]
    assert not reasons


def test_the_stamp_changes_whenever_a_file_does(tmp_path, monkeypatch):
    from stages import fingerprint, settings

    profile = (Path(__file__).parents[1] / "profiles" / "micro.yaml").read_text()
    stamp = tmp_path / "data" / "fingerprints" / "siim.json"
    profile = profile.replace("data/phantom/stamps/siim.json", "data/fingerprints/siim.json")
    (tmp_path / "params.yaml").write_text(profile.replace("data/phantom/siim,", f"{tmp_path}/siim,"))
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "siim/a.dcm", "x")
    fingerprint.main()
    first = stamp.read_text()
    written = stamp.stat().st_mtime_ns
    fingerprint.main("siim")
    assert stamp.stat().st_mtime_ns == written
    put(tmp_path, "siim/a.dcm", "xy")
    fingerprint.main("siim")
    assert stamp.read_text() != first
    stamp.unlink()
    said = "sources.siim.stamp: data/fingerprints/siim.json not found; run: python -m stages.fingerprint"
    monkeypatch.setattr("sys.argv", ["settings"])
    with pytest.raises(SystemExit) as stopped:
        run("settings", settings.main)
    assert str(stopped.value) == f"settings: {said}"
    sources = load_params().sources
    check_stamps({name: source for name, source in sources.items() if name != "siim"})  # phantoms, yet to be drawn
    with pytest.raises(ParamsError, match=said) as error:
        check_stamps(sources)
    assert "\n" not in str(error.value)
    shutil.rmtree(tmp_path / "siim")
    with pytest.raises(SourceError, match=r"sources\.siim\.path"):
        fingerprint.main("siim")


# Splits by patient


@real
def test_real_chestxray14_by_patient(tmp_path):
    (tmp_path / "Data_Entry_2017_v2020.csv.gz").symlink_to(REAL / "Data_Entry_2017_v2020.csv.gz")
    studies, _ = read_all("chestxray14", tmp_path, split="patient", follow_links=True)
    assert splits(studies) == {"train": 90057, "valid": 22063}
    sides = {name: {s.patient for s in studies if s.split == name} for name in ("train", "valid")}
    assert not sides["train"] & sides["valid"]


def test_rsna_by_patient_of_chestxray14(tmp_path):
    rows = [[f"i{n:03}", "", "", "", "", n % 2] for n in range(90)]
    put(tmp_path, "stage_2_train_labels.csv", [["patientId", "x", "y", "width", "height", "Target"], *rows])
    with pytest.raises(SourceError, match="needs pneumonia-challenge-dataset-mappings"):
        read_all("rsna", tmp_path, split="patient")
    names = [{"subset_img_id": f"i{n:03}", "img_id": f"{n // 3:08}_{n % 3:03}.png"} for n in range(90)]
    put(tmp_path, "pneumonia-challenge-dataset-mappings_2018.json", json.dumps(names))
    studies, _ = read_all("rsna", tmp_path, split="patient")
    assert len(studies) == 90
    assert all(len({s.split for s in studies if s.patient == p}) == 1 for p in {s.patient for s in studies})
    assert splits(studies) == {"train": 63, "valid": 15, "test": 12}
    put(tmp_path, "pneumonia-challenge-dataset-mappings_2018.json", "[1]")
    with pytest.raises(SourceError, match="damaged"):
        read_all("rsna", tmp_path, split="patient")


# Your own


ROWS = [
    ["image", "study", "patient", "view", "report", "label:Edema", "label:Mass", "split"],
    ["a/1.png", "s1", "p1", "PA", "FINDINGS: Clear.\nIMPRESSION: Normal.", "0", "", "train"],
    ["a/2.png", "s1", "p1", "lateral", "", "", "", "train"],
    ["b.zip!/3.png", "s2", "p1", "", "IMPRESSION: Oedema.", "1", "-1", "val"],
    ["gone.png", "s3", "p2", "AP", "", "1", "", "test"],
    ["x.png", "s4", "p2", "oblique", "", "", "", ""],
    ["x.png", "s5", "p2", "", "", "2", "", ""],
    ["x.png", "s6", "p2", "", "", "", "", "later"],
    ["", "s7", "p2", "", "", "", "", ""],
]


@pytest.mark.parametrize("name", ["mine.csv", "mine.parquet"])
def test_a_manifest_is_a_source(tmp_path, name):
    put(tmp_path, "a/1.png")
    put(tmp_path, "a/2.png")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("3.png", b"")
    if name.endswith("csv"):
        put(tmp_path, name, ROWS)
    else:
        pd.DataFrame(ROWS[1:], columns=ROWS[0]).to_parquet(tmp_path / name)
    source = Source("manifest", str(tmp_path), "", manifest=name)
    items = list(read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0))
    studies = [i for i in items if isinstance(i, Study)]
    assert [(s.dataset, s.patient, s.study, s.split, s.findings, s.impression, s.labels) for s in studies] == [
        ("mine", "p1", "s1", "train", "Clear.", "Normal.", {"Edema": 0}),
        ("mine", "p1", "s2", "valid", None, "Oedema.", {"Edema": 1, "Mass": -1}),
        ("mine", "p2", "s3", "test", None, None, {"Edema": 1}),
    ]
    assert [[(v.id, v.position, v.path) for v in s.views] for s in studies] == [
        [(image_id("a/1.png"), "PA", "a/1.png"), (image_id("a/2.png"), "LATERAL", "a/2.png")],
        [(image_id("b.zip!/3.png"), "", "b.zip!/3.png")],
        [(image_id("gone.png"), "AP", "")],
    ]
    assert Counter(i.reason for i in items if not isinstance(i, Study)) == {
        "view 'oblique' is none of PA, AP, frontal, lateral, blank": 1,
        "label:Edema '2' is none of 1, 0, -1, blank": 1,
        "split is none of train, valid, test, blank": 1,
        "no image is named": 1,
    }


def test_a_manifest_of_images_alone(tmp_path):
    put(tmp_path, "m.csv", [["image"], ["1.png"], ["2.png"]])
    source = Source("manifest", str(tmp_path), "", manifest="m.csv")
    studies = list(read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0))
    ids = [image_id("1.png"), image_id("2.png")]
    assert [(s.patient, s.study, s.split, s.views[0].id) for s in studies] == [(i, i, "train", i) for i in ids]
    assert all(re.fullmatch("[0-9a-f]{16}", i) for i in ids) and ids[0] != image_id("a/1.png")
    put(tmp_path, "m.csv", [["picture"], ["1.png"]])
    with pytest.raises(SourceError, match="no column 'image'"):
        list(read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0))
