"""The whole of `make repro` in a clone: every stage of the micro profile, from drawn archives to the page."""

import json
import os
import re
import shutil
import sqlite3
import subprocess
from pathlib import Path

import pytest

from pipeline.datasets import known_datasets

ROOT = Path(__file__).parents[1]


def run(clone: Path, *command: str) -> str:
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "GIT_"))}
    env = {**keep, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(command, cwd=clone, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The working tree's files in a repository of their own, with the micro profile as params.yaml."""
    clone = tmp_path_factory.mktemp("clone")
    files = run(ROOT, "git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith("reports/") and name != "dvc.lock":
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, clone / name)
    shutil.copy(ROOT / "profiles" / "micro.yaml", clone / "params.yaml")
    run(clone, "git", "init", "-q")
    run(clone, "git", "add", "-A")
    run(clone, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "clone")
    return clone


def test_repro_builds_every_table_and_then_has_nothing_to_do(clone):
    out = run(clone, "make", "--old-file=.venv/ready", "repro")
    for n in (1, 2, 3, 4):
        assert (clone / "reports" / f"table{n}.md").stat().st_size > 200
        assert (clone / "reports" / f"table{n}.csv").exists()
    page = (clone / "reports" / "index.html").read_text()
    assert "say nothing about patients" in page
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
    assert out.count("Running stage") == len(set(re.findall(r"Running stage '(.+)'", out))) == 24  # each of them once
    assert "PHANTOM" not in out  # no report text, no file content


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
    wanted = {"phantom": 7, "ingest": 9, "prompts": 1, "corpus": 2, "pretrain": 2, "embed": 2, "zero_shot": 2}
    wanted |= {"audit": 1, "back_translate": 1, "retrieval": 2, "few_shot": 1, "few_shot_official": 1, "tables": 1}
    wanted |= {"regenerate": 1}
    assert {s: stages.count(s) for s in set(stages)} == wanted
    assert {"train_loss", "valid_loss", "rsna_zs_auc", "mimic_cxr_r10", "vindr_cxr_p100_auc", "found_images"} <= keys


def test_an_experiment_trains_again_what_it_changes_and_ingests_nothing(clone):
    """`mixed` has no such term as tcl, so a change of its weight leaves it alone."""
    run(clone, "git", "add", "-A")
    run(clone, "git", "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "results")
    out = run(clone, "dvc", "exp", "run", "-n", "notcl", "-S", "loss.tcl_weight=0")
    started = {line.split("'")[1] for line in out.splitlines() if line.startswith("Running stage")}
    assert started == {
        *("settings", "corpus", "pretrain@resnet_mcc-0", "embed", "zero_shot", "few_shot@resnet_mcc-0", "retrieval"),
        "tables",
    }
    assert "embed mixed/0: as it was" in out
    diff = json.loads(run(clone, "dvc", "exp", "diff", "--json"))
    assert diff["params"]["params.yaml"]["loss.tcl_weight"] == {"old": 0.5, "new": 0, "diff": -0.5}
    assert "resnet_mcc.vindr_cxr_zs_auc" in diff["metrics"]["reports/metrics.json"]
    with sqlite3.connect(clone / "mlflow.db") as db:
        names = [v for (v,) in db.execute("select value from tags where key = 'dvc_exp_name'")]
        values = {v for (v,) in db.execute("select value from params where key = 'loss.tcl_weight'")}
    assert "notcl" in names
    assert {"0.5", "0.0"} <= values
