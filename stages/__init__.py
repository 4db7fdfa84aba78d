"""The stages of dvc.yaml, one script each, and the commands beside them."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.tracking.last_words import last_words
from pipeline.tracking.launcher import arguments
from pipeline.tracking.work_folders import keep_private

GRAPH = Path(__file__).parents[1] / "dvc.yaml"
# Keys that decide how much memory of a GPU a stage takes; of the others it is evaluate.batch_size.
MEMORY = {
    "pretrain": "train.micro_batch (the result stays the same) or train.batch_size",
    "few_shot": "evaluate.batch_size, or evaluate.few_shot.fine_tune.batch_size",
    "back_translate": "back_translation.batch_size",
}

# The libraries make a million objects that stay; with Python's threshold of 700 a fifth of their import is collection.
gc.set_threshold(10_000)


def run(stage: str, main: Callable[..., Any], usage: str = "") -> None:
    """Call ``main`` with the command's arguments. Wrong ones, and whatever ``last_words`` knows, end with one line."""
    words = sys.argv[1:] = arguments(sys.argv[1:])
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        sys.exit(f"usage: python -m stages.{stage} {usage}".rstrip())
    try:
        keep_private()
        main(*words)
    except Exception as error:
        if (said := last_words(error, MEMORY.get(stage, "evaluate.batch_size"))) is None:
            raise
        name = f"{stage} {'/'.join(words)}".rstrip()
        sys.exit(f"{name}: {said}" if said else 1)  # of several processes one says why


def code_of(stage: str) -> list[Path]:
    """What a stage of dvc.yaml depends on beside data: its script and the rooms that compute it."""
    graph = yaml.safe_load(GRAPH.read_text(encoding="utf-8"))
    return [Path(path) for path in graph["stages"][stage]["deps"] if not path.startswith("data/")]
