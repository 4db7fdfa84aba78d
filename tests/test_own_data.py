"""A data set of the user's own is described and then does what the paper's archives do, without their names."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pipeline.audit import leakage
from pipeline.audit.copies import AuditImage
from pipeline.config.archive_params import About, Source
from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.config.run_config import run_config
from pipeline.config.settings import audited_facts, settings_of, tested_facts
from pipeline.datasets import with_own
from pipeline.evaluation import protocols
from pipeline.evaluation.candidates import label_text
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MetricKey
from pipeline.reporting import formats, tables
from pipeline.reporting.counts import counts
from pipeline.reporting.own import own_table
from pipeline.reporting.page import render_page
from pipeline.reporting.results import RunResult, Summary, load_paper
from pipeline.reporting.rows import marked
from pipeline.reporting.table_form import Cell, Column
from pipeline.study import Study, View
from pipeline.text.prompts import caption, load_templates, validation_caption

ROOT = Path(__file__).parents[1]
ABOUT = About("A hospital", "labels", ("COVID-19", "Mass [left, right]"), True, ("classification", "retrieval"))


@pytest.fixture
def params():
    """The demo, with a data set of the user's own that one of its runs trains on."""
    demo = load_params(ROOT / "params.yaml")
    mine = Source("manifest", "data/mine", "data/fingerprints/mine.json", manifest="list.csv", about=ABOUT)
    runs = {**demo.runs, "resnet_m": replace(demo.runs["resnet_m"], datasets=("mimic_cxr", "mine"))}
    return replace(demo, sources={**demo.sources, "mine": mine}, runs=runs)


def test_every_stage_that_may_use_it_is_told(params):
    found = settings_of(params)
    assert "mine" in found["embed/runs"].test_sets and "mine" in found["few_shot/main/resnet_m"].test_sets
    assert "mine" not in found["few_shot/official/resnet_m"].test_sets
    assert "mine" in found["prompts"].datasets and found["prompts"].own == ("mine",)
    assert run_config(params, "resnet_m").captioned == ("mine",)
    assert found["zero_shot"].own["mine"].classes == ABOUT.classes
    assert found["audit"].own["mine"].patient_ids and found["ingest/mine"].source.about == About()


def test_its_prompts_are_its_classes_unless_a_protocol_says_more(params, tmp_path):
    own = tested_facts(params)
    first, *others = protocols.load_protocols(params.evaluate.protocols, own)
    task = first.tasks["mine"]
    assert task.positive == {c: [c] for c in ABOUT.classes} and task.negative == {c: [f"no {c}"] for c in ABOUT.classes}
    assert (task.rule.score, task.rule.metric, task.rule.dataset) == ("difference", "auc", "mine")
    assert first.retrieval["mine"].text == ("labels",)
    reports = {"mine": replace(own["mine"], captions="reports")}
    assert protocols.first_protocol(params.evaluate.protocols, reports).retrieval["mine"].text == (
        "findings",
        "impression",
    )
    assert not any("mine" in other.tasks for other in others)
    assert "no COVID-19" in protocols.prompt_texts(params.evaluate.protocols, own)
    assert list(protocols.probed(params.evaluate.protocols, ["mine"], own).tasks.values()) == [task]
    spec = {"dataset": "mine", "prompts": {"lists": {"COVID-19": ["ground glass"]}}, "aggregate": "mean"}
    spec |= {"score": "cosine", "metric": "auc"}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump({"test_sets": {"glass": spec}}))
    names = ("paper", str(tmp_path / "theirs.yaml"))
    first, second = protocols.load_protocols(names, own)
    assert "mine" not in first.tasks and second.tasks["glass"].positive == {"COVID-19": ["ground glass"]}
    with pytest.raises(protocols.ProtocolError, match="'mine' is no test set"):
        protocols.load_protocols(names)


def test_captions_of_classes_that_no_file_knows():
    import numpy as np

    templates = load_templates(ROOT / "pipeline/text/prompts.yaml")
    pools = templates.with_defaults(ABOUT.classes).subset(ABOUT.classes)
    said = caption({"COVID-19": 1, "Mass [left, right]": 0}, pools, np.random.default_rng(0))
    assert "COVID-19" in said and "Mass [left, right]" in said  # no bracket of a name is a choice
    assert validation_caption({"COVID-19": 1}, pools) == pools.sentences("COVID-19", 1)[0]
    assert templates.with_defaults(["Edema"]).pools["Edema"] == templates.pools["Edema"]


def test_a_label_text_names_the_positive_classes():
    found = [
        label_text(Study("mine", "p", "s", "test", (View("v"),), labels=labels))
        for labels in (
            {"Edema": 1, "Mass": 0, "Hernia": 1},
            {"Edema": 0},
            {"Edema": 0, "Mass": -1},
            {},
            {"No Finding": 1},
            {"No Finding": 0},
        )
    ]
    assert found == ["Edema, Hernia", "No Finding", None, None, "No Finding", None]


@pytest.mark.parametrize("persons", [True, False])
def test_its_patients_count_in_the_audit_if_they_are_persons(params, persons):
    mine = replace(params.sources["mine"], about=replace(ABOUT, patients=persons))
    table = with_own(audited_facts(replace(params, sources={**params.sources, "mine": mine})))
    images = [AuditImage("mine", "p1", s, split, View("0")) for s, split in (("a", "train"), ("b", "test"))]
    rows = leakage.seen(images, [0, 1], table)
    assert [row["how"] for row in rows] == (["patient"] if persons else [])
    (across,) = leakage.across_splits(images, table).values()
    assert (across["train/test"] == 1) if persons else across == "unknown"
    frame = leakage.leakage_table(images, rows, table)
    assert set(frame["patients_known"]) == {"yes" if persons else "through copies"}


@pytest.mark.parametrize(
    ("source", "keys", "says"),
    [
        (
            "rsna",
            {"reader": "manifest", "manifest": "l.csv"},
            "sources.rsna.about: the facts of this data set are",
        ),
        ("siim", {}, "sources.siim.about: only of a data set of your own"),
        ("mine", {"about": {"tests": ["classification"]}}, "sources.mine.about.classes: missing"),
        ("mine", {"about": {"classes": ["a {}"], "tests": []}}, "sources.mine.about.classes: 'a {}': not a name"),
        ("mine", {"about": {"tests": ["detection"]}}, "sources.mine.about.tests"),
        ("mine", {"about": {"classes": ["A", "A"]}}, "sources.mine.about.classes: 'A' is there twice"),
    ],
)
def test_a_description_that_cannot_be_is_one_line(tmp_path, source, keys, says):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["sources"]["mine"] = {"reader": "manifest", "path": "data/mine", "manifest": "l.csv", "stamp": "data/m.json"}
    raw["sources"][source] |= {"about": {"name": "x"}, **keys}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ParamsError) as error:
        load_params(tmp_path / "params.yaml")
    assert any(says in line for line in error.value.lines)


def summary(dataset, own, phantom=False):
    listed = {"train": {"studies": 7, "images": 18678}, "valid": {"studies": 1, "images": 4003}}
    return Summary(dataset, phantom, own, False, listed, listed, 10, 10, 0, {}, ())


def test_a_list_of_ones_own_under_an_archives_name_is_compared_with_nothing():
    """Neither bold, nor a difference, nor the claim that the paper's figures come out."""
    summaries = {"rsna": summary("rsna", own=True)}
    column = Column("rsna_zs_auc", "RSNA", "ZS")
    (cell,) = marked(summaries, [column], [Cell(99.0, 80.0, 98.0, 99.9)])
    assert cell.own and cell.difference is None and not cell.beats(1) and formats.show_difference(cell, 1) == "own list"
    (real,) = marked({"rsna": summary("rsna", own=False)}, [column], [Cell(99.0, 80.0, 98.0, 99.9)])
    assert real.difference == 19.0 and real.beats(1)
    table = counts(load_paper(), summaries, {})
    place = [c.key for c in table.columns].index("rsna")
    assert all(row.cells[place].own for row in table.rows)
    assert not any("come out exactly" in note for note in table.notes if note.startswith("RSNA"))
    exact = counts(load_paper(), {"rsna": summary("rsna", own=False)}, {})
    assert any("come out exactly" in note for note in exact.notes if note.startswith("RSNA"))


def test_table_1_has_a_column_of_it(params):
    table = counts(load_paper(), {"mine": summary("mine", own=True)}, tested_facts(params))
    assert (table.columns[-1].group, table.columns[-1].name) == ("mine", "studies")
    assert [row.cells[-1].ours for row in table.rows] == [7, 1, 0]
    assert all(row.cells[-1].paper is None for row in table.rows)


def test_the_profile_for_own_data_is_complete():
    """It is what docs/own-data.md has people copy."""
    found = load_params(ROOT / "profiles" / "own.yaml")
    assert list(found.sources) == ["my_hospital"] and found.main == ("mine",)
    assert len((ROOT / "profiles" / "own.yaml").read_text().splitlines()) < 70
    needed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    raw = yaml.safe_load((ROOT / "profiles" / "own.yaml").read_text())
    for key in set(re.findall(r"\$\{(?!item|key)([\w.]+)\}", json.dumps(needed))):
        at = raw
        for part in key.split("."):
            at = at[part]


def test_tables_and_page_of_a_data_set_of_ones_own_say_nothing_of_the_papers():
    p = load_params(ROOT / "profiles" / "own.yaml")
    auc, classes = MetricKey("my_hospital", "zero_shot", "auc"), p.sources["my_hospital"].about.classes
    found = RunResult("mine", (0,), {auc: Measure(0.7, 0.6, 0.8, 40)})
    found.classes["my_hospital"] = {c: Measure(0.7, 0.6, 0.8, 36) for c in classes}
    summaries, results = {"my_hospital": summary("my_hospital", own=True)}, {"mine": found}
    built = tables.build_tables(p, summaries, results)
    second = next(t for t in built if t.number == "2")
    assert any("none of its test sets is among sources" in note for note in second.notes)
    assert not any("run: dvc repro" in note for t in built for note in t.notes)
    assert [t.number for t in tables.shown(built)] == ["Own", "1"]
    (own,) = (t for t in built if t.number == "Own")
    assert any("captions of mine were made from the training images' labels" in note for note in own.notes)
    reports = replace(p.sources["my_hospital"], about=replace(p.sources["my_hospital"].about, captions="reports"))
    (own,) = own_table(replace(p, sources={"my_hospital": reports}), summaries, results)
    assert not any("captions" in note for note in own.notes)
    html = render_page(p, tables.shown(built), summaries, results, [], Path("data/index"), lambda view: None)
    text = html[html.index("</style>") :]
    assert "CXR-CLIP on My hospital" in text and "AUC by class, My hospital" in text
    for word in ("reproduced", "paper’s figure", "paper, difference", "Supplement", "Table 2", "Not shown: images and"):
        assert word not in text, word
