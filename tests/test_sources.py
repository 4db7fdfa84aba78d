import csv
import gzip
import io
import tarfile
import tempfile
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.archive_params import Source
from pipeline.datasets import archives, facts
from pipeline.ingest import sources
from pipeline.ingest.sources import SourceError, archive, open_archive, read_archive
from pipeline.study import Reject, Study

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
real = pytest.mark.skipif(not REAL.is_dir(), reason="real files not here")


def put(root, name, content=""):
    """Write one file; csv rows are given as lists, ``.gz`` and ``.zip`` are packed."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        buffer = io.StringIO()
        csv.writer(buffer).writerows(content)
        content = buffer.getvalue()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr(path.stem, content)
    else:
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())


def read_all(dataset, root, seed=0, **keys):
    source = Source(dataset, str(root), "", **keys)
    with tempfile.TemporaryDirectory() as cache:
        items = list(read_archive(open_archive(dataset, source.path, Path(cache), source.follow_links), source, seed))
    return [i for i in items if isinstance(i, Study)], [i for i in items if isinstance(i, Reject)]


def notes(root):
    source = Source("chexpert", str(root), "")
    return sources.archive_notes(open_archive("chexpert", source.path, root / "cache"), source)


def test_a_number_in_a_name_may_be_of_any_length(tmp_path):
    """Python makes no number of more than 4,300 digits; a name in a zip file may have 65,535."""
    xml = '<r><Abstract><AbstractText Label="FINDINGS">Clear.</AbstractText></Abstract><parentImage id="{}"/></r>'
    with zipfile.ZipFile(tmp_path / "reports.zip", "w") as packed:
        for name in ("9" * 5000, "10", "2", "0" * 6000 + "1"):
            packed.writestr(f"{name}.xml", xml.format(f"CXR{name[:5]}"))
    studies, rejects = read_all("openi", tmp_path)
    assert [len(s.study) for s in studies] == [6004, 4, 5, 5003] and not rejects


def splits(studies):
    return Counter(s.split for s in studies)


# The paper's splits


@pytest.mark.parametrize(("n", "share"), [(2, 0.5), (5, 0.2), (7, 0.3), (10, 0.3), (101, 0.2), (8006, 0.5)])
def test_split_is_that_of_scikit_learn(n, share):
    from sklearn.model_selection import train_test_split

    kept, held = train_test_split(list(range(n)), test_size=share, random_state=0)
    assert archive.split_two(n, share) == (kept, held)


def test_first_half_of_the_second_cut_is_test():
    from sklearn.model_selection import train_test_split

    train, rest = train_test_split(list(range(57)), test_size=0.3, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    found = archive.train_valid_test(57)
    assert [{i for i, s in enumerate(found) if s == name} for name in ("train", "test", "valid")] == [
        set(train),
        set(test),
        set(valid),
    ]


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_a_tiny_archive_splits_without_an_error(n):
    assert len(archive.train_valid(n)) == len(archive.train_valid_test(n)) == n
    assert "train" in archive.train_valid(n) or n == 0


@real
@pytest.mark.parametrize(
    ("dataset", "counts", "positives"),
    [
        ("rsna", (18678, 4003, 4003), (4162, 928, 922)),
        ("siim", (8432, 1808, 1807), (1860, 404, 405)),
    ],
)
def test_real_label_files_give_the_papers_counts(dataset, counts, positives):
    studies, rejects = read_all(dataset, REAL)
    assert rejects == []
    of_split = splits(studies)
    assert tuple(of_split[name] for name in ("train", "valid", "test")) == counts
    positive = splits(s for s in studies if 1 in s.labels.values())
    assert tuple(positive[name] for name in ("train", "valid", "test")) == positives


def test_the_list_nearest_to_the_root_is_the_archives_own(tmp_path):
    """A folder of other pictures below the archive may have a list of the same name, packed otherwise."""
    put(tmp_path, "nih/Data_Entry_2017.csv", "Image Index,Finding Labels,Patient ID,View Position\n")
    (tmp_path / "Data_Entry_2017.csv.gz").write_bytes(gzip.compress(b"x"))
    files = archive.open_archive("chestxray14", str(tmp_path), tmp_path / "cache")
    assert archive.find_table(files, ["Data_Entry_2017.csv"]) == "Data_Entry_2017.csv.gz"


@real
def test_real_chestxray14(tmp_path):
    for name in ("Data_Entry_2017_v2020.csv.gz", "00000001_000.png", "00027426_000.png"):
        (tmp_path / name).symlink_to(REAL / name)
    studies, rejects = read_all("chestxray14", tmp_path, follow_links=True)
    assert rejects == [] and splits(studies) == {"train": 89696, "valid": 22424}
    patients = {name: {s.patient for s in studies if s.split == name} for name in ("train", "valid")}
    assert (len(patients["valid"]), len(patients["valid"] & patients["train"])) == (11619, 7977)
    found = Counter(name for s in studies for name, value in s.labels.items() if value)
    with gzip.open(REAL / "Data_Entry_2017_v2020.csv.gz", "rt") as file:
        listed = Counter(name for row in csv.DictReader(file) for name in row["Finding Labels"].split("|"))
    assert found["Hernia"] == listed["Hernia"] == 227
    assert (
        found["Pleural Effusion"] == listed["Effusion"] and found["Pleural Thickening"] == listed["Pleural_Thickening"]
    )
    assert sum(not any(s.labels.values()) for s in studies) == listed["No Finding"]
    assert sum(bool(s.views[0].path) for s in studies) == 2  # the two PNGs that are there


@real
def test_real_openi():
    studies, rejects = read_all("openi", REAL)
    reasons = Counter(r.reason for r in rejects)
    assert len(studies) + len(rejects) == 3955
    assert reasons["neither findings nor impression"] == 3955 - 3927
    assert reasons["report is not well-formed XML"] == 0
    assert {s.split for s in studies} == {"test"}
    assert splits(read_all("openi", REAL, split="patient")[0]) == {"train": 3062, "valid": 380, "test": 384}
    assert studies[0].study == "CXR1" and studies[0].impression == "Normal chest x-ray."


# One archive each


def mimic(root, texts):
    rows = [
        (f"d{n}-{v}", f"5000000{n}", "10000032", "train" if n else "validate")
        for n in range(len(texts))
        for v in (1, 2)
    ]
    put(root, "mimic-cxr-2.0.0-split.csv.gz", [["dicom_id", "study_id", "subject_id", "split"], *rows])
    positions = ["PA", "LL", "AP", "LATERAL", "LAO", ""]
    header = ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows"]
    metadata = [[d, p, s, positions[i % 6], 9] for i, (d, s, p, _) in enumerate(rows)]
    put(root, "mimic-cxr-2.0.0-metadata.csv.gz", [header, *metadata])
    for n, text in enumerate(texts):
        if text is not None:
            put(root, f"files/p10/p10000032/s5000000{n}.txt", text)
        put(root, f"files/p10/p10000032/s5000000{n}/d{n}-1.jpg")


def test_mimic(tmp_path):
    mimic(tmp_path, ["FINDINGS: Clear.\nIMPRESSION: Normal.", "IMPRESSION: Nodule.", "INDICATION: Nothing said.", None])
    studies, rejects = read_all("mimic_cxr", tmp_path)
    assert [(s.study, s.split, s.findings, s.impression) for s in studies] == [
        ("50000000", "valid", "Clear.", "Normal."),
        ("50000001", "train", None, "Nodule."),
    ]
    assert [(v.id, v.position, v.path) for v in studies[0].views] == [
        ("d0-1", "PA", "files/p10/p10000032/s50000000/d0-1.jpg"),
        ("d0-2", "LATERAL", ""),
    ]
    assert [v.position for v in studies[1].views] == ["AP", "LATERAL"]
    assert [(r.kind, r.reason) for r in rejects] == [
        ("study", "neither findings nor impression"),
        ("study", "report missing or unreadable"),
    ]


def test_mimic_reports_under_another_root(tmp_path):
    mimic(tmp_path / "images", ["FINDINGS: Clear."])
    (tmp_path / "images/files/p10/p10000032/s50000000.txt").unlink()
    put(tmp_path, "reports/files/p10/p10000032/s50000000.txt", "IMPRESSION: Elsewhere.")
    studies, _ = read_all("mimic_cxr", tmp_path / "images", reports=str(tmp_path / "reports"))
    assert studies[0].impression == "Elsewhere."


CHEXPERT = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Enlarged Cardiomediastinum",
            "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis",
            "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices"]  # fmt: skip


def chexpert_row(patient, view="view1_frontal", split="train", prefix="CheXpert-v1.0-small/", **labels):
    cells = {name.replace("_", " "): value for name, value in labels.items()}
    side = ["Frontal", "AP"] if "frontal" in view else ["Lateral", ""]
    return [
        f"{prefix}{split}/patient{patient:05}/study1/{view}.jpg",
        "Male",
        60,
        *side,
        *(cells.get(n, "") for n in CHEXPERT[5:]),
    ]


def chexpert(root, rows, prefix="CheXpert-v1.0-small/"):
    put(root, "train.csv", [CHEXPERT, *rows])
    put(root, "valid.csv", [CHEXPERT, chexpert_row(900, split="valid", prefix=prefix, Edema="1.0")])


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small/", "CheXpert-v1.0/", ""])
def test_chexpert_with_its_list(tmp_path, prefix):
    rows = [
        chexpert_row(1, prefix=prefix, Edema="1.0", Fracture="-1.0", Pneumonia="0.0"),
        chexpert_row(1, "view2_lateral", prefix=prefix, Edema="1.0", Fracture="-1.0", Pneumonia="0.0"),
        chexpert_row(2, prefix=prefix, Atelectasis="1.0"),
        chexpert_row(2, "view2_lateral", prefix=prefix, Atelectasis="1.0"),
        chexpert_row(3, prefix=prefix, Edema="maybe"),
    ]
    chexpert(tmp_path, rows, prefix)
    header = ["Path", "Report Impression", "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]
    listed = "CheXpert-v1.0/train/patient00002/study1/view1_frontal.jpg"
    put(tmp_path, "chexpert_5x200.csv", [header, [listed, "1. Bibasilar\natelectasis ___.", "1", "0", "", "0", "0"]])
    for name in ("train/patient00001/study1/view1_frontal.jpg", "train/patient00002/study1/view1_frontal.jpg"):
        put(tmp_path, name)
    studies, rejects = read_all("chexpert", tmp_path)
    train, valid, test = studies
    assert (train.split, train.patient, train.study) == ("train", "patient00001", "study1")
    assert train.labels == {"Edema": 1, "Fracture": -1, "Pneumonia": 0}
    assert [(v.position, v.path) for v in train.views] == [
        ("AP", "train/patient00001/study1/view1_frontal.jpg"),
        ("LATERAL", ""),
    ]
    assert (valid.split, valid.patient) == ("valid", "patient00900")
    assert (test.split, test.patient, test.impression) == ("test", "patient00002", "1. Bibasilar atelectasis.")
    assert test.labels == {"Atelectasis": 1, "Cardiomegaly": 0, "Consolidation": 0, "Edema": 0, "Pleural Effusion": 0}
    assert [(v.position, v.path) for v in test.views] == [("AP", "train/patient00002/study1/view1_frontal.jpg")]
    assert [(r.kind, r.reason) for r in rejects] == [("row", "label of Edema is none of 1, 0, -1, blank")]
    assert notes(tmp_path) == []


def test_chexpert_without_its_list_draws_one_by_the_rule(tmp_path):
    five = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural_Effusion"]
    rows = [chexpert_row(100 * c + n, **{name: "1.0"}) for c, name in enumerate(five) for n in range(8)]
    rows += [chexpert_row(600 + n, Edema="1.0", Cardiomegaly="-1.0") for n in range(40)]
    rows += [chexpert_row(700 + n, Edema="1.0", Cardiomegaly="1.0") for n in range(40)]
    rows += [chexpert_row(800 + n, "view1_lateral", Edema="1.0") for n in range(40)]
    chexpert(tmp_path, rows)
    studies, _ = read_all("chexpert", tmp_path)
    test = [s for s in studies if s.split == "test"]
    assert [next(n for n, v in s.labels.items() if v) for s in test] == [
        n.replace("_", " ") for n in five for _ in range(2)
    ]
    assert all(sum(s.labels.values()) == 1 and "frontal" in s.views[0].id for s in test)
    assert int(max(s.patient for s in test)[7:]) < 600
    assert not {s.patient for s in test} & {s.patient for s in studies if s.split == "train"}
    assert read_all("chexpert", tmp_path)[0] == studies
    assert read_all("chexpert", tmp_path, seed=1)[0] != studies
    (note,) = notes(tmp_path)
    assert "seeded list" in note


def test_chexpert_list_that_is_named_but_missing(tmp_path):
    chexpert(tmp_path, [chexpert_row(1)])
    with pytest.raises(SourceError, match=r"sources\.chexpert\.list_5x200"):
        read_all("chexpert", tmp_path, list_5x200=str(tmp_path / "none.csv"))


@pytest.mark.parametrize("folder", ["images", "images_003/images", "."])
def test_chestxray14(tmp_path, folder):
    header = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "View Position"]
    rows = [
        [f"{n:08}_000.png", label, 0, n, "PA"]
        for n, label in enumerate(["No Finding", "Effusion|Pleural_Thickening", "Flu"])
    ]
    put(tmp_path, "Data_Entry_2017_v2020.csv", [header, *rows])
    put(tmp_path, f"{folder}/00000001_000.png")
    studies, rejects = read_all("chestxray14", tmp_path)
    assert len(studies[0].labels) == 14 and not any(studies[0].labels.values())
    assert {n for n, v in studies[1].labels.items() if v} == {"Pleural Effusion", "Pleural Thickening"}
    assert studies[0].views[0].path == "" and Path(studies[1].views[0].path) == Path(folder) / "00000001_000.png"
    assert studies[1].views[0].position == "PA"
    assert [(r.item, r.kind) for r in rejects] == [("00000002_000.png", "row")]


def test_chestxray14_by_its_official_lists(tmp_path):
    """60 patients with three images each; those whose number ends in 3 or 7 are the test list."""
    header = ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "View Position"]
    rows = [[f"{n // 3:08}_{n % 3:03}.png", "Mass", n % 3, n // 3, "AP"] for n in range(180)]
    put(tmp_path, "Data_Entry_2017.csv", [header, *rows, ["00000099_000.png", "Mass", 0, 99, "AP"]])
    lists = {"train_val_list.txt": [], "test_list.txt": []}
    for name, _, _, patient, _ in rows:
        lists["test_list.txt" if patient % 10 in (3, 7) else "train_val_list.txt"].append(name)
    put(tmp_path, "lists/test_list.txt", "\r\n".join(lists["test_list.txt"]))
    with pytest.raises(SourceError, match=r"official list train_val_list\.txt not found"):
        read_all("chestxray14", tmp_path, split="official")
    put(tmp_path, "lists/train_val_list.txt", "\n".join(lists["train_val_list.txt"]) + "\n")
    studies, rejects = read_all("chestxray14", tmp_path, split="official")
    of = {part: {s.patient for s in studies if s.split == part} for part in ("train", "valid", "test")}
    assert of["test"] == {str(n) for n in range(60) if n % 10 in (3, 7)}
    assert splits(studies)["test"] == 36 and len(of["valid"]) == 5 and len(of["train"]) == 43  # a tenth of 48
    assert not of["train"] & of["valid"] and not of["test"] & (of["train"] | of["valid"])
    assert [(r.item, r.kind) for r in rejects] == [("00000099_000.png", "row")]  # in neither list
    put(tmp_path, "lists/test_list.txt", "00000000_000.png")
    with pytest.raises(SourceError, match=r"1 of its images are in train_val_list\.txt, too"):
        read_all("chestxray14", tmp_path, split="official")


def test_an_archive_read_twice_has_two_names(tmp_path):
    header = ["Image Index", "Finding Labels", "Patient ID", "View Position"]
    put(tmp_path, "Data_Entry_2017.csv", [header, ["1.png", "Mass", 1, "AP"], ["2.png", "Flu", 2, "AP"]])
    put(tmp_path, "train_val_list.txt", "1.png\n2.png")
    put(tmp_path, "test_list.txt", "")
    source = Source("chestxray14", str(tmp_path), "", split="official")
    opened = open_archive("chestxray14_official", source.path, tmp_path / "cache")
    assert {item.dataset for item in read_archive(opened, source, 0)} == {"chestxray14_official"}


@real
def test_real_chestxray14_by_lists(tmp_path):
    """Lists drawn by patient beside the real labels, which are not to be copied: 25,596 / 86,524 are the owner's."""
    (tmp_path / "Data_Entry_2017_v2020.csv.gz").symlink_to(REAL / "Data_Entry_2017_v2020.csv.gz")
    with gzip.open(REAL / "Data_Entry_2017_v2020.csv.gz", "rt") as file:
        patients = {row["Image Index"]: int(row["Patient ID"]) for row in csv.DictReader(file)}
    for name, tested in (("test_list.txt", True), ("train_val_list.txt", False)):
        put(tmp_path, name, "\n".join(image for image, p in patients.items() if (p % 5 == 0) == tested))
    studies, rejects = read_all("chestxray14", tmp_path, split="official", follow_links=True)
    assert rejects == [] and len(studies) == 112120
    of = {part: {int(s.patient) for s in studies if s.split == part} for part in ("train", "valid", "test")}
    assert of["test"] == {p for p in patients.values() if p % 5 == 0}
    rest = {p for p in patients.values() if p % 5}
    assert of["train"] | of["valid"] == rest and not of["train"] & of["valid"]
    assert len(of["valid"]) == -(-len(rest) // 10)


def test_vindr_any_reader_makes_it_positive(tmp_path):
    header = ["image_id", "rad_id", "Aortic enlargement", " Pneumonia "]
    rows = [[i, f"R{r}", 0, int(i == "b" and r == 2)] for i in "cab" for r in (1, 2, 3)]
    rows += [["bad", "R1", 0, 1], ["bad", "R2", "x", 1]]
    put(tmp_path, "annotations/image_labels_train.csv", [header, *rows])
    put(tmp_path, "annotations/image_labels_test.csv", [["image_id", "Aortic enlargement", "Pneumonia"], ["t", 1, 0]])
    put(tmp_path, "train/b.dicom")
    put(tmp_path, "test/t.dicom")
    studies, rejects = read_all("vindr_cxr", tmp_path)
    assert [s.study for s in studies] == ["a", "b", "c", "t"]
    assert [s.labels for s in studies[:2]] == [
        {"Aortic enlargement": 0, "Pneumonia": 0},
        {"Aortic enlargement": 0, "Pneumonia": 1},
    ]
    assert splits(studies) == {"train": 2, "valid": 1, "test": 1}
    assert [s.views[0].path for s in studies] == ["", "train/b.dicom", "", "test/t.dicom"]
    assert [r.item for r in rejects] == ["bad", "bad"]


@pytest.mark.parametrize(
    "name", ["stage_2_train_labels.csv", "stage_2_train_labels.csv.zip", "kaggle_stage_2_train_labels.csv.gz"]
)
def test_rsna(tmp_path, name):
    rows = [["b", 1, 2, 3, 4, 1], ["a", "", "", "", "", 0], ["b", 5, 6, 7, 8, 1], ["c", "", "", "", "", 7]]
    put(tmp_path, name, [["patientId", "x", "y", "width", "height", "Target"], *rows])
    put(tmp_path, "stage_2_train_images/a.dcm")
    studies, rejects = read_all("rsna", tmp_path)
    assert {s.study: (s.labels["Pneumonia"], s.views[0].path) for s in studies} == {
        "a": (0, "stage_2_train_images/a.dcm"),
        "b": (1, ""),
    }
    assert [(r.item, r.reason) for r in rejects] == [("c", "Target is neither 1 nor 0")]


def test_siim_rows_of_one_image_are_one_study(tmp_path):
    rows = [["1.2.3", " 10 2 30 4"], ["1.2.3", " 90 1"], ["1.2.4", " -1"], ["1.2.5", "?"]]
    put(tmp_path, "train-rle.csv", [["ImageId", " EncodedPixels"], *rows, ["1.2.6", "1 2 " * 60000]])
    put(tmp_path, "dicom-images-train/9/9.1/1.2.3.dcm")
    studies, rejects = read_all("siim", tmp_path)
    assert [(s.study, s.labels["Pneumothorax"], s.views[0].path) for s in studies] == [
        ("1.2.3", 1, "dicom-images-train/9/9.1/1.2.3.dcm"),
        ("1.2.4", 0, ""),
        ("1.2.6", 1, ""),
    ]
    assert [r.item for r in rejects] == ["1.2.5"]


def report(findings="", impression="", images=()):
    text = "".join(
        f'<AbstractText Label="{k}">{v}</AbstractText>' for k, v in (("FINDINGS", findings), ("IMPRESSION", impression))
    )
    return (
        f"<eCitation><MedlineCitation>{text}</MedlineCitation>"
        + "".join(f'<parentImage id="{i}"/>' for i in images)
        + "</eCitation>"
    )


REPORTS = {
    "1.xml": report("Clear &amp; <b>dry</b>.", "", ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]),
    "10.xml": report("", "No XXXX disease.", ["CXR10_IM-0002-1001"]),
    "20.xml": report("XXXX.", " ", ["CXR2_IM-0652-1001"]),
    "3.xml": report("Fine.", "Fine."),
    "4.xml": "<eCitation>",
    "5.xml": '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + report("&a;", "b", ["CXR5_IM-1"]),
}


@pytest.mark.parametrize("packed", [False, True])
def test_openi(tmp_path, packed):
    if packed:
        with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as tar:
            for name, text in REPORTS.items():
                info = tarfile.TarInfo(f"ecgen-radiology/{name}")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text.encode()))
    else:
        for name, text in REPORTS.items():
            put(tmp_path, f"ecgen-radiology/{name}", text)
    put(tmp_path, "NLMCXR_png/CXR1_1_IM-0001-3001.png")
    put(tmp_path, "NLMCXR_dcm/1/1_IM-0001-3001.dcm")
    put(tmp_path, "NLMCXR_png/CXR10_IM-0002-1001.png")
    rows = [
        ["uid", "filename", "projection"],
        [1, "1_IM-0001-3001.dcm.png", "Frontal"],
        [1, "1_IM-0001-4001.dcm.png", "Lateral"],
    ]
    put(tmp_path, "indiana_projections.csv", rows)
    studies, rejects = read_all("openi", tmp_path)
    assert [(s.study, s.split, s.findings, s.impression) for s in studies] == [
        ("CXR1", "test", "Clear & dry.", None),
        ("CXR10", "test", None, "No disease."),
    ]
    assert [(v.position, v.path) for s in studies for v in s.views] == [
        ("PA", "NLMCXR_dcm/1/1_IM-0001-3001.dcm"),
        ("LATERAL", ""),
        ("", "NLMCXR_png/CXR10_IM-0002-1001.png"),
    ]
    assert [(r.item, r.reason) for r in rejects] == [
        ("3.xml", "the report lists no image"),
        ("4.xml", "report is not well-formed XML"),
        ("5.xml", "report is not well-formed XML"),
        ("20.xml", "neither findings nor impression"),
    ]


def test_openi_by_patient(tmp_path):
    """100 reports, one of them there twice, one unusable: 80 / 10 / 10 of all by scikit-learn's own cuts."""
    from sklearn.model_selection import train_test_split

    texts = {n: report(f"Text {n}.", "", [f"CXR{n}_{n}_IM-{n:04}-1001"]) for n in range(1, 101)} | {60: "no report"}
    for n, text in texts.items():
        put(tmp_path, f"ecgen-radiology/{n}.xml", text)
    put(tmp_path, "again/7.xml", texts[7])
    studies, rejects = read_all("openi", tmp_path, split="patient")
    assert [r.item for r in rejects] == ["60.xml"] and len(studies) == 100
    train, rest = train_test_split(list(range(1, 101)), test_size=0.2, random_state=0)
    test, valid = train_test_split(rest, test_size=0.5, random_state=0)
    for name, wanted in (("train", train), ("valid", valid), ("test", test)):
        assert {s.study for s in studies if s.split == name} == {f"CXR{n}" for n in wanted} - {"CXR60"}
    whole, _ = read_all("openi", tmp_path)
    assert splits(whole) == {"test": 100}
    assert [replace(s, split="test") for s in studies] == whole
    again, source = open_archive("openi_by_patient", str(tmp_path), tmp_path), Source("openi", "", "", split="patient")
    items = list(read_archive(again, source, 0))
    assert len(items) == 101 and {item.dataset for item in items} == {"openi_by_patient"}
    assert sources.archive_notes(again, source) == []
    (note,) = sources.archive_notes(open_archive("openi", str(tmp_path), tmp_path), source)
    assert "by patient, not as the paper" in note


# Bad input


@pytest.mark.parametrize("dataset", archives())
def test_missing_archive_names_path_and_where_to_get_it(tmp_path, dataset):
    with pytest.raises(SourceError) as error:
        read_all(dataset, tmp_path / "none")
    said = str(error.value)
    assert str(tmp_path / "none") in said and f"sources.{dataset}" in said and facts(dataset).access in said
    assert "\n" not in said


@pytest.mark.parametrize("dataset", archives())
def test_empty_archive_names_the_label_file(tmp_path, dataset):
    with pytest.raises(SourceError, match=r"not found|no report") as error:
        read_all(dataset, tmp_path)
    assert str(tmp_path) in str(error.value) and facts(dataset).access in str(error.value)


def test_missing_column_and_damaged_file(tmp_path):
    put(tmp_path, "train-rle.csv", [["Image", "EncodedPixels"]])
    with pytest.raises(SourceError, match="no column 'ImageId'"):
        read_all("siim", tmp_path)
    (tmp_path / "train-rle.csv").unlink()
    (tmp_path / "train-rle.csv.gz").write_bytes(gzip.compress(b"ImageId,EncodedPixels\n" * 99)[:40])
    with pytest.raises(SourceError, match="damaged"):
        read_all("siim", tmp_path)


def test_truncated_reports_archive(tmp_path):
    (tmp_path / "NLMCXR_reports.tgz").write_bytes(b"\x1f\x8b" + bytes(40))
    with pytest.raises(SourceError, match="damaged"):
        read_all("openi", tmp_path)


REPORT = b"""<?xml version="1.0" encoding="utf-8"?>
<eCitation><MedlineCitation><Article><Abstract>
<AbstractText Label="FINDINGS">The lungs are clear &amp; the heart is normal.</AbstractText>
<AbstractText Label="IMPRESSION">No acute disease.</AbstractText>
</Abstract></Article></MedlineCitation><parentImage id="CXR1_1_IM-0001-3001"/></eCitation>"""


def fuzzed_xml(count, seed):
    """What becomes of mutated reports: a study or a reason, never anything else."""
    from pipeline.ingest.sources.openi import _study

    rng = np.random.default_rng(seed)
    outcomes = Counter()
    for _ in range(count):
        data = bytearray(REPORT)
        for _ in range(rng.integers(1, 6)):
            at, length = int(rng.integers(len(data))), int(rng.integers(1, 40))
            match rng.integers(4):
                case 0:
                    data[at] ^= 1 << int(rng.integers(8))
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = data[max(0, at - length) : at]
                case _:
                    data[at:at] = rng.bytes(length)
        result = _study("openi", "1.xml", "test", bytes(data))
        outcomes[result.reason if isinstance(result, Reject) else "read"] += 1
    return outcomes


def test_fuzzed_reports_are_read_or_refused():
    assert set(fuzzed_xml(500, 0)) <= {
        "read",
        "report is not well-formed XML",
        "neither findings nor impression",
        "the report lists no image",
    }


@pytest.mark.drill
def test_many_fuzzed_reports_are_read_or_refused():
    print(fuzzed_xml(20_000, 1))


def test_unknown_dataset(tmp_path):
    with pytest.raises(SourceError, match="padchest"):
        read_all("padchest", tmp_path)
