"""The whole of `make repro` in a clone: every stage of the micro profile, from drawn archives to the page."""

import csv
import json
import re
import shutil
import sqlite3
from pathlib import Path

import pytest

from pipeline.datasets import known_datasets
from tests.clones import ROOT, commit, make_clone, run
from tests.planted import ALLOWED, found_in, plant
from tests.queued import kill_all, lose_a_worker


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    clone = make_clone(tmp_path_factory.mktemp("clone"))
    plant(clone)
    run(clone, "python", "-m", "stages.fingerprint")
    commit(clone, "a hospital's own archive")
    return clone


def test_repro_builds_every_table_and_then_has_nothing_to_do(clone):
    out = run(clone, "make", "--old-file=.venv/ready", "repro")
    for n in (1, 2, 3, 4):
        assert (clone / "reports" / f"table{n}.md").stat().st_size > 200
        assert (clone / "reports" / f"table{n}.csv").exists()
    page = (clone / "reports" / "index.html").read_text()
    assert "say nothing about patients" in page and "Table Own" in page
    own = list(csv.DictReader((clone / "reports" / "tableOwn.csv").open()))
    shown = {line["column"]: float(line["ours"]) for line in own if line["row"] == "resnet_mcc"}
    assert {"own_zs_auc", "own_p10_auc", "own_r5", "own_t2i_r10"} <= shown.keys()
    assert not any(line["paper"] or line["difference"] for line in own)
    metrics = json.loads((clone / "reports" / "metrics.json").read_text())
    assert set(metrics) == {"resnet_mcc", "mixed"}
    assert 0 <= metrics["resnet_mcc"]["vindr_cxr_zs_auc"] <= 1
    mixed = metrics["mixed"]
    assert 0 <= mixed["chestxray14_official_p100_auc"] <= 1 and mixed["mimic_cxr_psnr50_matching"] > 0
    # A tenth of Open-I's reports is what a run that trained on the rest has not seen.
    found = json.loads((clone / "data/results/retrieval/mixed/0.json").read_text())
    parts = json.loads((clone / "data/index/openi_by_patient.json").read_text())["written"]
    assert found["metrics"]["openi_r10_clean"]["n"] == parts["test"]["studies"] == 2
    assert found["removed"]["openi"] == parts["train"]["studies"] + parts["valid"]["studies"]
    for dataset in known_datasets():
        summary = json.loads((clone / "data" / "index" / f"{dataset}.json").read_text())
        assert summary["written_images"] + summary["rejected_images"] == summary["found_images"] > 0
    assert "up to date" in run(clone, "dvc", "repro")
    assert out.count("Running stage") == len(set(re.findall(r"Running stage '(.+)'", out))) == 25  # each of them once
    assert "PHANTOM" not in out  # no report text, no file content
    (clone / "said").write_text(out)


def test_planted_words_are_where_the_docs_say(clone):
    """Those of headers, of file names and of columns that nobody asked for are nowhere; see planted.py."""
    shutil.rmtree(clone / "data" / "own")
    found = set(found_in(clone))
    allowed = {(word, place) for word, places in ALLOWED.items() for place in places}
    copies = {(word, file) for word, file in found if file.startswith(".dvc/cache/")}  # of outputs, by their digest
    assert {word for word, _ in copies} <= ALLOWED.keys()
    strange = [(w, f) for w, f in found - copies if not any(w == word and f.startswith(at) for word, at in allowed)]
    assert not strange
    assert all(any(w == word and f.startswith(at) for w, f in found) for word, at in allowed)  # the search finds them
    docs = (ROOT / "docs" / "reliability.md").read_text()
    for _, at in allowed:
        said = at.replace("own", "<data set>").replace("resnet_mcc", "<run>")
        assert f"`{Path(said).parent if Path(said).suffix else Path(said)}/" in docs


def test_every_stage_run_is_in_mlflow(clone):
    if not (clone / "mlflow.db").exists():
        pytest.fail("the repro above recorded nothing")
    with sqlite3.connect(clone / "mlflow.db") as db:
        stages = [v for (v,) in db.execute("select value from tags where key = 'stage'")]
        parents = db.execute("select count(*) from tags where key = 'kind' and value = 'repro'").fetchone()[0]
        children = {v for (v,) in db.execute("select value from tags where key = 'mlflow.parentRunId'")}
        keys = {k for (k,) in db.execute("select distinct key from metrics")}
    assert parents == 1
    assert len(children) == 1
    wanted = {"phantom": 7, "ingest": 10, "prompts": 1, "corpus": 2, "pretrain": 2, "embed": 2, "zero_shot": 2}
    wanted |= {"audit": 1, "back_translate": 1, "retrieval": 2, "few_shot": 1, "few_shot_official": 1, "tables": 1}
    wanted |= {"regenerate": 1}
    assert {s: stages.count(s) for s in set(stages)} == wanted
    assert {"train_loss", "valid_loss", "rsna_zs_auc", "mimic_cxr_r10", "vindr_cxr_p100_auc", "found_images"} <= keys


def test_a_queued_experiment_trains_again_what_it_changes_and_outlives_its_worker(clone):
    """`mixed` has no such term as tcl, so a change of its weight leaves it alone. The long form is in test_queue.py."""
    commit(clone, "results")
    changes = ("-S", "loss.tcl_weight=0", "-S", "runs.resnet_mcc.train.epochs=5")
    run(clone, "dvc", "exp", "run", "--queue", "-n", "notcl", *changes, "-C", "data/phantom")
    try:
        _, said = lose_a_worker(clone, {"notcl"}, "resnet_mcc-0", jobs=1)
    finally:
        kill_all(clone)
    assert set(re.findall(r"Running stage '(.+)'", said)) == {
        *("pretrain@resnet_mcc-0", "embed", "zero_shot", "few_shot@resnet_mcc-0", "retrieval", "tables")
    }
    assert set(re.findall(r"Stage '(.+)' is cached", said)) == {"settings", "corpus"}  # of the killed attempt
    assert "embed mixed/0: as it was" in said
    diff = json.loads(run(clone, "dvc", "exp", "diff", "HEAD", "notcl", "--json"))
    assert diff["params"]["params.yaml"]["loss.tcl_weight"] == {"old": 0.5, "new": 0, "diff": -0.5}
    assert "resnet_mcc.vindr_cxr_zs_auc" in diff["metrics"]["reports/metrics.json"]
    with sqlite3.connect(clone / "mlflow.db") as db:
        values = {v for (v,) in db.execute("select value from params where key = 'loss.tcl_weight'")}
    assert {"0.5", "0.0"} <= values


def test_an_experiment_in_the_workspace_runs_what_it_changes_alone(clone):
    out = run(clone, "dvc", "exp", "run", "-n", "few", "-S", "ablations=[]")
    assert set(re.findall(r"Running stage '(.+)'", out)) == {"settings", "tables"}
    diff = json.loads(run(clone, "dvc", "exp", "diff", "--json"))
    assert diff["params"] == {"params.yaml": {"ablations": {"old": "['resnet_mcc']", "new": "[]"}}}
    with sqlite3.connect(clone / "mlflow.db") as db:
        assert "few" in {v for (v,) in db.execute("select value from tags where key = 'dvc_exp_name'")}


def test_killed_stages_leave_what_undisturbed_ones_do(clone):
    """A short form of the drill in kills.py."""
    code = (
        "from pathlib import Path; from tests import kills; [kills.drill(Path.cwd(), k, 1, few=1) for k in kills.KINDS]"
    )
    run(clone, "python", "-c", code)
