"""Zero-shot protocols: which prompts an evaluation needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.params import BINARY_DATASETS, ParamsError
from pipeline.prompts import zero_shot_grid, zero_shot_pairs

FILES = {"paper": Path(__file__).with_name("zero_shot.yaml")}


@dataclass(frozen=True)
class TestSet:
    """Whose test images are scored, and by which metric."""

    dataset: str
    metric: str


@dataclass(frozen=True)
class Task:
    """A test set with its prompts written out: class -> prompts."""

    rule: TestSet
    positive: dict[str, list[str]]
    negative: dict[str, list[str]]


@dataclass(frozen=True)
class Protocol:
    """Tasks in order."""

    name: str
    tasks: dict[str, Task]


def load(name: str) -> Protocol:
    """One protocol.

    Raises:
        ParamsError: there is no such protocol.
    """
    if name not in FILES:
        raise ParamsError(f"evaluate.protocols: {name!r} is none of {', '.join(FILES)}")
    tasks = {}
    for dataset in BINARY_DATASETS:
        pairs = zero_shot_pairs(FILES[name], dataset)
        sides = [{cls: [pair[side]] for cls, pair in pairs.items()} for side in (0, 1)]
        tasks[dataset] = Task(TestSet(dataset, "auc"), sides[0], sides[1])
    tasks["chexpert5x200"] = Task(TestSet("chexpert", "accuracy"), zero_shot_grid(FILES[name]), {})
    return Protocol(name, tasks)


def prompt_texts(names: Sequence[str]) -> list[str]:
    """All distinct prompts of these protocols, in order of first appearance; what every model embeds."""
    tasks = [task for name in names for task in load(name).tasks.values()]
    sides = [side for task in tasks for side in (task.positive, task.negative)]
    return list(dict.fromkeys(text for side in sides for texts in side.values() for text in texts))
