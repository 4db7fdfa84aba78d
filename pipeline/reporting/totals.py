"""Metrics made of others: the mean zero-shot AUC, sums of recalls, R@K against chance, and means over trainings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from pipeline.datasets import used_for
from pipeline.evaluation.comparison import mean_of_trainings, shared_samples
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MACRO_AUC, RSUM, Direction, MetricKey, of_clean
from pipeline.evaluation.metrics import percentiles

Measures = Mapping[MetricKey, Measure]


def macro_auc(measures: Measures, confidence: float) -> Measure | None:
    """The mean zero-shot AUC of the first protocol over VinDr-CXR, RSNA and SIIM; None where one is missing.

    Its interval is that of the means of the resamples (each test set is drawn for itself), where these were kept.
    """
    found = [measures.get(MetricKey(d, "zero_shot", "auc")) for d in used_for("binary_classification")]
    parts = [m for m in found if m is not None]
    if len(parts) < len(found):
        return None
    value = math.fsum(m.value for m in parts) / len(parts)
    samples = shared_samples(parts)
    if samples is None:
        return Measure(value)
    mean = np.sum(samples, axis=0) / len(parts)
    return Measure(value, *percentiles(mean, confidence), samples=mean)


def sum_of_recalls(
    measures: Measures, recalls: Sequence[MetricKey], confidence: float, clean: bool = False
) -> Measure | None:
    """The sum of these recalls, all of one direction, or None where one is missing: a shorter sum is another quantity.

    Its interval is evaluation's own where that is the sum of exactly these recalls, else that of the sums of the
    recalls' resamples (each test set is drawn for itself), where these were kept.

    Args:
        clean: on clean test images; a recall that has no value there of its own has the same value.
    """
    found = [(measures.get(of_clean(key)) if clean else None) or measures.get(key) for key in recalls]
    parts = [m for m in found if m is not None]
    if not recalls or len(parts) < len(found):
        return None
    value = math.fsum(m.value for m in parts)
    key = replace(RSUM[recalls[0].direction], clean=clean)
    kept = shared_samples(parts)
    samples = None if kept is None else np.sum(kept, axis=0)
    stored = measures.get(key)
    if stored and math.isclose(stored.value, value, abs_tol=1e-6):
        return replace(stored, value=value, samples=stored.samples if samples is None else samples)
    if seeds := list(parts[0].trainings):
        values = {seed: math.fsum(m.trainings[seed] for m in parts) for seed in seeds}
        return mean_of_trainings(key, values, samples, confidence)
    if samples is None:
        return Measure(value)
    return Measure(value, *percentiles(samples, confidence), samples=samples)


def add_totals(
    measures: dict[MetricKey, Measure],
    recalls: Mapping[Direction, Sequence[MetricKey]],
    chances: Mapping[str, Mapping[str, float]],
    confidence: float,
) -> None:
    """Add to one training's metrics those made of them.

    Args:
        recalls: what RSUM adds up, by direction. Evaluation's own sum of other recalls is another quantity, and goes.
        chances: test set -> "r<K>" -> R@K by chance.
    """
    if (macro := macro_auc(measures, confidence)) is not None:
        measures[MACRO_AUC] = macro
    for direction, keys in recalls.items():
        key = RSUM[direction]
        total = sum_of_recalls(measures, keys, confidence)
        if total is None:
            measures.pop(key, None)
            measures.pop(of_clean(key), None)
        else:
            measures[key] = total
    for test_set, chance in chances.items():
        recall = MetricKey(test_set, "retrieval", "recall", direction="i2t", k=10)
        if recall in measures and chance.get("r10"):
            measures[replace(recall, over_chance=True)] = Measure(measures[recall].value / chance["r10"])


def means_over_trainings(
    trainings: Sequence[Measures], seeds: Sequence[int], confidence: float
) -> dict[MetricKey, Measure]:
    """The means over a run's trainings; a metric that one of them lacks is left out. One training: its own."""
    if len(trainings) == 1:
        return dict(trainings[0])
    merged = {}
    for key, first in trainings[0].items():
        known = [t[key] for t in trainings if key in t]
        if len(known) == len(trainings):
            values = {str(seed): m.value for seed, m in zip(seeds, known, strict=True)}
            kept = shared_samples(known)
            samples = None if kept is None else np.mean(kept, axis=0)
            merged[key] = mean_of_trainings(key, values, samples, confidence, first.n, first.removed)
    return merged
