"""Read params.yaml: from YAML to checked records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config.checks import check
from pipeline.config.params import Params
from pipeline.config.records import NAME, ParamsError, hint, read_record
from pipeline.config.yaml_file import YamlFileError, read_yaml

MOST_LIKE = 50  # runs, each like the next


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml.

    Raises:
        ParamsError: a line for each thing that is wrong: the key, what is wrong with it and what is accepted. What the
            keys say of one another is looked at once each of them can be read by itself.
    """
    try:
        raw = read_yaml(path)
    except FileNotFoundError:
        raise ParamsError(f"{path}: not found; run from the repository root or copy profiles/demo.yaml to it") from None
    except YamlFileError as error:
        raise ParamsError(f"{path}: {error}") from None
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
    if not all(NAME.fullmatch(name) for name in runs):
        return raw, []  # the same
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
        if len(above) > MOST_LIKE:
            wrong[frozenset()] = f"runs.{name}.like: {like} ends a chain of more than {MOST_LIKE} runs; name fewer"
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
