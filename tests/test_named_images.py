"""Which file is the picture that a published list names."""

import csv
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from pipeline.config.archive_params import Source
from pipeline.ingest.sources import SourceError, open_archive, read_archive
from pipeline.ingest.sources.chexpert import CHEXPERT_CLASSES
from pipeline.study import Reject

HEADER = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "View Position"]
NAMES = [f"{n:08}_000.png" for n in range(1, 7)]


def picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24), dtype=np.uint8)).save(path)


def table(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def chestxray14(root, *folders, ids=str):
    """The archive with its pictures in some folders, in each of them others."""
    for seed, folder in enumerate(folders):
        for n, name in enumerate(NAMES):
            picture(root / folder / name, 100 * seed + n)
    rows = [[name, "Effusion", 0, ids(n), 60, "PA"] for n, name in enumerate(NAMES)]
    table(root / "Data_Entry_2017_v2020.csv", HEADER, *rows)
    return root


def listed(dataset, root):
    archive = open_archive(dataset, str(root), root.parent / "cache")
    items = list(read_archive(archive, Source(dataset, str(root), ""), 0))
    return [i for i in items if not isinstance(i, Reject)], [i for i in items if isinstance(i, Reject)], archive


@pytest.mark.parametrize("folder", ["LungMasks", "a_segmentations/left", "Thumbnails", "annotated/heatmaps"])
def test_what_is_made_from_pictures_never_takes_their_place(tmp_path, folder):
    studies, _, archive = listed("chestxray14", chestxray14(tmp_path / "a", folder, "images"))
    assert [s.views[0].path for s in studies] == [f"images/{name}" for name in NAMES]
    assert archive.notes == [
        "6 images are passed over: their folders are named as those of masks, thumbnails or the like"
    ]
    shutil.rmtree(tmp_path / "a" / "images")  # then there are other images than these, but not of these names
    picture(tmp_path / "a" / "images" / "other.png", 0)
    assert {s.views[0].path for s in listed("chestxray14", tmp_path / "a")[0]} == {""}


@pytest.mark.parametrize("folder", ["images_256", "aaa", "zzz/deep"])
def test_two_pictures_of_one_name_are_an_error_that_names_both(tmp_path, folder):
    with pytest.raises(SourceError, match="are two pictures of one name") as error:
        listed("chestxray14", chestxray14(tmp_path / "a", "images", folder))
    assert "images/" in str(error.value) and f"{folder}/" in str(error.value)


def test_copies_are_one_picture(tmp_path):
    chestxray14(tmp_path / "a", "images")
    shutil.copytree(tmp_path / "a" / "images", tmp_path / "a" / "copy")
    assert {s.views[0].path.split("/")[0] for s in listed("chestxray14", tmp_path / "a")[0]} == {"copy"}


def test_of_two_formats_the_better_one_is_taken(tmp_path):
    chestxray14(tmp_path / "a", "images")
    for n, name in enumerate(NAMES):
        picture(tmp_path / "a" / "aaa" / name.replace(".png", ".jpg"), n)
    studies, _, archive = listed("chestxray14", tmp_path / "a")
    assert {s.views[0].path.split("/")[0] for s in studies} == {"images"}
    assert [n for n in archive.notes if "two formats" in n and "6 images" in n and "images/" in n and "aaa/" in n]


def test_ids_that_pandas_made_numbers_are_the_same_patients(tmp_path):
    plain = listed("chestxray14", chestxray14(tmp_path / "a", "images"))[0]
    saved = listed("chestxray14", chestxray14(tmp_path / "b", "images", ids=lambda n: f"{n}.0"))[0]
    assert [(s.patient, s.split) for s in plain] == [(s.patient, s.split) for s in saved]


@pytest.mark.parametrize("index", [["Unnamed: 0"], [""], []])
def test_vindrs_lists_saved_by_pandas(tmp_path, index):
    for part, readers in (("train", [["R1"], ["R2"], ["R3"]]), ("test", [[]])):
        names = [*index, "image_id", *(["rad_id"] if part == "train" else []), "Aortic enlargement", "No finding"]
        numbers = [0] if index else []
        rows = [[*numbers, f"{part}{n}", *r, f"{n % 2}.0", f"{1 - n % 2}.0"] for n in range(4) for r in readers]
        table(tmp_path / "a" / f"image_labels_{part}.csv", names, *rows)
        for n in range(4):
            picture(tmp_path / "a" / part / f"{part}{n}.png", n)
    studies, rejects, _ = listed("vindr_cxr", tmp_path / "a")
    assert not rejects and len(studies) == 8
    assert all(set(s.labels) == {"Aortic enlargement", "No finding"} for s in studies)


def test_chexperts_paths_of_windows_and_a_macs_files(tmp_path):
    root = tmp_path / "a"
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_CLASSES]
    for split, numbers in (("train", range(1, 8)), ("valid", (64541,))):
        rows = []
        for n in numbers:
            place = f"{split}/patient{n:05}/study1/view1_frontal.jpg"
            picture(root / place, n)
            (root / place).with_name("._view1_frontal.jpg").write_bytes(b"Mac OS X")
            path = f"CheXpert-v1.0-small/{place}".replace("/", "\\")
            rows.append([path, "Male", 60, "Frontal", "AP", "1.0", *[""] * 13])
        table(root / f"{split}.csv", header, *rows)
        (root / f"._{split}.csv").write_bytes(b"\0\5\x16\7Mac OS X")
    studies, rejects, archive = listed("chexpert", root)
    assert not rejects and len(studies) == 8 and all(v.path for s in studies for v in s.views)
    assert len(archive.images) == 8


def test_a_zip_that_windows_wrote(tmp_path):
    chestxray14(tmp_path / "a", "images")
    with zipfile.ZipFile(tmp_path / "a" / "images_001.zip", "w") as packed:
        for name in NAMES:
            entry = zipfile.ZipInfo("x")
            entry.filename = f"images\\{name}"  # as some programs write it, against APPNOTE 4.4.17
            packed.writestr(entry, (tmp_path / "a" / "images" / name).read_bytes())
    shutil.rmtree(tmp_path / "a" / "images")
    studies, _, archive = listed("chestxray14", tmp_path / "a")
    assert [s.views[0].path for s in studies] == [f"images_001.zip!/images/{name}" for name in NAMES]
    assert archive.files.read(studies[0].views[0].path, 1 << 20).startswith(b"\x89PNG")
