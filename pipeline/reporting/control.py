"""The control run, trained on shuffled pairs, against chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.params import Params
from pipeline.datasets import display_names, used_for
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MACRO_AUC, MetricKey
from pipeline.reporting.results import RunResult


@dataclass(frozen=True)
class ControlRow:
    """One metric of the control run as a fraction, what chance gives, and the same run's with true pairs.

    ``limits``: within which the control counts as at chance (None = no limit is set for this metric)."""

    name: str
    chance: float
    control: Measure
    full: Measure | None
    limits: tuple[float, float] | None

    @property
    def at_chance(self) -> bool | None:
        """Whether the control stayed within the limits."""
        return None if self.limits is None else self.limits[0] <= self.control.value <= self.limits[1]


def control_rows(params: Params, results: Mapping[str, RunResult]) -> tuple[str, list[ControlRow]]:
    """The control run (shuffled pairs) against chance: R@10 at most twice chance.

    No limit is set for an AUC: that of one shuffled run is the AUC of a random direction (see tests/test_control.py).

    Returns:
        The name of the main run with the same encoder and data sets but true pairs ("" = none), and the rows; no rows
        where there is no control run or nothing of it was computed.
    """
    run = results.get(params.control)
    if run is None:
        return "", []
    own = params.runs[params.control]
    twins = [n for n in params.main if params.runs[n].image_encoder == own.image_encoder and n in results]
    full = next((n for n in twins if set(params.runs[n].datasets) == set(own.datasets)), "")
    names = display_names()
    zero_shot = {d: MetricKey(d, "zero_shot", "auc") for d in used_for("binary_classification")}
    accuracy = MetricKey("chexpert5x200", "zero_shot", "accuracy")  # of five equal classes
    tests: list[tuple[MetricKey, str, float, tuple[float, float] | None]] = [
        (key, f"{names[d]} zero-shot AUC", 0.5, None) for d, key in zero_shot.items()
    ]
    tests.append((MACRO_AUC, "Mean of the three AUCs", 0.5, None))
    tests.append((accuracy, f"{names['chexpert5x200']} accuracy", 0.2, None))
    for dataset, pool in run.pools.items():
        if "r10" in pool["chance"]:
            key = MetricKey(dataset, "retrieval", "recall", direction="i2t", k=10)
            chance = pool["chance"]["r10"]
            tests.append((key, f"{names.get(dataset, dataset)} R@10", chance, (0.0, 2 * chance)))
    other = results[full].measures if full else {}
    rows = [ControlRow(n, c, run.measures[k], other.get(k), limits) for k, n, c, limits in tests if k in run.measures]
    return full, rows
