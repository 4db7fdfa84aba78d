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
        ParamsError: one line naming the key, what is wrong with it and what is accepted.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: not found; run from the repository root or copy profiles/demo.yaml to it") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise ParamsError(f"{path}: line {line}: not valid YAML") from None
    try:
        params = read_record(Params, _runs_filled_in(raw))
        check(params)
    except ParamsError as error:
        raise ParamsError(*(f"{path}: {line}" for line in error.lines)) from None
    return params


def _runs_filled_in(raw: Any) -> Any:
    """The mapping of params.yaml in which every run that is ``like`` another one has all its keys."""
    if not isinstance(raw, Mapping) or not isinstance(runs := raw.get("runs"), Mapping):
        return raw  # whose error ``read_record`` says

    def whole(name: str, above: tuple[str, ...]) -> Any:
        run = runs[name]
        if not isinstance(run, Mapping) or "like" not in run:
            return run
        like = run["like"]
        if not isinstance(like, str) or like not in runs:
            raise ParamsError(f"runs.{name}.like: {like!r} is not among runs{hint(str(like), map(str, runs))}")
        if like in (*above, name):
            raise ParamsError(f"runs.{name}.like: {' -> '.join((*above, name, like))} goes round in a circle")
        merged = dict(whole(like, (*above, name)))
        for key, value in run.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
        return merged

    return {**raw, "runs": {name: whole(name, ()) for name in runs}}
