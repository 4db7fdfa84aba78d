"""Read params.yaml: from YAML to checked records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.checks import check
from pipeline.config.params import Params
from pipeline.config.records import ParamsError, hint, read_record


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml.

    Raises:
        ParamsError: a line for each thing that is wrong: the key, what is wrong with it and what is accepted. What the
            keys say of one another is looked at once each of them can be read by itself.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: not found; run from the repository root or copy profiles/demo.yaml to it") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise ParamsError(f"{path}: line {line}: not valid YAML") from None
    try:
        raw, lines = _runs_filled_in(raw)
        params = _read(raw, lines)
        check(params)
    except ParamsError as error:
        raise ParamsError(*(f"{path}: {line}" for line in error.lines)) from None
    return params


def _read(raw: Any, lines: list[str]) -> Params:
    """The records, unless ``lines`` or they themselves say what is wrong."""
    try:
        params = read_record(Params, raw)
    except ParamsError as error:
        lines = [*lines, *error.lines]
    if lines:
        raise ParamsError(*lines)
    return params


def _runs_filled_in(raw: Any) -> tuple[Any, list[str]]:
    """The mapping of params.yaml in which every run that is ``like`` another one has all its keys, and what is wrong
    with some ``like``."""
    if not isinstance(raw, Mapping) or not isinstance(runs := raw.get("runs"), Mapping):
        return raw, []  # whose error ``read_record`` says
    wrong: dict[frozenset[str], str] = {}  # a circle is one thing wrong, whichever run of it is asked for

    def whole(name: str, above: tuple[str, ...]) -> Any:
        run = runs[name]
        if not isinstance(run, Mapping) or "like" not in run:
            return run
        like = run["like"]
        if not isinstance(like, str):
            return run  # as above
        if like not in runs:
            said = f"runs.{name}.like: {like!r} is not among runs{hint(like, map(str, runs))}"
            wrong[frozenset([name])] = said
            return run
        if like in (*above, name):
            said = f"runs.{name}.like: {' -> '.join((*above, name, like))} goes round in a circle"
            chain = (*above, name)
            wrong.setdefault(frozenset(chain[chain.index(like) :]), said)
            return run
        merged = whole(like, (*above, name))
        if not isinstance(merged, Mapping):
            return run
        merged = dict(merged)
        for key, value in run.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
        return merged

    filled = {name: whole(name, ()) for name in runs}
    return {**raw, "runs": filled}, list(wrong.values())
