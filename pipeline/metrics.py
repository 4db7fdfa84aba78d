"""AUC, recall and accuracy with 95 % bootstrap intervals, vectorised over resamples."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.params import Bootstrap


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for many weightings of one sample at once; ties count one half.

    Args:
        labels: bool [N].
        scores: float [N], larger = more likely positive.
        weights: non-negative [B, N]; a resample with replacement is the row of its counts.

    Returns:
        float64 [B], NaN where a row gives all its weight to one class.

    Raises:
        ValueError: a score is not finite.
    """
    if not np.isfinite(scores).all():
        raise ValueError("AUC: a score is not finite; the embeddings of this run are broken")
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])  # one group a distinct score
    positive = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1, dtype=np.float64)
    negative = np.add.reduceat(weights[:, order] * ~labels[order], starts, axis=1, dtype=np.float64)
    below = np.cumsum(negative, axis=1) - negative
    area = (positive * (below + negative / 2)).sum(axis=1)
    mass = positive.sum(axis=1) * negative.sum(axis=1)
    return np.divide(area, mass, out=np.full(len(area), np.nan), where=mass > 0)


def resamples(groups: list[str], options: Bootstrap, seed: int) -> np.ndarray:
    """Counts of ``options.samples`` bootstrap resamples over patients, uint16 [samples, N].

    All items of a drawn patient come along, so that images of one patient never count as independent.

    Args:
        groups: the patient of each of N items.
    """
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count = int(member.max()) + 1
    rng = np.random.default_rng([seed, len(groups)])
    draws = rng.multinomial(count, np.full(count, 1 / count), size=options.samples)
    return draws[:, member].astype(np.uint16)


def interval(value: float, samples: np.ndarray, options: Bootstrap, n: int) -> dict[str, Any]:
    """A metric with its percentile interval: {"value", "low", "high", "n"}; NaN resamples are left out."""
    tail = (1 - options.confidence) / 2 * 100
    low, high = np.nanpercentile(samples, [tail, 100 - tail])
    return {"value": float(value), "low": float(low), "high": float(high), "n": n}


def auc_with_interval(
    labels: np.ndarray, scores: np.ndarray, weights: np.ndarray, options: Bootstrap
) -> tuple[dict[str, Any], np.ndarray] | None:
    """One class's AUC and its values over the resamples, or None where a class has no positive or no negative."""
    if labels.all() or not labels.any():
        return None
    value = weighted_auc(labels, scores, np.ones((1, len(labels))))[0]
    samples = weighted_auc(labels, scores, weights)
    return interval(value, samples, options, len(labels)), samples


def mean_with_interval(hits: np.ndarray, weights: np.ndarray, options: Bootstrap) -> tuple[dict[str, Any], np.ndarray]:
    """The share of hits (accuracy, recall), bool [N], and its values over the resamples."""
    samples = weights @ hits.astype(np.float64) / weights.sum(axis=1)
    return interval(float(hits.mean()), samples, options, len(hits)), samples


def roc_points(labels: np.ndarray, scores: np.ndarray, most: int = 60) -> dict[str, list[float]]:
    """The ROC curve thinned to at most ``most`` points, for drawing: {"fpr": [...], "tpr": [...]}."""
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.r_[scores[order][1:] != scores[order][:-1], True])
    tpr = np.r_[0, np.cumsum(labels[order])[last] / labels.sum()]
    fpr = np.r_[0, np.cumsum(~labels[order])[last] / (~labels).sum()]
    keep = np.unique(np.linspace(0, len(tpr) - 1, min(most, len(tpr))).round().astype(int))
    return {"fpr": [round(float(x), 4) for x in fpr[keep]], "tpr": [round(float(x), 4) for x in tpr[keep]]}


def classes_with_intervals(
    labels: dict[str, np.ndarray], scores: dict[str, np.ndarray], weights: np.ndarray, options: Bootstrap
) -> tuple[dict[str, Any] | None, np.ndarray | None, dict[str, Any], list[str]]:
    """Macro mean AUC over classes, its values over the resamples, each class's own, and a note for each that has none.

    The macro mean is over the classes with both positives and negatives in the test set; its interval resamples all
    classes together.
    """
    per_class, all_samples, notes = {}, [], []
    for cls, truth in labels.items():
        result = auc_with_interval(truth, scores[cls], weights, options)
        if result is None:
            notes.append(f"{cls}: no AUC, {int(truth.sum())} of {len(truth)} test images are positive")
            continue
        per_class[cls], samples = result
        per_class[cls]["positives"] = int(truth.sum())
        all_samples.append(samples)
    if not per_class:
        return None, None, per_class, notes
    value = float(np.mean([m["value"] for m in per_class.values()]))
    macro_samples = np.nanmean(all_samples, axis=0)
    return interval(value, macro_samples, options, weights.shape[1]), macro_samples, per_class, notes
