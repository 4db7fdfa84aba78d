"""An experiment re-runs what it can influence and nothing else: the parameters that dvc.yaml lists for a stage are
those that its script reads, and docs/experiments.md says the same.

``python -m tests.test_caching`` writes the table of docs/experiments.md anew, after a change of dvc.yaml.
"""

import ast
import functools
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from pipeline.config import params as config
from pipeline.config.run_config import SPEED

ROOT = Path(__file__).parents[1]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
DOC = ROOT / "docs" / "experiments.md"
MARKS = ("<!-- from dvc.yaml: python -m tests.test_caching -->\n", "<!-- end -->\n")
# How fast, not what: these change no output (other than by rounding), so no stage need depend on them.
INDIFFERENT = {
    "tracking",
    "ingest.workers",
    "ingest.scheduler",
    "audit.workers",
    *(f"train.{key}" for key in SPEED if key != "launcher"),
    "runs.*.train",  # of which ``run_config.speed`` hands on those alone, to the stage pretrain
    "evaluate.batch_size",
    "evaluate.threads",
}
SECTIONS = {field.name for field in fields(config.Params)}


# what a script reads


def loads(tree: ast.AST, name: str) -> list[ast.Name]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)]


def only_told(tree: ast.AST) -> set[ast.AST]:
    """Nodes whose value goes to the tracking record alone: arguments of stage_run, and variables used nowhere else."""
    told: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("stage_run"):
            told |= {inner for argument in (*node.args, *node.keywords) for inner in ast.walk(argument)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            uses = loads(tree, node.targets[0].id)
            if uses and all(use in told for use in uses):
                told |= set(ast.walk(node.value))
    return told


def reads(function: ast.AST, variable: str, module: ast.Module, seen: frozenset = frozenset()) -> set[str]:
    """Parameters that a function reads off the Params in ``variable``, and those it hands it to."""
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    told, found = only_told(function), set()
    for name in loads(function, variable):
        if name in told:
            continue
        node: ast.AST = name
        path: list[str] = []
        while isinstance(parent := parents.get(node), ast.Attribute | ast.Subscript) and parent.value is node:
            path.append(parent.attr if isinstance(parent, ast.Attribute) else "*")
            node = parent
        if isinstance(parent, ast.Call) and parent.func is node:  # a method, such as .items()
            path.pop()
        if isinstance(parent, ast.Compare) and node in parent.comparators:
            path.append("*")  # whether a name is among them
        if path:
            found.add(".".join(path))
        elif isinstance(parent, ast.Call) and ast.unparse(parent.func) == "getattr":
            found |= {c.value for c in ast.walk(function) if isinstance(c, ast.Constant) and c.value in SECTIONS}
        elif isinstance(parent, ast.Call | ast.keyword):
            call = parent if isinstance(parent, ast.Call) else parents[parent]
            target, home = resolve(call.func, module)
            arguments = target.args.posonlyargs + target.args.args + target.args.kwonlyargs
            key = parent.arg if isinstance(parent, ast.keyword) else arguments[call.args.index(node)].arg
            if (target.name, key) not in seen:
                found |= reads(target, key, home, seen | {(target.name, key)})
        else:
            pytest.fail(f"line {name.lineno}: what becomes of {ast.unparse(parent)}? Teach tests/test_caching.py")
    return found


def resolve(func: ast.expr, module: ast.Module) -> tuple[ast.FunctionDef, ast.Module]:
    """The definition of a called function of this project, by the imports of the module that calls it."""
    names = ast.unparse(func).split(".")
    if len(names) == 1:
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and node.name == names[0]:
                return node, module
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == names[0]:
                    parts = [*node.module.split("."), *([alias.name] if len(names) > 1 else [])]
                    home = ast.parse((ROOT / Path(*parts)).with_suffix(".py").read_text())
                    return resolve(ast.Name(names[-1] if len(names) > 1 else alias.name), home)
    pytest.fail(f"{ast.unparse(func)}: where is it defined?")


def read_by(stage: str) -> set[str]:
    return leaves(reads_of((ROOT / "stages" / f"{stage}.py").read_text()))


def reads_of(text: str) -> set[str]:
    module = ast.parse(text)
    main = next(n for n in module.body if isinstance(n, ast.FunctionDef) and n.name == "main")
    loaded = [
        node.targets[0].id
        for node in ast.walk(main)
        if isinstance(node, ast.Assign) and re.fullmatch(r"load_params\(\)", ast.unparse(node.value))
    ]
    assert len(loaded) == 1, "a stage script loads params.yaml once, in main"
    found = reads(main, loaded[0], module)
    variables = aliases(main, loaded[0])
    for name, section in variables.items():  # options = params.back_translation: what it is used for
        uses = reads(main, name, module) if not handed(main, name) else {""}
        found.discard(section)
        found |= {f"{section}.{use}".rstrip(".") for use in uses}
    return found


def aliases(main: ast.FunctionDef, variable: str) -> dict[str, str]:
    pattern = re.compile(rf"{variable}\.([\w.]+)")
    return {
        n.targets[0].id: m[1]
        for n in ast.walk(main)
        if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)
        if (m := pattern.fullmatch(ast.unparse(n.value)))
    }


def handed(main: ast.FunctionDef, name: str) -> bool:
    told = only_told(main)
    owners = {child: node for node in ast.walk(main) for child in ast.iter_child_nodes(node)}
    return any(use not in told and not isinstance(owners[use], ast.Attribute) for use in loads(main, name))


# what dvc.yaml lists


def listed(stage: str) -> set[str]:
    spec = DVC[stage].get("do", DVC[stage])
    named = set(re.findall(r"\$\{(?!item|key)([\w.]+)\}", " ".join([spec["cmd"], *spec["deps"]])))
    return leaves({re.sub(r"\$\{[\w.]+\}", "*", p) for p in spec.get("params", [])} | named)


def leaves(paths: set[str]) -> set[str]:
    """Sections as the single parameters they are made of; a mapping (sources, runs) is one, its items are ``.*``."""

    def below(cls: type, path: str) -> set[str]:
        if not is_dataclass(cls):
            return {path}
        hints = get_type_hints(cls)
        return {leaf for name in hints for leaf in below(hints[name], f"{path}.{name}")}

    found = set()
    for path in paths:
        first, *rest = path.split(".")
        cls = get_type_hints(config.Params)[first]
        for part in rest:
            cls = get_type_hints(cls)[part] if is_dataclass(cls) else type(None)
        found |= below(cls, path)
    return found


def within(path: str, section: str) -> bool:
    return path == section or path.startswith(f"{section}.")


def indifferent(path: str) -> bool:
    return any(within(path, known) for known in INDIFFERENT)


@pytest.mark.parametrize("stage", sorted(DVC))
def test_a_stage_depends_on_the_parameters_it_reads(stage):
    if "params.yaml" in DVC[stage].get("do", DVC[stage])["deps"]:
        return  # it depends on all of them
    found, known = read_by(stage), listed(stage)
    lost = {p for p in found if not indifferent(p) and not any(within(p, k) for k in known)}
    assert not lost, f"read, but a change of it re-runs nothing: {sorted(lost)}"
    idle = {k for k in known if not any(within(p, k) for p in found)} - {"train.launcher"}  # part of the command
    assert not idle, f"listed, but not read, so that a change re-runs the stage for nothing: {sorted(idle)}"


def test_the_whole_of_params_is_followed_to_where_it_is_read():
    """run_config hands on seven sections; a section under another name, a keyword and a method call are seen, too."""
    head = "from pipeline.config import run_config\nfrom pipeline.tracking import mlflow_runs\n"
    script = head + "def main(name):\n    p = load_params()\n    run = run_config.run_config(p, name)\n    use(run)\n"
    assert reads_of(script) >= {"seed", "runs.*", "sampling", "augment", "loss", "train", "model.text_encoder"}
    told = script.replace("use(run)", "mlflow_runs.stage_run('pretrain', name, run, p.tracking.enabled)")
    assert reads_of(told) == set()
    more = head + (
        "def main(name):\n    p = load_params()\n    options = p.evaluate.few_shot\n    other = p.audit\n"
        "    use(options.lr, x=p.seed)\n    whole(other)\n    for run in p.runs.items(): use(p.sources[run])\n"
    )
    assert reads_of(more) == {"evaluate.few_shot.lr", "seed", "audit", "runs", "sources.*"}


def test_the_library_reads_no_params_on_its_own():
    """A module that loads params.yaml itself would escape the comparison above."""
    for file in (ROOT / "pipeline").rglob("*.py"):
        text = file.read_text()
        assert file.name == "load.py" or not re.search(r"\bload_params\(|params\.yaml\"\)", text), file


# the table of the docs


@functools.cache
def downstream(stage: str) -> list[str]:
    """Stages that read an output of this one, directly or through others, in the order of dvc.yaml."""
    specs = {name: spec.get("do", spec) for name, spec in DVC.items()}

    def paths(items) -> set[str]:
        names = [next(iter(i)) if isinstance(i, dict) else i for i in items]
        return {re.sub(r"/?\$\{.*", "", n) for n in names}

    outs = {n: {o for o in paths(s.get("outs", [])) | paths(s.get("metrics", [])) if o} for n, s in specs.items()}
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


def table() -> str:
    """Parameter -> the stages that read it and, once each, those that follow them."""
    rows: dict[str, list[str]] = {}
    for stage, spec in DVC.items():
        spec = spec.get("do", spec)
        named = set(re.findall(r"\$\{(?!item|key)([\w.]+)\}", " ".join([spec["cmd"], *spec["deps"]])))
        for path in sorted({re.sub(r"\$\{[\w.]+\}", "…", p) for p in spec.get("params", [])} | named):
            rows.setdefault(path, []).append(stage)
    rows = {p: s for p, s in rows.items() if not any(within(p, q) and rows[q] == s for q in rows if q != p)}
    order = list(yaml.safe_load((ROOT / "params.yaml").read_text()))
    text = "| parameter | stages that read it | what may follow them |\n|---|---|---|\n"
    for path in sorted(rows, key=lambda p: (order.index(p.split(".")[0]), p)):
        stages = rows[path]
        after = {late for stage in stages for late in downstream(stage)} - set(stages)
        text += f"| `{path}` | {', '.join(stages)} | {', '.join(s for s in DVC if s in after) or '—'} |\n"
    return text + "| `main` | few_shot of the runs that are new in it, tables | — |\n| any | tables | — |\n"


def test_the_docs_say_what_re_runs():
    _, _, rest = DOC.read_text(encoding="utf-8").partition(MARKS[0])
    assert rest.partition(MARKS[1])[0] == table(), "run: python -m tests.test_caching"


if __name__ == "__main__":
    start, _, rest = DOC.read_text(encoding="utf-8").partition(MARKS[0])
    DOC.write_text(start + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2], encoding="utf-8")
