"""A measured value: a metric's value with its interval, the size of its test set, and its values over the resamples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Measure:
    """A metric as a fraction (PSNR: dB; a sum: of fractions).

    ``low``, ``high``: its interval; None where it has none. ``n``: test items; None for one over several test sets.
    ``positives``: of a class, how many of them are positive. ``seeds``: its value by draw of few-shot's subset;
    ``trainings``: by training, where it is a mean over several. ``removed``: how many test images are not clean; None
    where nobody looked. ``samples``: its values over the resamples, float64 [B], in the order of the draws, which two
    models share; of a mean over trainings the mean.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    positives: int | None = None
    seeds: Mapping[str, float] = field(default_factory=dict)
    trainings: Mapping[str, float] = field(default_factory=dict)
    removed: int | None = None
    samples: np.ndarray | None = field(default=None, compare=False, repr=False)

    def times(self, by: float) -> Measure:
        """In other units: value, interval, values by seed and samples times a factor."""
        low, high = (None if end is None else by * end for end in (self.low, self.high))
        seeds, trainings = ({k: by * v for k, v in part.items()} for part in (self.seeds, self.trainings))
        samples = None if self.samples is None else by * self.samples
        return replace(
            self, value=by * self.value, low=low, high=high, seeds=seeds, trainings=trainings, samples=samples
        )

    def record(self) -> dict[str, Any]:
        """What result files hold of it: "value", "low", "high" and, where they are known, "n", "positives", "seeds"."""
        found: dict[str, Any] = {"value": self.value, "low": self.low, "high": self.high}
        found |= {k: v for k in ("n", "positives") if (v := getattr(self, k)) is not None}
        return found | ({"seeds": dict(self.seeds)} if self.seeds else {})


def measure_from_record(
    raw: Mapping[str, Any],
    bounds: tuple[float, float] = (0.0, 1.0),
    removed: int | None = None,
    samples: np.ndarray | None = None,
) -> Measure:
    """A measure from its ``record``, whatever else the record holds.

    Args:
        bounds: the smallest and largest value it may have.

    Raises:
        ValueError: a value that is no number, or outside its bounds; the line begins with its key.
        KeyError: one is missing.
    """
    least, most = bounds
    seeds = raw.get("seeds", {})
    values = {**{key: raw[key] for key in ("value", "low", "high")}, **{f"seeds.{k}": v for k, v in seeds.items()}}
    for key, value in values.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
            raise ValueError(f"{key} is {value!r}, expected a number from {least:g} to {most:g}")
    return Measure(
        raw["value"], raw["low"], raw["high"], raw.get("n"), raw.get("positives"), seeds, {}, removed, samples
    )
