"""Differences between models on the same test set, with paired bootstrap intervals and p values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def paired(
    a: Mapping[str, Any], a_samples: np.ndarray, b: Mapping[str, Any], b_samples: np.ndarray, confidence: float
) -> dict[str, float]:
    """How much higher a metric is for model a than for model b, judged on the same resamples of patients.

    Because both models see the same draw of patients in row b of the samples, what makes a draw easy or hard for both
    cancels, and the interval of the difference is narrower than the two models' own suggest.

    Args:
        a: M of one model, {"value", "n", ...}; ``b``: M of the other, same metric and test set.
        a_samples: float64 [B], values over the resamples of ``metrics.resamples``; ``b_samples``: likewise.
        confidence: of the interval.

    Returns:
        "difference" a - b, "low" and "high" of its percentile interval, and "p", the two-sided bootstrap p value: twice
        the smaller share of resamples on either side of 0, those at 0 counted on both, with one added to numerator and
        denominator so that it is never 0 (Davison and Hinkley 1997, section 4.2). Identical models have p = 1.
        Resamples in which either model has no value are left out.

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
    tail = (1 - confidence) / 2 * 100
    low, high = np.percentile(differences, [tail, 100 - tail])
    side = min(np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0))
    return {
        "difference": float(a["value"] - b["value"]),
        "low": float(low),
        "high": float(high),
        "p": min(1.0, 2 * (side + 1) / (len(differences) + 1)),
    }
