"""What a metric is: its test set, task and quantity, the one name it has everywhere, and how it is bounded and printed.

The name is the key in result files, in the .npz beside them, in MLflow and in reports/metrics.json, and ``read_key``
gives the record back. Nothing else reads names.

    <test set>_zs_<quantity>                          zero-shot: auc, accuracy
    <test set>_p<percent>_<quantity>                  linear probe on a share of the training set; _ft<percent>_ tuned
    <test set>_r<K>, <test set>_t2i_r<K>              recall, image to text and back; .._over_chance: against chance
    <test set>_<quantity><percent>_<way>[_scale<n>]   regeneration of so many hidden cells: psnr, ssim
    <test set>_<quantity>                             a task with a quantity of its own
    macro_..; rsum, t2i_rsum                          the mean over several test sets; the sum of all recalls

before which ``<protocol>/`` names another protocol than the first, and after which ``_clean`` says that it is taken on
the test images alone that training has not shown. A test set is letters, digits and _; one with which a name would be
read otherwise (``x_t2i`` in retrieval, ``macro``) is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

Direction = Literal["", "i2t", "t2i"]
TASKS = ("zero_shot", "linear_probe", "fine_tune", "retrieval", "regeneration")  # whose names have a form
SHARES = {"linear_probe": "p", "fine_tune": "ft"}  # what is before the percent in names
WITH_TEXT = ("matching", "none", "shuffled")  # the model's ways to regenerate: with the image's report, none, another's
BASELINES = ("mean", "inpainted")  # ways without a model
WAYS = (*WITH_TEXT, *BASELINES, "gain_none", "gain_shuffled")  # a gain is what the matching report adds
MEAN = "macro"  # replaces the test set in the name of a mean over several
HEADLINE_PERCENTS = (10, 100)
HEADLINE_K = 10


@dataclass(frozen=True)
class Quantity:
    """What is measured, whatever on.

    ``tasks``: which measure it; ``label``: for people; ``unit``: a share of 1 is printed in percent, decibels as they
    are; ``signed``: it may be below 0.
    """

    tasks: tuple[str, ...]
    label: str
    unit: Literal["share", "decibel"] = "share"
    signed: bool = False


QUANTITIES = {
    "auc": Quantity(("zero_shot", "linear_probe", "fine_tune"), "AUC"),
    "accuracy": Quantity(("zero_shot",), "accuracy"),
    "recall": Quantity(("retrieval",), "R@K"),
    "psnr": Quantity(("regeneration",), "PSNR", "decibel", signed=True),
    "ssim": Quantity(("regeneration",), "SSIM", signed=True),
}


@dataclass(frozen=True)
class MetricKey:
    """One metric's identity; two metrics that differ in anything have two names.

    Raises:
        ValueError: its task does not measure the quantity, or its name would be read as another metric's.
    """

    test_set: str  # "" for one over several
    task: str
    quantity: str
    protocol: str = ""  # where it is not the first
    over: Literal["", "mean", "sum"] = ""  # of several test sets
    direction: Direction = ""  # of retrieval
    k: int | None = None  # of R@K; a sum is over all K
    over_chance: bool = False  # as a multiple of what chance gives
    percent: int | None = None  # of the training set, or of hidden cells
    way: str = ""  # of WAYS
    scale: int = 0  # of regeneration, 0 the finest
    clean: bool = False  # on test images alone that training has not shown

    def __post_init__(self) -> None:
        if self.quantity not in QUANTITIES or self.task not in QUANTITIES[self.quantity].tasks:
            raise ValueError(f"metric: {self.task} does not measure {self.quantity!r}; add it to QUANTITIES")
        if _fields_of(self.name) != _given(self):
            raise ValueError(f"metric {self.name!r}: would be read as another; rename the test set {self.test_set!r}")

    @property
    def name(self) -> str:
        """The metric's name everywhere."""
        test_set = MEAN if self.over == "mean" else self.test_set
        if self.task == "retrieval":
            way = "t2i_" if self.direction == "t2i" else ""
            what = f"{way}rsum" if self.over == "sum" else f"{test_set}_{way}r{self.k}"
            what += "_over_chance" if self.over_chance else ""
        elif self.task == "zero_shot":
            what = f"{test_set}_zs_{self.quantity}"
        elif self.task in SHARES:
            what = f"{test_set}_{SHARES[self.task]}{self.percent}_{self.quantity}"
        elif self.task == "regeneration":
            percent = "" if self.percent is None else self.percent
            what = f"{test_set}_{self.quantity}{percent}_{self.way}" + (f"_scale{self.scale}" if self.scale else "")
        else:
            what = f"{test_set}_{self.quantity}"
        return (f"{self.protocol}/" if self.protocol else "") + what + ("_clean" if self.clean else "")

    @property
    def where(self) -> str:
        """The test set with its protocol, as result files name what they hold of it."""
        return f"{self.protocol}/{self.test_set}" if self.protocol else self.test_set

    @property
    def unit(self) -> Literal["share", "decibel", "sum", "ratio"]:
        """A share of 1, decibels, a sum of shares, or a ratio to chance."""
        if self.over_chance:
            return "ratio"
        return "sum" if self.over == "sum" else QUANTITIES[self.quantity].unit

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value it may have."""
        least = -math.inf if QUANTITIES[self.quantity].signed else 0.0
        return least, 1.0 if self.unit == "share" else math.inf

    @property
    def factor(self) -> float:
        """What turns its value into printed units: 100 for shares and their sums."""
        return 100.0 if self.unit in ("share", "sum") else 1.0

    def decimals(self, usual: int) -> int:
        """How many are printed; ``usual``: the table's, of all but decibels."""
        return 2 if self.unit == "decibel" else usual

    @property
    def headline(self) -> bool:
        """Whether experiments compare it: the first protocol's, on all test images, at the usual shares and K."""
        if self.protocol or self.clean or self.over_chance or self.task == "regeneration":
            return False
        if self.task == "retrieval":
            return self.direction == "i2t" and self.k in (None, HEADLINE_K)
        return self.task not in SHARES or self.percent in HEADLINE_PERCENTS

    @property
    def label(self) -> str:
        """Its name for people, without the test set: ``AUC``, ``linear 10 %``, ``R@10``."""
        label = QUANTITIES[self.quantity].label
        if self.task == "retrieval":
            label = "RSUM" if self.over == "sum" else f"R@{self.k}"
            label += " text to image" if self.direction == "t2i" else ""
            label += " over chance" if self.over_chance else ""
        elif self.task in SHARES:
            label = f"{'linear' if self.task == 'linear_probe' else 'tuned'} {self.percent} %"
        elif self.task == "regeneration":
            label += f" {self.percent} % {self.way.replace('_', ' ')}" + (f" scale {self.scale}" if self.scale else "")
        return label + (" on clean images" if self.clean else "")

    def record(self) -> dict[str, Any]:
        """Its fields for a result file: test set, task, quantity, and what is not as usual."""
        return _given(self)


def read_key(name: str) -> MetricKey:
    """The metric of a name.

    Raises:
        ValueError: no metric has it.
    """
    found = _fields_of(name)
    key = MetricKey(**found) if found else None
    if key is None or key.name != name:
        raise ValueError(f"{name!r} is no metric's name; pipeline/evaluation/metric_key.py says how they are made")
    return key


def key_from_record(raw: Mapping[str, Any]) -> MetricKey:
    """The metric of a ``record``, whatever else the record holds fields.

    Raises:
        ValueError, TypeError: the fields are no metric's.
    """
    return MetricKey(**{field.name: raw[field.name] for field in fields(MetricKey) if field.name in raw})


def share_key(test_set: str, share: str) -> MetricKey:
    """The AUC of a linear probe or of fine-tuning, on a share as ``evaluate.few_shot`` names it: ``p10``, ``ft10``.

    Raises:
        ValueError: a share that is named otherwise, from which no name of a metric can be made.
    """
    for task, letters in SHARES.items():
        percent = share.removeprefix(letters)
        if (
            share == f"{letters}{percent}"
            and percent.isascii()
            and percent.isdecimal()
            and str(int(percent)) == percent
        ):
            return MetricKey(test_set, task, "auc", percent=int(percent))
    raise ValueError(
        f"evaluate.few_shot: a share is named p and its percent, for fine-tuning ft and its percent, not {share!r}"
    )


def of_clean(key: MetricKey) -> MetricKey:
    """The same metric on clean test images alone."""
    return replace(key, clean=True)


def _given(key: MetricKey) -> dict[str, Any]:
    """The fields that are not as usual."""
    return {f.name: getattr(key, f.name) for f in fields(key) if getattr(key, f.name) != f.default}


def _fields_of(name: str) -> dict[str, Any]:
    """The fields in a name that are not as usual; {} where it is no metric's."""
    protocol, _, bare = name.rpartition("/")
    what = bare.removesuffix("_clean")
    found = _measured(what)
    if found is None:
        return {}
    if found.get("test_set") == MEAN:
        found |= {"test_set": "", "over": "mean"}
    if protocol:
        found["protocol"] = protocol
    if what != bare:
        found["clean"] = True
    return found


def _measured(what: str) -> dict[str, Any] | None:
    """The fields in a name without protocol and ``_clean``."""

    def quantities(*tasks: str) -> str:
        return "|".join(q for q, known in QUANTITIES.items() if set(tasks) & set(known.tasks))

    def match(pattern: str) -> re.Match[str] | None:
        return re.fullmatch(pattern, what, re.ASCII)

    if m := match(r"(t2i_)?rsum"):
        direction = "t2i" if m[1] else "i2t"
        return {"test_set": "", "task": "retrieval", "quantity": "recall", "over": "sum", "direction": direction}
    if m := match(rf"(\w+)_zs_({quantities('zero_shot')})"):
        return {"test_set": m[1], "task": "zero_shot", "quantity": m[2]}
    if m := match(rf"(\w+)_(p|ft)(\d+)_({quantities(*SHARES)})"):
        task = next(task for task, letters in SHARES.items() if letters == m[2])
        return {"test_set": m[1], "task": task, "quantity": m[4], "percent": int(m[3])}
    if m := match(r"(\w+?)_(t2i_)?r(\d+)(_over_chance)?"):
        direction = "t2i" if m[2] else "i2t"
        recall = {"test_set": m[1], "task": "retrieval", "quantity": "recall", "direction": direction, "k": int(m[3])}
        return recall | ({"over_chance": True} if m[4] else {})
    if m := match(rf"(\w+)_({quantities('regeneration')})(\d*)_({'|'.join(WAYS)})(?:_scale(\d+))?"):
        regenerated: dict[str, Any] = {"test_set": m[1], "task": "regeneration", "quantity": m[2], "way": m[4]}
        regenerated |= {"percent": int(m[3])} if m[3] else {}
        return regenerated | ({"scale": int(m[5])} if m[5] else {})
    for quantity, known in QUANTITIES.items():
        for task in (t for t in known.tasks if t not in TASKS):
            if m := match(rf"(\w+)_{quantity}"):
                return {"test_set": m[1], "task": task, "quantity": quantity}
    return None


MACRO_AUC = MetricKey("", "zero_shot", "auc", over="mean")  # over the data sets whose classes are each present or not
RSUM: dict[Direction, MetricKey] = {
    "i2t": MetricKey("", "retrieval", "recall", over="sum", direction="i2t"),
    "t2i": MetricKey("", "retrieval", "recall", over="sum", direction="t2i"),
}
