"""dvc.yaml against the code: every stage of every axis exists, and depends on just the modules its script imports."""

import ast
import subprocess
from itertools import product
from pathlib import Path

import pytest
import yaml

from pipeline.config import params
from pipeline.config.load import load_params
from pipeline.config.run_config import run_config

ROOT = Path(__file__).parents[1]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
OTHERS = ("embed_other", "few_shot_other")  # stages of other people's models
# They carry values and make none: editing them re-runs nothing.
CARRIERS = {
    *("config/load", "config/params", "config/run_config", "config/checks", "config/records", "storage/atomic"),
    *("tracking/mlflow_runs", "tracking/work_folders", "tracking/launcher", "evaluation/store", "evaluation/device"),
}


def imports(file: Path) -> set[Path]:
    """Files of this project that a file imports, directly."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipeline":
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "pipeline"]
        else:
            continue
        for name in names:
            path = ROOT / Path(*name.split("."))
            for candidate in (path.with_suffix(".py"), path / "__init__.py"):
                if candidate.exists() and candidate.read_text().strip() and path != ROOT / "pipeline":
                    found.add(candidate)
    return found


def closure(script: Path) -> set[str]:
    seen, todo = set(), [script]
    while todo:
        file = todo.pop()
        if file in seen or str(file.relative_to(ROOT).with_suffix("")).removeprefix("pipeline/") in CARRIERS:
            continue
        seen.add(file)
        todo += imports(file)
    return {str(f.relative_to(ROOT)) for f in seen}


def listed(stage: str, archive: str = "siim") -> set[str]:
    spec = DVC[stage].get("do", DVC[stage])
    files: set[str] = set()
    for dep in spec["deps"]:
        path = ROOT / dep.replace("${item.reader}", archive).replace("${item.adapter}", archive)
        files |= {
            str(p.relative_to(ROOT)) for p in (path.rglob("*.py") if path.is_dir() and "pipeline" in dep else [path])
        }
    return {f for f in files if f.endswith(".py")}


@pytest.mark.parametrize("stage", sorted(DVC))
def test_stage_depends_on_the_modules_it_imports(stage):
    wanted = closure(ROOT / "stages" / f"{stage}.py")
    if stage == "ingest":  # a reader is imported by name: each archive's stage depends on its own only
        readers = {f"pipeline/ingest/sources/{d}.py" for d in (*params.DATASETS, "manifest")}
        wanted = (wanted - readers) | {"pipeline/ingest/sources/siim.py", "pipeline/ingest/sources/archive.py"}
    if stage in OTHERS:  # so is an adapter, which brings what several of them share
        wanted |= closure(ROOT / "pipeline" / "adapters" / "gloria.py")
        assert listed(stage, "gloria") == wanted
        return
    assert listed(stage) == wanted


@pytest.mark.parametrize("adapter", params.ADAPTERS)
def test_an_adapter_has_a_module_and_its_stages_depend_on_it_alone(adapter):
    module = ROOT / "pipeline" / "adapters" / f"{adapter}.py"
    for stage in OTHERS:
        assert closure(module) <= listed(stage, adapter)


@pytest.mark.parametrize(
    "profile", ["params.yaml", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("profiles/*.yaml"))]
)
def test_every_profile_is_valid_and_has_every_key(profile):
    record = load_params(ROOT / profile)
    keys = set(yaml.safe_load((ROOT / profile).read_text()))
    assert keys == set(yaml.safe_load((ROOT / "params.yaml").read_text()))
    for run in record.runs:
        run_config(record, run)


def test_params_yaml_is_the_demo_profile():
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "profiles" / "demo.yaml").read_bytes()


def test_the_graph_has_every_stage_of_every_axis():
    """DVC drops stages whose generated names collide, silently."""
    record = load_params(ROOT / "params.yaml")
    per_run = ("pretrain", "embed")
    assert not record.others  # else there would be stages of OTHERS
    pairs = [*product(per_run, record.runs), *product(("few_shot",), record.main)]
    pairs += product(("few_shot_official",), record.evaluate.official.runs)
    pairs += product(("regenerate",), record.evaluate.regeneration.runs)
    wanted = {f"{stage}@{run}-{seed}" for (stage, run), seed in product(pairs, record.seeds)}
    wanted |= {f"phantom@{a}" for a in record.phantom.archives} | {f"ingest@{d}" for d in record.sources}
    names = subprocess.run(
        ["dvc", "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    single = {"audit", "prompts", "back_translate", "corpus", "zero_shot", "retrieval", "tables"}
    assert set(names.stdout.split()) == wanted | single


def test_a_stage_never_opens_a_gate_to_pickle_or_remote_code():
    for file in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]:
        text = file.read_text()
        assert "import pickle" not in text
        assert "trust_remote_code=True" not in text
        assert "allow_pickle=True" not in text
