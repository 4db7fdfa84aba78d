"""An experiment re-runs what it can influence and nothing else: each parameter is changed once, and the files of
data/settings that follow it are those of the stages that docs/experiments.md names.

``python -m tests.test_caching`` writes the table of docs/experiments.md anew, after a change of dvc.yaml or settings.
"""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import yaml

from pipeline.config import settings
from pipeline.config.archive_params import About, Source
from pipeline.config.load import load_params
from pipeline.config.params import Other, Params
from pipeline.config.run_config import SPEED

ROOT = Path(__file__).parents[1]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
DOC = ROOT / "docs" / "experiments.md"
MARKS = ("<!-- from dvc.yaml: python -m tests.test_caching -->\n", "<!-- end -->\n")
# How fast, not what: these change no output (other than by rounding), so they are in no file of settings.
INDIFFERENT = {
    *("tracking.enabled", "ingest.workers", "ingest.scheduler", "audit.workers", "evaluate.batch_size"),
    *("evaluate.threads", "back_translation.workers", "back_translation.device"),
    *(f"train.{key}" for key in SPEED),
    "evaluate.regeneration.runs",  # stages of dvc.yaml
}
# Of these the stage tables alone is made, which depends on params.yaml as a whole.
SHOWN = {
    *("others.*.model", "others.*.backbone", "others.*.data"),
    "main",
    "ablations",
    "prompt_ablations",
    "compositions",
    "control",
    "sources.*.about.name",
}
ITEMS = {"sources", "phantom.archives", "runs", "others", "model.image_encoders"}  # mappings by name


def params() -> Params:
    """The demo with somebody else's model beside its runs, and a data set of the user's own."""
    other = Other("gloria", "weights/gloria", "GLoRIA", "R50", "C*", ("chexpert",))
    demo = load_params(ROOT / "params.yaml")
    about = About("Mine", "labels", ("A", "B"), True, ("classification",))
    mine = Source("manifest", "mine", "mine.json", manifest="list.csv", about=about)
    return replace(demo, others={"gloria": other}, sources={"mine": mine, **demo.sources})


DEFAULTS = [
    (("ingest",), "max_rejected", {"ingest"}),
    (("loss",), "label_smoothing", {"corpus"}),
    (
        ("evaluate", "bootstrap"),
        "confidence",
        {*("zero_shot", "few_shot", "few_shot_official", "retrieval", "regenerate")},
    ),
]


# each parameter, changed once


def changed(value: Any, kind: Any) -> Any:
    """Another value of the same type."""
    if get_origin(kind) is Literal:
        return next(other for other in get_args(kind) if other != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return 0.99 * value if value else 0.01
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, tuple | list):
        if (words := get_args(kind)) and get_origin(words[0]) is Literal:
            return tuple(word for word in get_args(words[0]) if word not in value)
        return value[:-1] if len(value) > 1 and not isinstance(value[0], float) else _more(tuple(value))
    key = next(iter(value), "new")
    return {**value, key: changed(value[key], Any)} if value else {key: 1.0}


def _more(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if value and isinstance(value[0], float):
        return (0.99 * value[0] + 0.001, *value[1:])
    return (*value, value[-1] + 1 if value and isinstance(value[-1], int) else "clip")


def plain(kind: Any) -> Any:
    """A type without its bounds."""
    return plain(get_args(kind)[0]) if hasattr(kind, "__metadata__") else kind


def variants(record: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, the record with another value there) for every key; items of a mapping are ``<key>.*``."""
    hints = get_type_hints(type(record), include_extras=True)
    for field in fields(record):
        value, at = getattr(record, field.name), f"{path}{field.name}"
        if is_dataclass(value):
            found = variants(value, f"{at}.")
        elif at in ITEMS:
            name = next(iter(value))
            item = value[name]
            inner = variants(item, f"{at}.*.") if is_dataclass(item) else iter([(f"{at}.*", changed(item, Any))])
            if at == "runs":  # whose keys are sections' keys
                inner = iter([(f"{at}.*", replace(item, train={"epochs": 99}))])
            found = ((key, {**value, name: new}) for key, new in inner)
            if at == "sources":
                yield at, replace(record, **{field.name: {k: v for k, v in value.items() if k != "siim"}})
        else:
            found = iter([(at, changed(value, plain(hints[field.name])))])
        for key, new in found:
            yield key, replace(record, **{field.name: new})


def stage_of(name: str) -> str:
    """The stage that a file of data/settings is of."""
    first, *rest = name.split("/")
    return f"{first}_{rest[0]}" if first in ("embed", "few_shot") and rest[0] in ("other", "official") else first


@functools.cache
def read_by() -> dict[str, list[str]]:
    """Parameter -> the stages whose settings change with it, and those that dvc.yaml hands it to, in its order."""
    base = params()
    before = settings.settings_of(base)
    found = {}
    for key, record in variants(base):
        after = settings.settings_of(record)
        names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        found[key] = {stage_of(name) for name in names}
    for stage, spec in DVC.items():
        spec = spec.get("do", spec)
        for key in re.findall(r"\$\{(?!item|key)([\w.]+)\}", " ".join([spec["cmd"], *spec["deps"]])):
            found[key] = found[key] | {stage}
    return {key: [stage for stage in DVC if stage in stages] for key, stages in found.items()}


def test_every_parameter_that_decides_a_result_is_in_the_settings_of_a_stage():
    idle = {key for key, stages in read_by().items() if not stages}
    assert idle == (INDIFFERENT | SHOWN) - {"train.launcher", "main"}


@pytest.mark.parametrize(("section", "key", "stages"), DEFAULTS)
def test_a_changed_default_changes_the_settings_of_the_stages_that_it_decides(section, key, stages, tmp_path):
    """params.yaml may leave a key out; what the code then takes is written down for the stages, so DVC sees it change.

    The code with another default is a copy of the package in which the number is another one.
    """
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    at = raw
    for name in section:
        at = at[name]
    del at[key]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "stages", tmp_path / "stages")
    found = []
    for change in (False, True):
        if change:
            changed = 0
            for name in ("params", "archive_params"):
                file = tmp_path / "pipeline" / "config" / f"{name}.py"
                text, count = re.subn(rf"(    {key}: [^=\n]+ = )([\d.]+)", r"\g<1>0.25", file.read_text())
                file.write_text(text)
                changed += count
            assert changed >= 1
        command = [sys.executable, "-m", "stages.settings"]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)
        folder = tmp_path / "data" / "settings"
        found.append({p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.json")})
    names = {name.removesuffix(".json") for name in found[0] if found[0][name] != found[1][name]}
    assert {stage_of(name) for name in names} == stages


@pytest.mark.parametrize("script", sorted(p.stem for p in ROOT.glob("stages/*.py")))
def test_a_stage_reads_its_settings_and_no_other_parameter(script):
    if script in DVC and script not in ("settings", "pretrain", "tables"):
        text = (ROOT / "stages" / f"{script}.py").read_text()
        assert "load_params" not in text and "params.yaml" not in text


def test_the_library_reads_no_params_on_its_own():
    """A module that loads params.yaml itself would escape the comparison above."""
    for file in (ROOT / "pipeline").rglob("*.py"):
        if file.parent.name != "config":
            assert not re.search(r"\bload_params\(|Path\(\"params\.yaml\"\)", file.read_text()), file


# the table of the docs


@functools.cache
def downstream(stage: str) -> list[str]:
    """Stages that read an output of this one, directly or through others, in the order of dvc.yaml."""
    specs = {name: spec.get("do", spec) for name, spec in DVC.items()}

    def paths(items) -> set[str]:
        names = [next(iter(i)) if isinstance(i, dict) else i for i in items]
        return {re.sub(r"/?\$\{.*", "", n) for n in names}

    outs = {n: {o for o in paths(s.get("outs", [])) if o} for n, s in specs.items()}
    deps = {n: {d for d in paths(s["deps"]) if d.startswith("data")} for n, s in specs.items()}
    deps["ingest"].add("data/phantom")  # the stamp of a phantom
    after: set[str] = set()
    todo = {stage}
    while todo:
        made = {o for name in todo for o in outs[name]}
        todo = {
            name
            for name in specs
            if name not in after | todo
            and any(d == o or d.startswith(f"{o}/") or o.startswith(f"{d}/") for d in deps[name] for o in made)
        }
        after |= todo
    return [name for name in specs if name in after]


def within(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


def named(after: set[str]) -> str:
    """Stages in the order of dvc.yaml; those that evaluate, if all of them follow, by one name."""
    ours = {"embed", "zero_shot", "few_shot", "few_shot_official", "retrieval", "regenerate"}
    for name, group in (("all evaluation", ours | {"embed_other", "few_shot_other"}), ("evaluation of runs", ours)):
        if group <= after:
            first = next(s for s in DVC if s in group)
            return ", ".join(f"*{name}*" if s == first else s for s in DVC if s in after - group | {first})
    return ", ".join(s for s in DVC if s in after) or "—"


def table() -> str:
    """Parameter -> the stages that read it and, once each, those that follow them. A section has one line, and one more
    for each key that other stages read."""
    rows: dict[str, tuple[str, ...]] = {}
    for key, stages in read_by().items():
        if stages:
            rows[key.replace("*", "…")] = tuple(stages)
    for depth in (3, 2, 1):
        for section in {".".join(key.split(".")[:depth]) for key in rows if key.count(".") >= depth}:
            below = [key for key in rows if within(key, section) and key != section]
            usual = max({rows[key] for key in below}, key=lambda s: (sum(rows[k] == s for k in below), s))
            if rows.setdefault(section, usual) == usual:
                rows = {key: stages for key, stages in rows.items() if key not in below or stages != usual}
    order = list(yaml.safe_load((ROOT / "params.yaml").read_text()))
    text = "| parameter | stages that read it | what may follow them |\n|---|---|---|\n"
    for path in sorted(rows, key=lambda p: (order.index(p.split(".")[0]), p)):
        stages = rows[path]
        after = {late for stage in stages for late in downstream(stage)} - set(stages)
        text += f"| `{path}` | {named(set(stages))} | {named(after)} |\n"
    return text + "| any | settings, tables | — |\n"


def test_the_docs_say_what_re_runs():
    _, _, rest = DOC.read_text(encoding="utf-8").partition(MARKS[0])
    assert rest.partition(MARKS[1])[0] == table(), "run: python -m tests.test_caching"


if __name__ == "__main__":
    start, _, rest = DOC.read_text(encoding="utf-8").partition(MARKS[0])
    DOC.write_text(start + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
