"""The table of data sets against what the paper and the archives' owners say, and against the code that reads them."""

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from pipeline import datasets
from pipeline.config.archive_params import About, Source
from pipeline.datasets import Dataset, datasets_of, facts, known_datasets, own_datasets, used_for
from pipeline.phantom.archives import LAYOUTS
from pipeline.reporting.results import load_paper
from pipeline.text.prompts import PROMPT_CLASSES

READERS = Path(datasets.__file__).parent / "ingest" / "sources"


def test_what_each_data_set_is_for():
    """Paper Table 1 and section 4.1: three to train on, six to test on; and what compositions need beside them."""
    archives = ("mimic_cxr", "chexpert", "chestxray14", "vindr_cxr", "rsna", "siim", "openi")
    assert datasets.archives() == archives == tuple(LAYOUTS)
    assert used_for("pretraining") == (*archives[:3], "chestxray14_official", "openi_by_patient")
    assert used_for("binary_classification") == ("vindr_cxr", "rsna", "siim")
    assert used_for("official_classification") == ("chestxray14_official",)
    assert used_for("classification") == ("chexpert",)
    assert used_for("retrieval") == ("mimic_cxr", "chexpert", "openi")
    assert datasets.paired_tests() == ("mimic_cxr", "openi")
    assert datasets.tested() == ("mimic_cxr", "chexpert", "vindr_cxr", "rsna", "siim", "openi", "chestxray14_official")
    assert datasets.captioned() == ("chexpert", "chestxray14", "chestxray14_official")
    assert [d for d in known_datasets() if facts(d).random_negatives] == ["chestxray14", "chestxray14_official"]
    people = [d for d in known_datasets() if facts(d).patient_ids]
    assert people == ["mimic_cxr", "chexpert", "chestxray14", "chestxray14_official"]


def test_an_archive_read_once_more_has_the_facts_of_the_first_reading():
    for name, split in (("chestxray14_official", "official"), ("openi_by_patient", "patient")):
        of = name.partition("_")[0]
        again, first = facts(name), facts(of)
        assert (again.archive, again.splits, again.reader) == (of, (split,), first.reader)
        for fact in ("access", "text", "captions", "short", "classes", "patient_ids", "random_negatives"):
            assert getattr(again, fact) == getattr(first, fact)
        assert split in first.splits and again.name.startswith(first.name) and again.name != first.name


def test_classes_are_ones_that_prompts_know_and_as_many_as_published():
    assert {d: len(facts(d).classes) for d in ("chexpert", "chestxray14", "rsna", "siim")} == {
        **{"chexpert": 14, "chestxray14": 14},
        **{"rsna": 1, "siim": 1},
    }
    for name in datasets.captioned():
        assert set(facts(name).classes) <= set(PROMPT_CLASSES)


def test_every_reader_is_a_module_and_every_module_a_reader():
    shared = {"__init__", "archive", "tables", "parquet_list", "list_places", "named_images"}
    assert {d.reader for d in known_datasets().values()} | {datasets.MANIFEST} | shared == {
        p.stem for p in READERS.glob("*.py")
    }


def test_the_papers_tables_name_data_sets_of_the_table():
    names = datasets.display_names()
    for table in ("table2", "table3", "table4"):
        for column in load_paper()[table]["columns"]:
            assert column["group"] in names.values() or column["group"] == "Total"
    assert {c["dataset"] for c in load_paper()["table1"]["columns"]} == set(datasets.archives())
    assert datasets.source_of("chexpert5x200") == "chexpert" and names["chexpert5x200"] == "CheXpert5x200"
    assert datasets.source_of("rsna") == "rsna" and datasets.source_of("chestxray14_official") == "chestxray14_official"


def test_a_users_own_data_set():
    sources = {
        "mine": Source("manifest", "a", "b", manifest="list.csv"),
        "rsna": Source("manifest", "a", "b", manifest="list.csv"),
        "siim": Source("siim", "a", "b"),
    }
    table = datasets_of(sources)
    assert list(table) == [*known_datasets(), "mine"]
    assert used_for("pretraining", table) == (*used_for("pretraining"), "mine")
    assert (table["mine"].name, table["mine"].captions, table["mine"].patient_ids) == ("mine", "reports", False)
    assert table["mine"] == facts("mine")  # asked without a table
    assert (table["rsna"].uses, table["rsna"].splits) == (facts("rsna").uses, ("paper",))
    assert table["siim"] == facts("siim") and used_for("pretraining", {}) == ()


def test_a_users_own_data_set_is_what_he_says_of_it():
    about = About("A hospital", "labels", ("COVID-19", "ARDS"), True, ("retrieval", "classification"))
    sources = {"mine": Source("manifest", "a", "b", manifest="l.csv", about=about), "siim": Source("siim", "a", "b")}
    mine = own_datasets(sources)["mine"]
    assert (mine.name, mine.captioned, mine.classes, mine.patient_ids) == ("A hospital", True, about.classes, True)
    table = datasets_of(sources)
    assert "mine" in datasets.tested(table) and "mine" in datasets.captioned(table)
    assert used_for("own_classification", table) == ("mine",) and "mine" in used_for("retrieval", table)
    assert "mine" not in used_for("binary_classification", table)  # of which the paper's mean is
    assert datasets.display_names(table)["mine"] == "A hospital" and list(own_datasets(sources)) == ["mine"]


def test_a_fact_that_is_none_is_refused():
    good = {"name": "A", "reader": "a", "access": "b", "text": "labels", "captions": "labels", "uses": ["retrieval"]}
    check = TypeAdapter(Dataset).validate_python
    assert check(good).uses == ("retrieval",)
    for wrong in ({"usse": []}, {"uses": ["training"]}, {"splits": ["random"]}, {"patient_ids": "some"}):
        with pytest.raises(ValidationError):
            check({**good, **wrong})
