"""Four queued experiments, two workers, one of them killed: the long form of the test in test_repro.py."""

import time

import pytest
import yaml

from tests.clones import ROOT, commit, make_clone, run
from tests.queued import kill_all, lose_a_worker, workspace


def tiny() -> dict:
    """One run on one archive, tested on another: what an experiment needs, with a training that can be met midway."""
    params = yaml.safe_load((ROOT / "profiles" / "micro.yaml").read_text())
    params["sources"] = {name: params["sources"][name] for name in ("mimic_cxr", "rsna")}
    params["phantom"]["archives"] = {"mimic_cxr": 40, "rsna": 40}
    params["runs"] = {"tiny": {"image_encoder": "resnet", "datasets": ["mimic_cxr"]}}
    params.update(main=[], ablations=["tiny"], control="")
    params["evaluate"]["few_shot"]["fine_tune"]["runs"] = []
    params["evaluate"].update(official={"runs": []}, regeneration={"runs": []})
    params["train"].update(epochs=25, threads=1)
    return params


@pytest.fixture
def clone(tmp_path):
    clone = make_clone(tmp_path / "clone", tiny())
    run(clone, "dvc", "repro")
    commit(clone, "results")
    yield clone
    kill_all(clone)


@pytest.mark.drill
def test_a_killed_worker_loses_no_experiment(clone):
    began = time.monotonic()
    grid = "loss.tcl_weight=0,0.25,0.75,1"
    run(clone, "dvc", "exp", "run", "--queue", "-n", "grid", "-S", grid, "-C", "data/phantom")
    names = {f"grid-{n}" for n in (1, 2, 3, 4)}
    lose_a_worker(clone, names, "tiny-0", jobs=2)
    run(clone, "python", "-m", "stages.experiments")
    report = (clone / "data" / "experiments" / "index.md").read_text()
    assert all(f"| {name} | loss.tcl_weight: 0.5 → " in report for name in names) and "cpu" in report
    assert workspace(clone)["git"] == ""
    print(f"{len(names)} experiments, one killed: {time.monotonic() - began:.0f} s")
