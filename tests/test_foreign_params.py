"""A params.yaml from somebody else: it is checked before anything of it becomes a path, a word of a shell, a number."""

import copy
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

import stages
import stages.ingest
import stages.pretrain
from pipeline.config import settings
from pipeline.config.load import load_params
from pipeline.config.params import Params, Run
from pipeline.config.records import ParamsError, kind_at, read_record
from pipeline.config.run_config import RunConfig
from pipeline.config.yaml_file import YamlFileError, read_yaml
from pipeline.evaluation.protocols import ProtocolError, load_protocol
from pipeline.text.prompts import PromptError, load_templates

ROOT = Path(__file__).parents[1]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@functools.cache
def demo():
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def changed(place, value):
    """The demo's params.yaml with another value at one place, which is made if it is not there."""
    raw = copy.deepcopy(demo())
    at = raw
    for key, after in itertools.pairwise(place):
        if isinstance(at, dict):
            at = at.setdefault(key, [] if isinstance(after, int) else {})
        else:
            at += [{}] * (key + 1 - len(at))
            at = at[key]
    if isinstance(at, list):
        at[place[-1] : place[-1] + 1] = [value]
    else:
        at[place[-1]] = value
    return raw


def refused(tmp_path, raw):
    """The lines that are said of a params.yaml, without its path."""
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(ParamsError) as error:
        load_params(path)
    lines = str(error.value).split("\n")
    assert all(line.startswith(f"{path}: ") and line.isprintable() for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def wrong(raw):
    """The same without a file, and only of what the records' types say: a hundredth of the time."""
    with pytest.raises(ParamsError) as error:
        read_record(Params, raw)
    assert all(line.isprintable() for line in error.value.lines)
    return error.value.lines


# the file

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{one}: &{one} [{', '.join([f'*{before}'] * 10)}]\n" for before, one in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "a key twice": (b"seed: 1\ntrain:\n  lr: 1\n  lr: 2\n", "line 4: the key 'lr' is in line 3 already"),
    "a key twice, in braces": (b"a: {b: 1,\n  b: 1}\n", "line 2: the key 'b' is in line 1 already"),
    "aliases": (BOMB.encode(), "line 7: the file is too large once its aliases"),
    "merged aliases": (BOMB.replace(": &a [x", ": &a [{x: 1}, x").encode(), "line 7: the file is too large once"),
    "one long text": (b"a: &a " + b"x" * 9000 + b"\nb: [" + b"*a, " * 900 + b"]\n", "line 2: the file is too large"),
    "an alias in itself": (b"a: 1\nb: &b [1, *b]\n", "line 2: *b is a part of itself"),
    "Latin-1": (b"a: 1\nb: caf\xe9\n", "line 2: not UTF-8"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "line 1: not UTF-8"),
    "NUL": (b"a: 1\nb: \x00\n", "line 2: the character U+0000 is not allowed"),
    "a tab": (b"a:\n\tb: 1\n", "line 2: not valid YAML"),
    "lists in lists": (b"a: 1\nb: " + b"[" * 200, "line 2: more than 50 levels deep"),
    "lists below lists": (b"- " * 200 + b"x", "line 1: more than 50 levels deep"),
    "a number for a key": (b"a: 1\n1: 2\n", "line 2: the key '1' is not text; put it in quotes"),
    "null for a key": (b"a: 1\nnull: 2\n", "line 2: the key 'null' is not text"),
    "true for a key": (b"a:\n  true: 2\n", "line 2: the key 'true' is not text"),
    "a list for a key": (b"a: 1\n? [1, 2]\n: 2\n", "line 2: a key is not text"),
    "code": (b"a: !!python/object/apply:os.system [exit]\n", "line 1: a value of the kind 'python/object"),
    "a set, in no order": (b"main: !!set {a, b}\n", "line 1: a value of the kind 'set'"),
    "bytes": (b"a: !!binary aGVsbG8=\n", "line 1: a value of the kind 'binary'"),
    "a day": (b"a: 2024-01-31\n", "line 1: a value of the kind 'timestamp'"),
    "no day": (b"a: 2024-99-99\n", "line 1: a value of the kind 'timestamp'"),
    "a very long number": (b"a: 1\nb: " + b"9" * 5000, "line 2: a number that cannot be read"),
    "an octal number": (b"a: 1\nb: [010]\n", "line 2: '010' is something else to DVC"),
    "a number with lines": (b"a: 1_000\n", "line 1: '1_000' is something else to DVC"),
    "minutes": (b"a: 1:30\n", "line 1: '1:30' is something else to DVC"),
    "yes": (b"a: yes\n", "line 1: 'yes' is something else to DVC: write a plain number, true or false"),
    "no number": (b"a: 0b_\n", "line 1: '0b_' is something else to DVC"),
    "two documents": (b"a: 1\n---\na: 2\n", "line 2: not valid YAML"),
    "100 MB": (None, "104,857,600 bytes; such a file has 1,048,576 at most"),
    "a pipe": (os.mkfifo, "not a file"),
    "a folder": (os.mkdir, "not a file"),
    "a circle of links": (lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)"),
}


@pytest.mark.parametrize(("content", "says"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_read_is_one_line_with_its_line(tmp_path, content, says):
    """The same of params.yaml, a prompt file and a protocol."""
    path = tmp_path / "own.yaml"
    if callable(content):
        content(path)
    elif content is None:
        with path.open("wb") as file:
            file.truncate(100 << 20)
    else:
        path.write_bytes(content)
    for load, kind in ((load_params, ParamsError), (load_templates, PromptError), (load_protocol, ProtocolError)):
        with pytest.raises(kind) as error:
            load(path if load is not load_protocol else str(path))
        assert str(error.value).startswith(f"{path}: {says}") and str(error.value).isprintable()


def test_what_is_valid_is_read_as_before(tmp_path):
    for file in (*ROOT.glob("pipeline/evaluation/protocols/*.yaml"), ROOT / "params.yaml"):
        assert read_yaml(file) == yaml.safe_load(file.read_text())
    path = tmp_path / "own.yaml"
    text = "\ufeffa: &a {lr: 1e-4, x: ~}\nb: {<<: *a, x: 2}\nc: [*a, !!str 5, 'é']\n'1': {'yes': true}\nd: *a\n"
    path.write_text(text, encoding="utf-8")
    assert read_yaml(path) == yaml.safe_load(text)
    with pytest.raises(YamlFileError, match="not allowed"):
        path.write_text("a: \x07")
        read_yaml(path)


@pytest.mark.parametrize("place", ["like", "main", "trained_on", "protocols", "regeneration", "datasets", "keys"])
def test_a_file_of_very_many_names_is_refused_in_a_moment(tmp_path, place):
    """Of which each is close to all others: a hint for each would compare all with all."""
    names = [f"{'ab' * 28}{n:05}" for n in range(4000)]
    raw, run = copy.deepcopy(demo()), {"image_encoder": "resnet", "datasets": ["mimic_cxr"]}
    if place == "like":
        raw["runs"] |= {name: {"like": f"{name}x"[1:]} for name in names}
    elif place == "main":
        raw["runs"] |= {f"{name}y": run for name in names[:300]}
        raw["main"] = names
    elif place == "trained_on":
        raw["others"] = {"other": {"adapter": "gloria", "weights": "w", "model": "x", "trained_on": names}}
    elif place == "protocols":
        raw["evaluate"]["protocols"] = [*names, names[0]]
    elif place == "regeneration":
        raw["evaluate"]["regeneration"]["runs"] = names
    elif place == "datasets":
        raw["runs"] |= {name: {**run, "datasets": [name]} for name in names}
    else:
        raw |= dict.fromkeys(names, 1)
    (tmp_path / "params.yaml").write_text(yaml.dump(raw, Dumper=yaml.CSafeDumper))
    since = time.process_time()
    with pytest.raises(ParamsError):
        load_params(tmp_path / "params.yaml")
    assert time.process_time() - since < 8


def test_runs_that_are_like_one_another_without_end_are_one_line(tmp_path):
    raw = copy.deepcopy(demo())
    raw["runs"] |= {f"r{i}": {"like": f"r{i + 1}"} for i in range(300)} | {"r300": {"like": "clip"}}
    (line,) = refused(tmp_path, raw)
    assert "ends a chain of more than 50 runs" in line


# names

WRONG = [
    "../../../x",
    "x; touch y #",
    "$(touch y)",
    "a'b",
    'a"b',
    "a b",
    "a\nb",
    "a\x1b[2J",
    "",
    "é",
    "a-b",
    "a.b",
    "x" * 65,
    "1e5",
    "08",
    "_1",
]
OTHER = {"adapter": "gloria", "weights": "weights/gloria", "model": "GLoRIA"}
SOURCE = {"reader": "manifest", "path": "a", "stamp": "b", "manifest": "list.csv"}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("sources",), SOURCE),
        (("runs",), {"image_encoder": "resnet", "datasets": ["mimic_cxr"]}),
        (("others",), OTHER),
        (("model", "image_encoders"), {"name": "resnet50"}),
        (("evaluate", "few_shot", "shares"), 0.5),
        (("evaluate", "few_shot", "fine_tune", "epochs"), 3),
        (("phantom", "archives"), 30),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_name_is_letters_digits_and_underscores(name, place, value):
    lines = wrong(changed((*place, name), value))
    assert any(line.startswith(".".join(place)) and "a name is letters, digits and _" in line for line in lines)


@pytest.mark.parametrize("name", ["../x", "x; touch y #"])
@pytest.mark.parametrize(
    "place",
    [
        *(("runs", "resnet_m", "datasets", 0), ("runs", "resnet_m", "image_encoder"), ("main", 0), ("ablations", 0)),
        *(("compositions", 0), ("prompt_ablations", 0), ("control",), ("evaluate", "official", "runs", 0)),
        *(("evaluate", "official", "shares", 0), ("evaluate", "regeneration", "runs", 0)),
        *(("evaluate", "few_shot", "fine_tune", "runs", 0), ("runs", "mixed", "paired", 0)),
    ],
    ids=lambda place: ".".join(map(str, place)),
)
def test_a_reference_is_a_name_too(name, place):
    lines = wrong(changed(place, name))
    assert any("a name is letters, digits and _" in line for line in lines)


def test_every_mapping_of_params_has_names_for_keys_and_every_list_of_names_has_each_once():
    """So that a mapping added later is looked at, too."""
    seen = 0
    for record in {record for record, *_ in FOUND} | {Run, Params}:
        for field, kind in typing.get_type_hints(record, include_extras=True).items():
            bare = kind_at(record, (field,))
            if typing.get_origin(bare) is dict and typing.get_args(bare)[1] is not typing.Any:
                key, seen = typing.get_args(bare)[0], seen + 1
                assert "A-Za-z0-9_" in str(key), f"{record.__name__}.{field}"
            if typing.get_origin(bare) is tuple and typing.get_args(bare)[1] is ...:
                assert "each_once" in str(kind), f"{record.__name__}.{field}"
    assert seen > 8


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("runs", "Resnet_M"), {"like": "resnet_m"}, "runs and others: resnet_m and Resnet_M differ in capitals alone"),
        (("others", "CLIP"), OTHER, "runs and others: clip and CLIP differ in capitals alone"),
        (("evaluate", "few_shot", "fine_tune", "shares", "P10"), 1.0, "evaluate.few_shot.shares: p10 and P10 differ"),
        (("main",), ["resnet_m", "swin_m", "resnet_m"], "main: 'resnet_m' is there twice"),
        (
            ("runs", "resnet_mc", "datasets"),
            ["chexpert", "chexpert"],
            "runs.resnet_mc.datasets: 'chexpert' is there twice",
        ),
        (("seeds",), [1, 1], "seeds: expected at least one, each once"),
        (("evaluate", "retrieval", "k"), [], "evaluate.retrieval.k: expected at least one, each once"),
        (("evaluate", "protocols"), ["paper", "paper"], "evaluate.protocols: 'paper' is there twice"),
        (("model", "text_encoder", "vocabulary"), 0, "model.text_encoder.vocabulary: 0; a tokenizer is trained"),
        (("augment", "crop_scale"), [0.9, 0.8], "augment.crop_scale: [0.9, 0.8] is no lower and upper bound"),
        (("train", "a\nb"), 1, "train.'a\\nb': unknown key"),
        (("train", "lr"), "1_0", "train.lr: expected a number, got '1_0'"),
        (("train", "lr"), "nan", "train.lr: expected a number, got 'nan'"),
        (("train", "lr"), "1e400", "train.lr: expected a number, got inf"),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_else_is_refused(tmp_path, place, value, says):
    assert any(line.startswith(says) for line in refused(tmp_path, changed(place, value)))


# numbers


def leaves(cls, place=()):
    """(record, place in params.yaml, annotation) of each number, those in lists and mappings included."""
    for field in fields(cls):
        yield from _leaves(cls, (*place, field.name))


def _leaves(cls, place, root=Params):
    kind = kind_at(root, place, bare=False)
    bare = kind_at(root, place)
    if is_dataclass(bare):
        yield from leaves(bare, place)
    elif typing.get_origin(bare) is dict:
        key = {"sources": "siim", "others": "their", "runs": "resnet_m", "image_encoders": "swin"}.get(place[-1], "p10")
        yield from _leaves(cls, (*place, "siim" if place[-1] == "archives" else key))
    elif typing.get_origin(bare) is tuple:
        yield from _leaves(cls, (*place, 0))
    elif bare in (int, float):
        yield cls, place, kind


def bound(kind, *names):
    found = [getattr(part, name) for extra in typing.get_args(kind) for part in getattr(extra, "metadata", ())
             for name in names if hasattr(part, name)]  # fmt: skip
    return found[0] if found else None


FOUND = list(leaves(Params))


def test_there_are_as_many_numbers_as_that():
    assert len(FOUND) > 70 and len({record for record, *_ in FOUND}) > 15


@pytest.mark.parametrize(("place", "kind"), [pytest.param(*leaf, id=".".join(map(str, leaf[0]))) for _, *leaf in FOUND])
def test_every_number_has_a_lower_and_an_upper_bound_that_hold(place, kind):
    low, high = bound(kind, "ge", "gt"), bound(kind, "le", "lt")
    assert low is not None and high is not None and low >= 0 and low < high < 2**33
    whole = kind_at(Params, place) is int
    beyond = [low - 1, high + 1, -math.inf, math.inf, math.nan, "1e400", ".nan", 10**400, -(10**400), True]
    for value in [*beyond, *([low] if bound(kind, "gt") is not None else []), *([0.5] if whole else [])]:
        with pytest.raises(ParamsError) as error:
            read_record(Params, changed(place, value))
        said = str(error.value)
        assert said.startswith(".".join(str(p) for p in place if p != 0)) and said.isprintable() and len(said) < 200


@pytest.mark.parametrize("cls", [RunConfig, *(c for n, c in vars(settings).items() if n.endswith("Settings"))])
def test_numbers_of_the_settings_have_bounds_too(cls):
    for field in fields(cls):
        for place in ((field.name,), (field.name, 0), (field.name, "x")):
            if kind_at(cls, place) in (int, float):
                assert bound(kind_at(cls, place, bare=False), "ge", "gt") is not None, field.name


# places


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (("prompts", "file"), "../x.yaml", "'../x.yaml' leaves the repository"),
        (("prompts", "ablation"), "a/../../x.yaml", "'a/../../x.yaml' leaves the repository"),
        (("prompts", "file"), "/none/x.yaml", "/none/x.yaml not found"),
        (("prompts", "file"), "", "missing; it is empty"),
        (("prompts", "file"), "~/x.yaml", "'~/x.yaml': ~ and $ are not filled in; give the whole path"),
        (("sources", "siim", "path"), "$HOME/siim", "'$HOME/siim': ~ and $ are not filled in"),
        (("prompts", "file"), "s3://bucket/x.yaml", "'s3://bucket/x.yaml' is a URL; a local path is needed"),
        (("evaluate", "protocols", 0), "../own.yaml", "'../own.yaml' leaves the repository"),
        (("evaluate", "protocols", 0), "pa per", "'pa per' is neither a protocol's name nor a path"),
        (("sources", "siim", "path"), "..", "'..' leaves the repository"),
        (("sources", "siim", "path"), "a\x00b", "'a\\x00b' has a character that no path has"),
        (
            ("sources", "siim", "path"),
            "s4://bucket/siim",
            "unknown URL scheme 's4'; known are abfs, ",
        ),
        (("sources", "siim", "path"), "simplecache::s5://a/b", "unknown URL scheme 's5'"),
        (("sources", "siim", "path"), "dropbox://x/y", "dropbox:// cannot be read here: "),
        (("sources", "siim", "stamp"), "../x.json", "'../x.json' leaves the repository"),
        (("sources", "chexpert", "list_5x200"), "/none.csv", "/none.csv not found"),
        (("sources", "mimic_cxr", "reports"), "nfs://a/b", "unknown URL scheme 'nfs'"),
        (("ingest", "target"), "data/elsewhere", "'data/elsewhere' is no URL"),
        (("ingest", "target"), "s4://bucket", "unknown URL scheme 's4'"),
        (("others", "their", "weights"), "../weights", "'../weights' leaves the repository"),
        (("model", "text_encoder", "name"), "../bert", "'../bert' leaves the repository"),
        (("model", "text_encoder", "name"), "/none/bert", "/none/bert not found"),
        (("back_translation", "forward"), "../marian", "'../marian' leaves the repository"),
    ],
)
def test_a_place_is_below_the_repository_or_there_or_a_known_url(tmp_path, place, value, says):
    raw = changed(("others", "their"), dict(OTHER)) if place[0] == "others" else demo()
    raw = copy.deepcopy(raw)
    at = raw
    for key in place[:-1]:
        at = at[key]
    at[place[-1]] = value
    key = ".".join(str(step) for step in place if step != 0)
    assert any(line.startswith(f"{key}: {says}") for line in refused(tmp_path, raw))


@pytest.mark.parametrize("manifest", ["/list.csv", "../list.csv", "s3://a/list.csv"])
def test_a_manifest_is_below_its_archive(tmp_path, manifest):
    raw = changed(("sources", "mine"), {**SOURCE, "manifest": manifest})
    assert any(line.startswith(f"sources.mine.manifest: {manifest!r} is not below") for line in refused(tmp_path, raw))


def test_places_that_are_fine(tmp_path):
    raw = changed(("sources", "mine"), {**SOURCE, "path": "s3://bucket/a", "manifest": "lists/../list.csv"})
    raw["sources"]["siim"] |= {"path": "/not/there/yet"}  # whoever reads it says how to get it
    raw["sources"]["rsna"] |= {"path": "simplecache::s3://bucket/rsna"}
    raw["sources"]["mimic_cxr"] |= {"path": str(tmp_path), "reports": "archives/../reports.zip"}
    raw["ingest"]["target"] = "s3://bucket/cxr"
    raw["model"]["text_encoder"]["name"] = "emilyalsentzer/Bio_ClinicalBERT"
    (tmp_path / "own.yaml").touch()
    raw["evaluate"]["protocols"] = ["paper", str(tmp_path / "own.yaml"), "mine/own.yaml"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    assert load_params(tmp_path / "params.yaml").sources["rsna"].path == "simplecache::s3://bucket/rsna"


# the shell


def test_no_name_of_params_is_in_a_command():
    """And each item of a stage, whatever its name, has the check of params.yaml before it."""
    for name, stage in DVC.items():
        made = stage.get("do", stage)
        assert made["cmd"].replace("${train.launcher} ", "").count("${") == 0, name
        assert '"$DVC_STAGE"' in made["cmd"] or made["cmd"].count("$") == 0
        if "foreach" in stage or "matrix" in stage:
            assert any(dep.startswith("data/settings/") and "${" not in dep for dep in made["deps"]), name
            assert made["cmd"].endswith('"$DVC_STAGE"')


EVIL = {"x; touch y1 #": "sources", "$(touch y2)": "runs", "'; touch y3; '": "runs", '"; touch y4; "': "runs"}


def test_a_name_runs_nothing(tmp_path):
    """The graph as it is, with stages that only note how they are called: each one is behind ``settings``, which fails;
    one that is asked for by itself gets its name as one word."""
    raw = copy.deepcopy(demo())
    raw["sources"] = {"x; touch y1 #": {**SOURCE, "stamp": "params.yaml"}}
    raw["runs"] = {name: {} for name, section in EVIL.items() if section == "runs"}
    raw["others"] = {"../../../../outside": OTHER}
    raw["main"] = raw["evaluate"]["official"]["runs"] = raw["evaluate"]["regeneration"]["runs"] = list(raw["runs"])
    root = tmp_path / "a" / "repository"
    files = [dep for stage in DVC.values() for dep in stage.get("do", stage)["deps"] if "${" not in dep]
    for dep in sorted({dep for dep in files if dep.startswith(("pipeline", "stages"))}):
        file = root / dep if Path(dep).suffix else root / dep / "a.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    shutil.copy(ROOT / "dvc.yaml", root)
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    outside = tmp_path / "a" / "outside"  # an output of that model, from data/embeddings/others
    outside.mkdir()
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "python"
    stub.write_text(f"#!{sys.executable}\nimport sys, json\nopen({str(tmp_path / 'calls')!r}, 'a').write("
                    "json.dumps(sys.argv[1:]) + '\\n')\nsys.exit(1)\n")  # fmt: skip
    stub.chmod(0o755)
    dvc = Path(sys.executable).with_name("dvc")
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    for command in (["init", "-q", "--no-scm"], ["repro", "--keep-going"]):
        subprocess.run(
            [sys.executable, dvc, *command], cwd=root, env=env, capture_output=True, timeout=120, check=False
        )
    called = (tmp_path / "calls").read_text().splitlines()
    assert [json.loads(line) for line in called] == [["-m", "stages.settings"]]
    assert outside.is_dir()
    for name in EVIL:  # what a stage depends on that is asked for by itself
        (root / f"data/corpus/{name}").mkdir(parents=True)
    (root / "data/settings/ingest").mkdir(parents=True)
    (root / "data/settings/checked").touch()
    (root / "data/settings/ingest/x; touch y1 #.json").touch()
    items = ["ingest@x; touch y1 #", *(f"pretrain@{name}-0" for name, section in EVIL.items() if section == "runs")]
    alone = [sys.executable, dvc, "repro", "--keep-going", "--single-item", *items]
    subprocess.run(alone, cwd=root, env=env, capture_output=True, timeout=120, check=False)
    called = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()[1:]]
    assert sorted(called) == sorted(["-m", f"stages.{item.partition('@')[0]}", item] for item in items)
    assert not list(tmp_path.rglob("y[1-4]"))


@pytest.mark.parametrize(
    ("words", "item", "gets"),
    [
        (["main", "few_shot@a_b-0"], "few_shot@a_b-0", ("main", "a_b", "0")),
        (["other", "../dvc.yaml:embed_other@x"], "../dvc.yaml:embed_other@x", ("other", "x")),
        (["a_b", "0"], "pretrain@other-1", ("a_b", "0")),
        (["--baseline", "main@{u}"], "", ("--baseline", "main@{u}")),
        (["ingest@x; touch y"], "ingest@x; touch y", ("x; touch y",)),
        ([], "tables", ()),
    ],
)
def test_a_stage_knows_its_item_by_the_name_that_dvc_gives_it(monkeypatch, words, item, gets):
    monkeypatch.setattr(sys, "argv", ["stage", *words])
    monkeypatch.setenv("DVC_STAGE", item)
    got = []
    stages.run("stage", lambda *found: got.append(found))
    assert got == [gets] and sys.argv[1:] == list(gets)


def test_a_stage_by_itself_checks_params_before_it_writes(tmp_path, monkeypatch):
    raw = changed(("runs", "../../x"), {"like": "resnet_m"})
    raw["sources"]["../../x"] = SOURCE
    (tmp_path / "in" / "it").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "in" / "it")
    Path("params.yaml").write_text(yaml.safe_dump(demo()))
    settings.write_settings(load_params(Path("params.yaml")))
    shutil.copy("data/settings/ingest/siim.json", "data/x.json")  # data/settings/ingest/../../x.json
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    for stage in (lambda: stages.ingest.main("../../x"), lambda: stages.pretrain.main("../../x", "0")):
        with pytest.raises(ParamsError, match="a name is letters, digits and _"):
            stage()
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_are_there_whole_or_as_they_were(tmp_path, monkeypatch):
    params, folder = load_params(ROOT / "params.yaml"), tmp_path / "settings"
    settings.write_settings(params, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        found = settings.settings_of(params)
        patch.setattr(settings, "settings_of", lambda _: {"phantom": found["phantom"], "audit": object()})
        with pytest.raises(TypeError):
            settings.write_settings(params, folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    settings.write_settings(params, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["settings"]
