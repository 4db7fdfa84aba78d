"""dvc.yaml against the code: every stage of every axis exists, and depends on the rooms its script imports."""

import ast
import re
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
SCRIPTS = {"embed_other": "embed", "few_shot_official": "few_shot", "few_shot_other": "few_shot"}
# They compute nothing: what they decide is in data/settings, and editing them re-runs nothing else.
CARRIERS = {"pipeline/config", "pipeline/tracking", "pipeline/datasets.py"}


def imports(file: Path) -> set[Path]:
    """Files of the library that a file imports, directly."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pipeline":
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                path = ROOT / Path(*name.split("."))
                found |= {c for c in (path.with_suffix(".py"), path / "__init__.py") if c.exists()}
    return found - {ROOT / "pipeline" / "__init__.py"}


def room(file: Path) -> str:
    """pipeline/<room> of a file in a room, else the file itself."""
    parts = file.relative_to(ROOT).parts
    return "/".join(parts[:2])


def computed_by(script: str) -> set[str]:
    """The rooms, and modules beside them, of everything that a script imports, directly or through others."""
    seen: set[Path] = set()
    todo = [ROOT / "stages" / f"{script}.py"]
    while todo:
        file = todo.pop()
        if file not in seen and room(file) not in CARRIERS:
            seen.add(file)
            todo += imports(file)
    return {room(file) for file in seen if file.is_relative_to(ROOT / "pipeline")}


def code_of(stage: str) -> set[str]:
    spec = DVC[stage].get("do", DVC[stage])
    found = {re.sub(r"^(pipeline/\w+)/.*", r"\1", dep) for dep in spec["deps"] if dep.startswith("pipeline/")}
    return found - {"pipeline/datasets.py", "pipeline/datasets.yaml"}


@pytest.mark.parametrize("stage", sorted(set(DVC) - {"settings", "tables"}))
def test_a_stage_depends_on_the_rooms_that_its_script_imports(stage):
    wanted, listed = computed_by(SCRIPTS.get(stage, stage)), code_of(stage)
    if stage in OTHERS:  # of one script with the stage of our own models
        assert wanted - listed <= {"pipeline/models", "pipeline/training"}
    elif stage.startswith(("embed", "few_shot")):
        assert wanted - listed == {"pipeline/adapters"}
    else:
        assert wanted == listed
    assert f"stages/{SCRIPTS.get(stage, stage)}.py" in DVC[stage].get("do", DVC[stage])["deps"]


def test_the_first_and_the_last_stage_depend_on_what_params_yaml_may_say():
    for stage in ("settings", "tables"):
        assert {"params.yaml", "pipeline/config"} <= set(DVC[stage]["deps"])
    for stage in ("settings", "audit", "tables"):  # what else of this table decides is in data/settings
        assert {"pipeline/datasets.py", "pipeline/datasets.yaml"} <= set(DVC[stage]["deps"])
    assert computed_by("tables") <= code_of("tables")


@pytest.mark.parametrize("stage", sorted(set(DVC) - {"settings", "pretrain", "tables"}))
def test_a_stage_depends_on_its_settings(stage):
    """data/corpus/<run> holds those of a training; the tables are made of params.yaml as a whole."""
    deps = {*DVC[stage].get("do", DVC[stage])["deps"]} - {"data/settings/checked"}
    assert sum(dep.startswith("data/settings/") for dep in deps) == 1


@pytest.mark.parametrize("adapter", params.ADAPTERS)
def test_an_adapter_has_a_module(adapter):
    assert f"def load_{adapter}(" in (ROOT / "pipeline" / "adapters" / f"{adapter}.py").read_text()


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
    assert not record.others  # else there would be stages of OTHERS
    pairs = [*product(("pretrain",), record.runs), *product(("few_shot",), record.main)]
    pairs += product(("few_shot_official",), record.evaluate.official.runs)
    pairs += product(("regenerate",), record.evaluate.regeneration.runs)
    wanted = {f"{stage}@{run}-{seed}" for (stage, run), seed in product(pairs, record.seeds)}
    wanted |= {f"ingest@{d}" for d in record.sources}
    names = subprocess.run(
        ["dvc", "stage", "list", "--name-only"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    single = {"settings", "phantom", "audit", "prompts", "back_translate", "corpus"}
    assert set(names.stdout.split()) == wanted | single | {"embed", "zero_shot", "retrieval", "tables"}


def test_a_stage_never_opens_a_gate_to_pickle_or_remote_code():
    for file in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")]:
        text = file.read_text()
        assert not re.search(r"\b(import|from) pickle\b", text)
        assert "trust_remote_code=True" not in text
        assert "allow_pickle=True" not in text


def test_the_graph_and_the_scripts_stay_small():
    """DVC reads and writes dvc.lock around every stage, and a stage script only connects files with the library."""
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 330
    assert len((ROOT / "dvc.lock").read_text().splitlines()) <= 4000
    for file in ROOT.glob("stages/*.py"):
        assert len(file.read_text().splitlines()) <= 50, file
    for file in ROOT.glob("pipeline/**/*.py"):
        assert len(file.read_text().splitlines()) <= 400, file
