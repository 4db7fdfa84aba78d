"""The stages of dvc.yaml, one script each, and the commands beside them."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

# The libraries make a million objects that stay; with Python's threshold of 700 a fifth of their import is collection.
gc.set_threshold(10_000)


def run(stage: str, main: Callable[..., Any], usage: str = "") -> None:
    """Call ``main`` with the command's arguments. Wrong arguments and errors of input end the process with one line."""
    words = sys.argv[1:]
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        sys.exit(f"usage: python -m stages.{stage} {usage}".rstrip())
    try:
        main(*words)
    except (ValueError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError:  # of a library, and no error of input
            raise
        said = f"{stage} {'/'.join(words)}".rstrip() + f": {error}"
        sys.exit(said if str(error) else 1)  # of several processes one says why


def code_of(stage: str) -> list[Path]:
    """What a stage of dvc.yaml depends on beside data: its script and the rooms that compute it."""
    graph = yaml.safe_load((Path(__file__).parents[1] / "dvc.yaml").read_text(encoding="utf-8"))
    return [Path(path) for path in graph["stages"][stage]["deps"] if not path.startswith("data/")]
