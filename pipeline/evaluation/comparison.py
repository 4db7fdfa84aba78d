"""What a figure means of several trainings, and differences between models on the same test set, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

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


def paired(
    a: Mapping[str, Any], a_samples: np.ndarray, b: Mapping[str, Any], b_samples: np.ndarray, confidence: float
) -> dict[str, float]:
    """How much higher a metric is for model a than for model b, judged on the same resamples of patients, and on all
    trainings where one of them was trained several times.

    Because both models see the same draw of patients in row b of the samples, what makes a draw easy or hard for both
    cancels, and the interval of the difference is narrower than the two models' own suggest.

    Args:
        a: M of one model, {"value", "n", "trained": values of its trainings, where there are several}; ``b``: M of the
            other, same metric and test set. Where both have several, these have the same seeds and are paired by them.
        a_samples: float64 [B], values over the resamples of ``metrics.resamples``, the mean of all trainings;
            ``b_samples``: likewise.
        confidence: of the interval.

    Returns:
        "difference" a - b, "low" and "high" of its percentile interval, and "p", the two-sided bootstrap p value: twice
        the smaller share of resamples on either side of 0, those at 0 counted on both, with one added to numerator and
        denominator so that it is never 0 (Davison and Hinkley 1997, section 4.2). Identical models have p = 1.
        Resamples in which either model has no value are left out. With several trainings the interval is that of
        ``over_trainings``, and there is no "p".

    Raises:
        ValueError: the test sets or the resamples differ, or no resample has a value for both.
    """
    if a["n"] != b["n"]:
        raise ValueError(f"comparison: {a['n']} test items against {b['n']}; evaluate both models on the same test set")
    if a_samples.shape != b_samples.shape:
        raise ValueError(
            f"comparison: {a_samples.shape[0]} resamples against {b_samples.shape[0]}; run both evaluations again"
        )
    differences = a_samples - b_samples
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        raise ValueError("comparison: no resample has a value for both models; raise evaluate.bootstrap.samples")
    difference = float(a["value"] - b["value"])
    trained = [m["trained"] if len(m.get("trained", ())) > 1 else [m["value"]] for m in (a, b)]
    if max(map(len, trained)) > 1:
        if min(map(len, trained)) > 1 and len(trained[0]) != len(trained[1]):
            raise ValueError(f"comparison: {len(trained[0])} trainings against {len(trained[1])}; use the same seeds")
        _, low, high = over_trainings(np.asarray(trained[0]) - np.asarray(trained[1]), differences, confidence)
        return {"difference": difference, "low": low, "high": high}
    low, high = percentiles(differences, confidence)
    side = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return {
        "difference": difference,
        "low": low,
        "high": high,
        "p": min(1.0, 2 * (side + 1) / (len(differences) + 1)),
    }
