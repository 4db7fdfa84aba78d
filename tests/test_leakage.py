import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.audit import copies, leakage, neighbours
from pipeline.audit.copies import AuditImage
from pipeline.audit.leakage import image_id
from pipeline.config.archive_params import Ingest, Source
from pipeline.config.run_config import Roles
from pipeline.evaluation.seen_images import clean_images, load_seen_images
from pipeline.ingest.build import ingest_archive
from pipeline.ingest.sources import open_archive, read_archive
from pipeline.phantom.archives import write_archive
from pipeline.storage.index import read_studies
from pipeline.storage.pictures import encode
from pipeline.storage.shards import EncodedPicture, ShardWriter
from pipeline.study import View
from pipeline.training.corpus import write_corpus
from tests.conftest import make_mixed


def image(dataset, patient, split, study="s", view="v"):
    return AuditImage(dataset, patient, f"{patient}{study}", split, View(view))


NIH_A1 = image("chestxray14", "A", "train", "1")
NIH_A2 = image("chestxray14", "A", "valid", "2")
NIH_B = image("chestxray14", "B", "test")
RSNA_OF_A1 = image("rsna", "r1", "test")  # a copy of a training image
RSNA_OF_A2 = image("rsna", "r2", "test")  # a copy of another image of that patient
RSNA_OF_B = image("rsna", "r3", "train")
RSNA_ALONE = image("rsna", "r4", "test")
SIIM_OF_B = image("siim", "i1", "test")  # a copy of the copy that RSNA's training set holds
MIMIC = image("mimic_cxr", "A", "train")  # the same id, another hospital's person
MIMIC_TEST = image("mimic_cxr", "A", "test", "2")  # the same person's other study
IMAGES = [NIH_A1, NIH_A2, NIH_B, RSNA_OF_A1, RSNA_OF_A2, RSNA_OF_B, RSNA_ALONE, SIIM_OF_B, MIMIC, MIMIC_TEST]
PAIRS = [
    (image_id(a), image_id(b))
    for a, b in [(NIH_A1, RSNA_OF_A1), (NIH_A2, RSNA_OF_A2), (NIH_B, RSNA_OF_B), (RSNA_OF_B, SIIM_OF_B)]
]


def seen():
    return leakage.seen(IMAGES, leakage.groups(IMAGES, PAIRS))


def test_groups_join_copies_of_copies():
    group = leakage.groups(IMAGES, PAIRS)
    assert group[IMAGES.index(NIH_B)] == group[IMAGES.index(RSNA_OF_B)] == group[IMAGES.index(SIIM_OF_B)]
    assert len(set(group)) == len(IMAGES) - len(PAIRS)
    assert leakage.groups(IMAGES, [(b, a) for a, b in reversed(PAIRS)]) == group
    with pytest.raises(ValueError, match="does not hold"):
        leakage.groups(IMAGES[1:], PAIRS)


def test_an_image_inherits_the_patients_of_its_copies():
    people = dict(zip(map(image_id, IMAGES), leakage.persons(IMAGES, leakage.groups(IMAGES, PAIRS)), strict=True))
    assert people[image_id(RSNA_OF_A2)] == {("chestxray14", "A")}
    assert people[image_id(SIIM_OF_B)] == {("chestxray14", "B")}
    assert people[image_id(RSNA_ALONE)] == frozenset()
    assert people[image_id(MIMIC)] == {("mimic_cxr", "A")}


def test_what_each_test_image_was_seen_in():
    rows = {(r["dataset"], r["patient"], r["training_set"], r["training_split"]): r["how"] for r in seen()}
    assert rows == {
        ("rsna", "r1", "chestxray14", "train"): "duplicate",
        ("rsna", "r1", "chestxray14", "valid"): "patient",  # A has an image there too
        ("rsna", "r2", "chestxray14", "valid"): "duplicate",
        ("rsna", "r2", "chestxray14", "train"): "patient",  # found through pixels alone
        ("chestxray14", "B", "rsna", "train"): "duplicate",
        ("siim", "i1", "rsna", "train"): "duplicate",  # through the copy in ChestX-ray14
        ("mimic_cxr", "A", "mimic_cxr", "train"): "patient",  # not ChestX-ray14's A
    }


def test_counts_and_what_is_not_known():
    frame = leakage.leakage_table(IMAGES, seen()).set_index(["test_set", "training_set", "training_split"])
    line = frame.loc[("rsna", "chestxray14", "train")]
    assert (line["images"], line["duplicates"], line["patients"]) == (3, 1, 1)
    assert line["patients_known"] == "through copies" and not line["own"]
    own = frame.loc[("mimic_cxr", "mimic_cxr", "train")]
    assert (own["duplicates"], own["patients"], own["patients_known"], own["own"]) == (0, 1, "yes", True)
    assert ("rsna", "rsna", "train") in frame.index and ("siim", "siim", "train") not in frame.index
    assert "vindr_cxr" not in frame.index.get_level_values(0)


def test_the_page_says_what_it_does_not_know():
    frame = leakage.leakage_table(IMAGES, seen())
    text = leakage.leakage_markdown(frame, {"images": 1234, "pairs": 4}, leakage.across_splits(IMAGES))
    assert "| rsna (3) | 0 copies, patients unknown | 1 copies, ≥ 1 by patient | 0 copies, patients unknown |" in text
    assert "| mimic_cxr (1) | 0 copies, 1 by patient |" in text
    assert "| 1,234 | 4 |" in text and "- rsna: unknown" in text
    assert "- mimic_cxr: train/valid 0, train/test 1, valid/test 0" in text
    assert "- chestxray14: train/valid 1, train/test 0, valid/test 0" in text


def test_a_data_set_of_ones_own_is_a_training_and_a_test_set():
    mine = [image("ours", "1", "train"), image("ours", "2", "test", "t")]
    pairs = [*PAIRS, (image_id(mine[0]), image_id(RSNA_ALONE))]
    images = [*IMAGES, *mine]
    rows = leakage.seen(images, leakage.groups(images, pairs))
    frame = leakage.leakage_table(images, rows)
    lines = frame.set_index(["test_set", "training_set", "training_split"])
    assert lines.loc[("rsna", "ours", "train")]["duplicates"] == 1
    assert lines.loc[("ours", "mimic_cxr", "train")]["images"] == 1
    head = "| test set (images) | mimic_cxr | chestxray14 | ours | own |"
    assert head in leakage.leakage_markdown(frame, {"images": 1}, {})


def test_the_official_test_list_is_seen_by_who_trained_on_the_papers_split():
    """NIH_A1 is in training and NIH_A2 in validation there; B is another patient, whom only the official split has."""
    official = "chestxray14_official"
    tests = [image(official, "A", "test", "1"), image(official, "A", "test", "3"), image(official, "B", "test")]
    own = [image(official, "C", "train")]
    pairs = [*PAIRS, (image_id(NIH_A1), image_id(tests[0]))]
    images = [*IMAGES, *tests, *own]
    rows = leakage.seen(images, leakage.groups(images, pairs))
    found = {(r["study"], r["view"], r["training_set"], r["training_split"]): r["how"] for r in rows}
    shown = {
        (t.study, t.view.id): [found.get((t.study, t.view.id, d, "train")) for d in ("chestxray14", official)]
        for t in tests
    }
    assert shown[tests[0].study, tests[0].view.id] == ["duplicate", None]
    assert shown[tests[2].study, tests[2].view.id] == [None, None]
    frame = leakage.leakage_table(images, rows).set_index(["test_set", "training_set", "training_split"])
    line = frame.loc[(official, "chestxray14", "train")]
    assert (line["images"], line["duplicates"]) == (3, 1)
    assert frame.loc[(official, official, "train")]["patients_known"] == "yes"


def test_an_archive_by_two_splits_from_its_files_to_clean_images(tmp_path, monkeypatch):
    """A phantom of 40 images: the paper's split has shown every image of the official test list, as itself."""
    monkeypatch.setattr(neighbours, "GRID", 16)
    monkeypatch.chdir(tmp_path)
    write_archive("chestxray14", tmp_path / "phantom", 40, 64, 0, 1)
    images, tests = [], []
    for dataset, split in (("chestxray14", "paper"), ("chestxray14_official", "official")):
        source = Source("chestxray14", "phantom", "", split=split)
        with ShardWriter(tmp_path / f"{dataset}.tar") as writer:
            for study in read_archive(open_archive(dataset, "phantom", tmp_path / "cache"), source, 0):
                data = (tmp_path / "phantom" / study.views[0].path).read_bytes()
                placed = writer.write(
                    study, [EncodedPicture(encode(cv2.imdecode(np.frombuffer(data, "u1"), 0), 95), 0, 0)]
                )
                images += copies.images_of([placed])
                tests += [placed] * (placed.split == "test")
    counts = copies.find_pairs(images, tmp_path / "audit/pairs.parquet", 0.8, 1)
    assert (counts["identical"], counts["pairs"]) == (40, 40)
    group = leakage.groups(images, leakage.read_pairs(tmp_path / "audit/pairs.parquet"))
    leakage.write_seen(tmp_path / "audit/seen.parquet", leakage.seen(images, group))
    known = load_seen_images(tmp_path / "audit")
    listed = (tmp_path / "phantom/test_list.txt").read_text().split()
    assert sorted(f"{s.study}.png" for s in tests) == sorted(listed) and len(listed) == 8
    for trained_on, unseen in ((["chestxray14"], 0), (["chestxray14_official"], 8), (["mimic_cxr"], 8)):
        assert clean_images(known, "chestxray14_official", tests, trained_on).sum() == unseen


def test_open_i_is_clean_of_what_its_training_split_has_not_shown(tmp_path, monkeypatch):
    """Open-I whole as a test set, and by patient as what a run took texts from: the run has seen the images of all but
    the latter's test patients, though it looked at their reports alone."""
    monkeypatch.setattr(neighbours, "GRID", 16)
    monkeypatch.chdir(tmp_path)
    write_archive("openi", tmp_path / "phantom", 40, 64, 0, 1)
    index = tmp_path / "index"
    for dataset, split in (("openi", "paper"), ("openi_by_patient", "patient")):
        source, options = Source("openi", "phantom", "", split=split), Ingest(short_side=64, workers=1)
        ingest_archive(dataset, source, options, tmp_path / dataset, index / f"{dataset}.parquet", tmp_path / "work", 0)
    whole, parts = (read_studies(index / f"{d}.parquet") for d in ("openi", "openi_by_patient"))
    images = [image for studies in (whole, parts) for image in copies.images_of(studies)]
    copies.find_pairs(images, tmp_path / "audit/pairs.parquet", 0.8, 1)
    rows = leakage.seen(images, leakage.groups(images, leakage.read_pairs(tmp_path / "audit/pairs.parquet")))
    leakage.write_seen(tmp_path / "audit/seen.parquet", rows)
    texts = Roles(texts=("openi_by_patient",))
    run = make_mixed(roles=texts, loss={"regeneration_weight": 0.0, "alignment_weight": 0.0})
    write_corpus(run, index, tmp_path / "prompts", tmp_path / "corpus")
    trained = read_studies(tmp_path / "corpus" / "studies.parquet")
    assert not any(s.views for s in trained) and {s.split for s in trained} == {"train", "valid"}
    tests = {s.study for s in parts if s.split == "test"}
    assert 2 <= len(tests) <= 6 and {s.study for s in whole} == tests | {s.study for s in trained}
    unseen = clean_images(load_seen_images(tmp_path / "audit"), "openi", whole, run.datasets)
    assert {s.study for s, free in zip(whole, unseen, strict=True) if free} == tests
    assert clean_images(load_seen_images(tmp_path / "audit"), "openi", whole, ["mimic_cxr"]).all()
    frame = leakage.leakage_table(images, rows)
    assert set(frame["test_set"]) == {"openi"}  # the other is a source of training alone
    assert "| test set (images) | openi_by_patient |" in leakage.leakage_markdown(frame, {"images": len(images)}, {})


def test_nothing_to_tell_of():
    frame = leakage.leakage_table([], [])
    assert isinstance(frame, pd.DataFrame) and frame.empty
    assert "# Test images" in leakage.leakage_markdown(frame, {"images": 0}, {})


def test_written_rows_are_read_as_they_were(tmp_path):
    leakage.write_seen(tmp_path / "a" / "seen.parquet", seen())
    assert pq.read_table(tmp_path / "a" / "seen.parquet").to_pylist() == seen()
    leakage.write_seen(tmp_path / "empty.parquet", [])
    assert pq.read_schema(tmp_path / "empty.parquet").names == leakage.SEEN_SCHEMA.names
