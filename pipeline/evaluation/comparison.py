"""What a figure means of several trainings, and differences between models on the same test set, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MetricKey
from pipeline.evaluation.metrics import percentiles


def over_trainings(
    values: Sequence[float], samples: np.ndarray | None, confidence: float
) -> tuple[float, float, float]:
    """The mean of a metric over trainings that differ in their seed, and its interval for other seeds *and* patients.

    The mean is uncertain because few trainings were made and because few patients were tested. Each has its own
    interval, Student's over the trainings and the percentile interval over the resamples, and as the two causes are
    independent their half widths add up as squares, on each side (Zou and Donner 2008, "recovery of variance
    estimates"). Where the trainings agree, what is left is the interval of one training.

    Args:
        values: [S] of S >= 2 trainings; a difference between two models is one, too.
        samples: float64 [B], the mean over the trainings in each resample; None where none were kept: then the interval
            is for other seeds on the same patients.
        confidence: of the interval.

    Returns:
        Mean, and both ends.
    """
    mean = float(np.mean(values))
    seeds = float(student.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1)) / len(values) ** 0.5
    if samples is None or np.isnan(samples).all():
        return mean, mean - seeds, mean + seeds
    low, high = percentiles(samples, confidence)
    return mean, mean - float(np.hypot(seeds, mean - low)), mean + float(np.hypot(seeds, high - mean))


def mean_of_trainings(
    key: MetricKey,
    values: Mapping[str, float],
    samples: np.ndarray | None,
    confidence: float,
    n: int | None = None,
    removed: int | None = None,
) -> Measure:
    """A metric over trainings, with the interval of ``over_trainings`` as far as the metric's bounds.

    Args:
        values: of two trainings or more, by seed.
        samples, confidence: see ``over_trainings``; n, removed: see ``Measure``.
    """
    mean, low, high = over_trainings(list(values.values()), samples, confidence)
    least, most = key.bounds
    return Measure(mean, max(low, least), min(high, most), n, trainings=values, removed=removed, samples=samples)


def shared_samples(measures: Sequence[Measure]) -> list[np.ndarray] | None:
    """The samples of each, [B] of one B; None where one has none or the numbers differ."""
    found = [m.samples for m in measures if m.samples is not None]
    return found if len(found) == len(measures) and len({len(s) for s in found}) == 1 else None


@dataclass(frozen=True)
class Difference:
    """How much higher a metric is for one model than for another. The interval is None where the two cannot be paired,
    and ``why`` says so; ``p`` is the two-sided bootstrap p value, of models that were trained once."""

    value: float
    low: float | None = None
    high: float | None = None
    p: float | None = None
    why: str = ""

    @property
    def sign(self) -> int:
        """1 higher, -1 lower, 0 where the interval holds zero or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def paired(a: Measure, b: Measure, confidence: float) -> Difference:
    """How much higher a metric is for model a than for model b, judged on the same resamples of patients, and on all
    trainings where one of them was trained several times.

    Because both models see the same draw of patients in row b of the samples, what makes a draw easy or hard for both
    cancels, and the interval of the difference is narrower than the two models' own suggest.

    Args:
        a: measured of one model, with its samples; ``b``: of the other, same metric and test set. Where both have
            several ``trainings``, these are paired by their seeds.
        confidence: of the interval.

    Returns:
        a - b, the ends of its percentile interval, and p: twice the smaller share of resamples on either side of 0,
        those at 0 counted on both, with one added to numerator and denominator so that it is never 0 (Davison and
        Hinkley 1997, section 4.2). Identical models have p = 1. Resamples in which either model has no value are left
        out. With several trainings the interval is that of ``over_trainings``, and there is no p.

    Raises:
        ValueError: the test sets, the resamples or the seeds differ, or no resample has a value for both.
    """
    if a.n != b.n:
        raise ValueError(f"comparison: {a.n} test items against {b.n}; evaluate both models on the same test set")
    if a.samples is None or b.samples is None:
        raise ValueError("comparison: a model has no values over the resamples; run its evaluation again")
    if a.samples.shape != b.samples.shape:
        raise ValueError(
            f"comparison: {a.samples.shape[0]} resamples against {b.samples.shape[0]}; run both evaluations again"
        )
    differences = a.samples - b.samples
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        raise ValueError("comparison: no resample has a value for both models; raise evaluate.bootstrap.samples")
    difference = a.value - b.value
    if a.trainings or b.trainings:
        if a.trainings and b.trainings and a.trainings.keys() != b.trainings.keys():
            seeds = " against ".join(", ".join(m.trainings) for m in (a, b))
            raise ValueError(f"comparison: trainings with seeds {seeds}; use the same seeds")
        by_seed = [
            a.trainings.get(seed, a.value) - b.trainings.get(seed, b.value) for seed in a.trainings or b.trainings
        ]
        _, low, high = over_trainings(by_seed, differences, confidence)
        return Difference(difference, low, high)
    low, high = percentiles(differences, confidence)
    side = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return Difference(difference, low, high, min(1.0, 2 * (side + 1) / (len(differences) + 1)))
