"""Paired differences against resampling both models together by hand."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.config.params import Bootstrap
from pipeline.evaluation import metrics
from pipeline.evaluation.comparison import Difference, over_trainings, paired
from pipeline.evaluation.measure import Measure


def two_models(rng, patients=60, images=3, better=0.5):
    """Labels, two correlated scores, the second worse by ``better``, and the patient of each image."""
    groups = np.repeat([f"p{i}" for i in range(patients)], images)
    labels = np.repeat(rng.random(patients) < 0.4, images)
    shared = rng.normal(size=len(labels))
    a = shared + rng.normal(size=len(labels)) * 0.5 + labels * (0.7 + better)
    b = shared + rng.normal(size=len(labels)) * 0.5 + labels * 0.7
    return labels, a, b, groups


def measured(labels, scores, groups, options, seed=0):
    weights = metrics.resamples(list(groups), options, seed)
    return metrics.classes_with_intervals({"A": labels}, {"A": scores}, weights, options)[0]


def test_paired_equals_resampling_both_together():
    options = Bootstrap(samples=150)
    labels, a, b, groups = two_models(np.random.default_rng(0))
    found = paired(measured(labels, a, groups, options), measured(labels, b, groups, options), options.confidence)
    weights = metrics.resamples(list(groups), options, 0)
    differences = []
    for row in weights:
        drawn = np.repeat(np.arange(len(labels)), row)
        differences.append(roc_auc_score(labels[drawn], a[drawn]) - roc_auc_score(labels[drawn], b[drawn]))
    assert found.value == pytest.approx(roc_auc_score(labels, a) - roc_auc_score(labels, b), abs=1e-12)
    assert (found.low, found.high) == pytest.approx(np.percentile(differences, [2.5, 97.5]), abs=1e-12)
    below, above = sum(d <= 0 for d in differences), sum(d >= 0 for d in differences)
    assert found.p == pytest.approx(min(1, 2 * (1 + min(below, above)) / 151))
    assert found.p < 0.05
    swapped = paired(measured(labels, b, groups, options), measured(labels, a, groups, options), options.confidence)
    assert swapped.low == pytest.approx(-found.high)
    assert swapped.p == found.p


def test_a_model_does_not_differ_from_itself():
    options = Bootstrap(samples=50)
    labels, a, _, groups = two_models(np.random.default_rng(1))
    one = measured(labels, a, groups, options)
    assert paired(one, one, options.confidence) == Difference(0.0, 0.0, 0.0, 1.0)


def test_models_as_good_as_each_other_rarely_differ():
    """Of 300 pairs as good as each other, 5 % should be judged different; the standard error of that is 1.3 %."""
    options, rng = Bootstrap(samples=200), np.random.default_rng(2)
    covered, small = 0, 0
    for turn in range(300):
        labels, a, b, groups = two_models(rng, patients=80, better=0.0)
        found = paired(measured(labels, a, groups, options, turn), measured(labels, b, groups, options, turn), 0.95)
        covered += found.low <= 0 <= found.high
        small += found.p <= 0.05
    assert 0.91 <= covered / 300 <= 0.985
    assert small / 300 <= 0.09


def test_different_test_sets_do_not_compare():
    m = Measure(0.5, n=10, samples=np.full(4, 0.5))
    with pytest.raises(ValueError, match="10 test items against 9"):
        paired(m, replace(m, n=9), 0.95)
    with pytest.raises(ValueError, match="4 resamples against 3"):
        paired(m, replace(m, samples=m.samples[:3]), 0.95)
    with pytest.raises(ValueError, match="no values over the resamples"):
        paired(m, replace(m, samples=None), 0.95)
    with pytest.raises(ValueError, match="no resample has a value for both"):
        paired(m, replace(m, samples=np.full(4, np.nan)), 0.95)


def test_a_resample_without_a_value_is_left_out():
    a, b = (Measure(0.5, n=10, samples=np.array(draws)) for draws in ([0.3, np.nan, 0.9], [0.1, 0.2, 0.5]))
    found = paired(a, b, 0.9)
    assert (found.low, found.high) == pytest.approx((0.21, 0.39))


def test_several_trainings_without_resamples_have_students_interval():
    """Mean .73, s = .03606, t = 4.3027 of two degrees of freedom: .73 -+ 4.3027 * .03606 / sqrt(3)."""
    mean, low, high = over_trainings([0.70, 0.72, 0.77], None, 0.95)
    assert (mean, low, high) == pytest.approx((0.73, 0.73 - 0.089567, 0.73 + 0.089567), abs=1e-5)


def test_trainings_that_agree_leave_the_patients_alone():
    samples = np.random.default_rng(0).normal(0.8, 0.02, 4000)
    _, low, high = over_trainings([0.8, 0.8, 0.8], samples, 0.95)
    assert (low, high) == pytest.approx((0.8 - 1.96 * 0.02, 0.8 + 1.96 * 0.02), abs=1e-3)
    assert over_trainings([0.8, 0.8], None, 0.95) == (0.8, 0.8, 0.8)


@pytest.mark.parametrize("seeds, patients", [(0.02, 0.002), (0.02, 0.02), (0.002, 0.02)])
def test_the_interval_over_trainings_covers_other_seeds_and_patients(seeds, patients):
    """Three trainings on one draw of patients, a thousand times: how often the interval holds the truth."""
    rng = np.random.default_rng(1)
    held = []
    for _ in range(1000):
        test_set = rng.normal(0, patients)
        values = 0.7 + test_set + rng.normal(0, seeds, 3)
        resamples = values.mean() + rng.normal(0, patients, 300)
        _, low, high = over_trainings(values.tolist(), resamples, 0.95)
        held.append(low <= 0.7 <= high)
    assert 0.93 <= np.mean(held) <= 0.985


def test_trainings_are_paired_by_their_seed():
    """What a seed does to both models cancels; a model that was trained once is compared with each training."""
    samples = np.full(50, 0.7)
    a = Measure(0.72, n=9, trainings={"0": 0.62, "1": 0.72, "2": 0.82}, samples=samples + 0.02)
    b = Measure(0.70, n=9, trainings={"2": 0.80, "0": 0.60, "1": 0.70}, samples=samples)
    found = paired(a, b, 0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))
    found = paired(a, replace(b, trainings={}), 0.95)
    half = 4.302653 * 0.1 / 3**0.5
    assert (found.low, found.high) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-6)
    with pytest.raises(ValueError, match="seeds 0, 1, 2 against 0, 3; use the same"):
        paired(a, replace(b, trainings={"0": 0.6, "3": 0.7}), 0.95)
