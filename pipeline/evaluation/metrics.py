"""AUC, recall and accuracy with bootstrap intervals over patients, and points of the usual curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from pipeline.config.params import Bootstrap
from pipeline.evaluation.measure import Measure

BLOCK = 64  # resamples at a time: the running sums of a class then stay in the cache


def aucs(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Areas under the ROC curves of several classes under many weightings of one sample; ties count one half.

    An area is the share of pairs of a positive and a negative in which the positive scores higher. A class is sorted
    once; in a resample, the negatives below a positive are then a running sum of the negatives' weights, looked up at
    the positive's place. Whole weights are summed exactly.

    Args:
        labels: bool [C, N].
        scores: float [C, N], larger = more likely positive.
        weights: non-negative [B, N]; a resample with replacement is the row of its counts.

    Returns:
        float64 [C, B], NaN where a row gives all its weight to one side of a class.

    Raises:
        ValueError: a score is not finite, or shapes do not fit.
    """
    if labels.shape != scores.shape or labels.shape[1] != weights.shape[1]:
        raise ValueError(f"AUC: labels {labels.shape}, scores {scores.shape} and weights {weights.shape} do not fit")
    if not np.isfinite(scores).all():
        raise ValueError("AUC: a score is not finite; the embeddings of this run are broken")
    places = []
    for truth, score in zip(labels, scores, strict=True):
        positive, negative = np.flatnonzero(truth), np.flatnonzero(~truth)
        negative = negative[np.argsort(score[negative], kind="stable")]
        ordered = score[negative]
        below, up_to = (np.searchsorted(ordered, score[positive], side) for side in ("left", "right"))
        places.append((positive, negative, below, up_to))
    out = np.empty((len(labels), len(weights)))
    for start in range(0, len(weights), BLOCK):
        part = slice(start, start + BLOCK)
        by_item = np.ascontiguousarray(weights[part].T).astype(_exact(weights[part]))
        for c, (positive, negative, below, up_to) in enumerate(places):
            running = np.zeros((len(negative) + 1, by_item.shape[1]), by_item.dtype)
            np.cumsum(by_item[negative], axis=0, out=running[1:])
            drawn = by_item[positive]
            twice = np.einsum("pb,pb->b", drawn, running[below] + running[up_to], dtype=np.float64)
            mass = drawn.sum(axis=0, dtype=np.float64) * running[-1]
            out[c, part] = np.divide(twice / 2, mass, out=np.full(len(mass), np.nan), where=mass > 0)
    return out


def _exact(weights: np.ndarray) -> type[np.floating]:
    """float32 where it holds every sum of these weights, and twice it, as a whole number; else float64."""
    small = np.issubdtype(weights.dtype, np.integer) and weights.sum(axis=1, dtype=np.int64).max(initial=0) < 2**23
    return np.float32 if small else np.float64


def resamples(groups: Sequence[str], options: Bootstrap, seed: int) -> np.ndarray:
    """How often each item comes in ``options.samples`` bootstrap resamples over patients, uint16 [samples, N].

    As many patients are drawn as there are, with replacement, and all items of a drawn patient come along: images of
    one patient never count as independent. The draws follow from the test set and the seed alone, so that row b is the
    same resample for every model, and differences of models can be resampled in pairs.

    Args:
        groups: the patient of each of N items. Where an archive does not say which images are one patient's, its reader
            gives every study a patient of its own.

    Raises:
        ValueError: there is no item.
    """
    if not len(groups):
        raise ValueError("bootstrap: no test item to draw from")
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    count = int(member.max()) + 1
    rng = np.random.default_rng([seed, crc32("\0".join(groups).encode())])  # two test sets of a size differ
    out = np.empty((options.samples, len(groups)), dtype=np.uint16)
    for row in out:
        row[:] = np.bincount(rng.integers(count, size=count), minlength=count)[member]
    return out


def interval(
    value: float, samples: np.ndarray, options: Bootstrap, n: int | None, positives: int | None = None
) -> Measure:
    """A metric with the percentile interval of its samples, float64 [B]; NaN resamples are left out of it.

    Raises:
        ValueError: every resample is NaN.
    """
    if np.isnan(samples).all():
        raise ValueError(f"bootstrap: none of {len(samples)} resamples has a value; raise evaluate.bootstrap.samples")
    low, high = percentiles(samples, options.confidence)
    return Measure(float(value), low, high, n, positives, samples=samples)


def percentiles(samples: np.ndarray, confidence: float) -> tuple[float, float]:
    """Both ends of the percentile interval of samples [B]; NaN resamples, of which there must be another, are left out.

    Args:
        confidence: share of the samples between the ends, the rest half below and half above.
    """
    tail = (1 - confidence) / 2 * 100
    low, high = np.nanpercentile(samples, [tail, 100 - tail])
    return float(low), float(high)


def mean_with_interval(hits: np.ndarray, weights: np.ndarray, options: Bootstrap) -> Measure:
    """The share of hits (accuracy, recall), bool [N] with N >= 1, or the mean of float [N].

    A resample that draws none of the items (possible on a part of the test set only) is NaN.

    Raises:
        ValueError: there is no item, or every resample is NaN.
    """
    if not len(hits):
        raise ValueError("mean: no test item to take it over")
    total = weights.sum(axis=1, dtype=np.float64)
    samples = np.divide(weights @ hits.astype(np.float64), total, out=np.full(len(total), np.nan), where=total > 0)
    return interval(float(hits.mean()), samples, options, len(hits))


def classes_with_intervals(
    labels: Mapping[str, np.ndarray], scores: Mapping[str, np.ndarray], weights: np.ndarray, options: Bootstrap
) -> tuple[Measure | None, dict[str, Measure], list[str]]:
    """Macro mean AUC over classes, each class's own, and a note for every class that has none.

    The macro mean is over the classes with both positives and negatives in the test set; its interval resamples all
    classes together. A resample in which such a class has lost one side is the mean of the others there. An image whose
    label is neither is left out of the class's AUC, and counted in a note.

    Args:
        labels: class -> [N], 1 positive, 0 negative, -1 neither.
        scores: class -> float [N], larger = more likely positive.
        weights: [B, N] of ``resamples``; for a part of the test set, its columns.

    Returns:
        The macro mean (None where no class has an AUC), each class's measure, and notes.

    Raises:
        ValueError: a score is not finite; the class is named.
    """
    notes, found = [], []
    for cls, truth in labels.items():
        if not np.isfinite(scores[cls]).all():
            raise ValueError(f"{cls}: a score is not finite; the embeddings of this run are broken")
        positive, known = int((truth == 1).sum()), int((truth >= 0).sum())
        if known < len(truth):
            notes.append(f"{cls}: {len(truth) - known} test images, uncertain or without this label, are left out")
        if positive in (0, known):
            notes.append(f"{cls}: no AUC, {positive} of {known} test images are positive")
        else:
            found.append(cls)
    if not found:
        return None, {}, notes
    truths, values = np.stack([labels[c] for c in found]), np.stack([scores[c] for c in found])
    there = truths >= 0
    # Classes of which all is known at once: their scores are sorted, resampled and counted in one go.
    parts = [slice(None)] if there.all() else [slice(i, i + 1) for i in range(len(found))]
    looks = [(truths[p][:, k] == 1, values[p][:, k], weights[:, k]) for p in parts if (k := there[p].all(axis=0)).any()]
    whole = np.concatenate([aucs(t, v, np.ones((1, t.shape[1]), dtype=np.uint16))[:, 0] for t, v, _ in looks])
    samples = np.concatenate([aucs(t, v, w) for t, v, w in looks])
    kept, classes = [], {}
    for i, cls in enumerate(found):
        if np.isnan(samples[i]).all():
            notes.append(f"{cls}: no AUC, no resample of the test images has both positives and negatives")
            continue
        kept.append(i)
        classes[cls] = interval(float(whole[i]), samples[i], options, int(there[i].sum()), int((truths[i] == 1).sum()))
    if not kept:
        return None, {}, notes
    known = ~np.isnan(samples[kept])
    total = np.where(known, samples[kept], 0).sum(axis=0)
    macro = np.divide(total, known.sum(axis=0), out=np.full(len(total), np.nan), where=known.any(axis=0))
    return interval(float(whole[kept].mean()), macro, options, int(there[kept].any(axis=0).sum())), classes, notes


def roc_points(labels: np.ndarray, scores: np.ndarray, most: int = 60) -> dict[str, list[float]]:
    """The ROC curve thinned to at most ``most`` points, for drawing: {"fpr": [...], "tpr": [...]}."""
    hits, misses = _counts_from_above(labels, scores)
    tpr, fpr = np.r_[0, hits / hits[-1]], np.r_[0, misses / misses[-1]]
    keep = _spread(len(tpr), most)
    return {"fpr": _rounded(fpr[keep]), "tpr": _rounded(tpr[keep])}


def precision_recall_points(labels: np.ndarray, scores: np.ndarray, most: int = 60) -> dict[str, list[float]]:
    """Precision at rising recall, at most ``most`` points: {"recall": [...], "precision": [...]}.

    The points are thresholds that gain a positive, spread evenly over them, the first and the last among them; no point
    is interpolated.

    Args:
        labels: bool [N], at least one True.
        scores: float [N], larger = more likely positive.
    """
    hits, misses = _counts_from_above(labels, scores)
    gains = np.flatnonzero(np.diff(hits, prepend=0))
    gains = gains[_spread(len(gains), most)]
    return {
        "recall": _rounded(hits[gains] / hits[-1]),
        "precision": _rounded(hits[gains] / (hits[gains] + misses[gains])),
    }


def calibration(labels: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> dict[str, Any]:
    """How often a predicted probability comes true, in ``bins`` equal bins of it; empty bins are left out.

    Bin k holds probabilities above k / bins up to (k + 1) / bins, the first also 0, as scikit-learn's. "ece" is the
    expected calibration error, the mean over items of |observed - predicted| of their bin (Guo et al. 2017).

    Args:
        labels: bool [N], N >= 1.
        probabilities: float [N] in 0..1.

    Returns:
        {"predicted": mean probability of each bin, "observed": share of positives, "count": items, "ece"}.

    Raises:
        ValueError: a probability is outside 0..1.
    """
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("calibration: a probability is outside 0..1")
    place = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probabilities)
    count = np.bincount(place, minlength=bins)
    filled = np.flatnonzero(count)
    count = count[filled]
    predicted = np.bincount(place, probabilities, bins)[filled] / count
    observed = np.bincount(place, labels, bins)[filled] / count
    return {
        "predicted": _rounded(predicted),
        "observed": _rounded(observed),
        "count": count.tolist(),
        "ece": round(float((count * np.abs(observed - predicted)).sum() / count.sum()), 6),
    }


def _counts_from_above(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positives and negatives at or above each distinct score, from the highest down; both int64 [K]."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.flatnonzero(np.r_[ordered[1:] != ordered[:-1], True])
    return np.cumsum(labels[order])[last], np.cumsum(~labels[order])[last]


def _spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``count`` places, evenly spread, both ends among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int))


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in values]
