"""AUC and curves against scikit-learn, bootstrap against an explicit resample, intervals against a known truth."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_recall_curve, roc_auc_score, roc_curve

from pipeline.config.params import Bootstrap
from pipeline.evaluation import metrics


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_auc_equals_scikit_learn_with_ties(levels):
    rng = np.random.default_rng(levels)
    labels, scores = rng.random(200) < 0.3, rng.integers(levels, size=200).astype(float)
    ours = metrics.aucs(labels[None], scores[None], np.ones((1, 200)))[0, 0]
    assert ours == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_the_auc_under_weights_is_that_of_the_resample():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(80) < 0.4, rng.normal(size=80).round(1)
    weights = metrics.resamples([f"p{i // 2}" for i in range(80)], Bootstrap(samples=20), seed=1)
    for row, auc in zip(weights, metrics.aucs(labels[None], scores[None], weights)[0], strict=True):
        again = np.repeat(np.arange(80), row)
        assert auc == pytest.approx(roc_auc_score(labels[again], scores[again]), abs=1e-12)


def test_resamples_draw_whole_patients():
    groups = ["a", "a", "b", "c", "c", "c"]
    weights = metrics.resamples(groups, Bootstrap(samples=200), seed=0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3] == 3).all()  # as many patients as there are


def test_resamples_are_draws_with_replacement():
    """Of ten patients each is drawn once on average, with the variance and covariance of a multinomial draw."""
    weights = metrics.resamples([str(i) for i in range(10)], Bootstrap(samples=20_000), seed=3).astype(float)
    assert weights.mean(axis=0) == pytest.approx(np.ones(10), abs=0.03)
    assert np.cov(weights.T) == pytest.approx(np.eye(10) - 0.1, abs=0.04)


def test_aucs_of_many_classes_equal_the_resampled_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.random((5, 150)) < np.array([[0.02], [0.1], [0.5], [0.9], [0.985]])
    scores = rng.normal(size=(5, 150)).round(1) + labels
    weights = metrics.resamples([f"p{i // 3}" for i in range(150)], Bootstrap(samples=metrics.BLOCK + 3), seed=1)
    for c, row in enumerate(metrics.aucs(labels, scores, weights)):
        for b in range(len(weights)):
            again = np.repeat(np.arange(150), weights[b])
            if len(set(labels[c][again])) == 2:
                assert row[b] == pytest.approx(roc_auc_score(labels[c][again], scores[c][again]), abs=1e-12)
            else:
                assert np.isnan(row[b])


def test_weights_that_are_no_counts_keep_their_fractions():
    rng = np.random.default_rng(2)
    labels, scores, weights = rng.random(60) < 0.4, rng.normal(size=60).round(1), rng.random((4, 60))
    for row, auc in zip(weights, metrics.aucs(labels[None], scores[None], weights)[0], strict=True):
        assert auc == pytest.approx(roc_auc_score(labels, scores, sample_weight=row), abs=1e-12)


def test_large_counts_are_summed_exactly():
    """Sums beyond 2^24, which single precision would round."""
    labels, scores = np.arange(600) % 2 > 0, np.arange(600) % 7
    weights = np.full((1, 600), 60_001, dtype=np.uint16)
    weights[0, ::11] = 7
    ours = metrics.aucs(labels[None], scores[None], weights)[0, 0]
    assert ours == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights[0]), abs=1e-12)


def test_one_class_only_has_no_auc():
    labels, scores = np.zeros(10, dtype=bool), np.arange(10.0)
    assert np.isnan(metrics.aucs(labels[None], scores[None], np.ones((1, 10)))[0, 0])
    weights = metrics.resamples(list("abcdefghij"), Bootstrap(50), 0)
    truth = {"A": labels, "B": np.arange(10) > 4}
    macro, classes, notes = metrics.classes_with_intervals(truth, {"A": scores, "B": scores}, weights, Bootstrap(50))
    assert macro.value == 1.0
    assert macro.samples.shape == (50,)
    assert set(classes) == {"B"}
    assert classes["B"].positives == 5
    assert "A: no AUC" in notes[0]
    nothing = metrics.classes_with_intervals({"A": labels}, {"A": scores}, weights, Bootstrap(50))
    assert nothing[:2] == (None, {})


def test_macro_mean_resamples_all_classes_together():
    rng = np.random.default_rng(4)
    labels = {"A": np.isin(np.arange(90), [3, 50]), "B": rng.random(90) < 0.4, "C": rng.random(90) < 0.7}
    scores = {c: rng.normal(size=90) + truth for c, truth in labels.items()}
    weights = metrics.resamples([f"p{i // 2}" for i in range(90)], Bootstrap(200), 0)
    macro, classes, _ = metrics.classes_with_intervals(labels, scores, weights, Bootstrap(200))
    assert macro.value == pytest.approx(np.mean([roc_auc_score(labels[c], scores[c]) for c in "ABC"]), abs=1e-12)
    for b, row in enumerate(weights):
        again = np.repeat(np.arange(90), row)
        known = [c for c in "ABC" if len(set(labels[c][again])) == 2]
        mean = np.mean([roc_auc_score(labels[c][again], scores[c][again]) for c in known])
        assert macro.samples[b] == pytest.approx(mean, abs=1e-12)
    assert np.isnan(metrics.aucs(labels["A"][None], scores["A"][None], weights)).any()  # a class is lost somewhere
    assert (macro.low, macro.high) == pytest.approx(np.percentile(macro.samples, [2.5, 97.5]))
    part = np.arange(90) % 3 > 0  # clean images: the same draws, fewer columns
    some = metrics.classes_with_intervals(
        {"B": labels["B"][part]}, {"B": scores["B"][part]}, weights[:, part], Bootstrap(200)
    )
    again = np.repeat(np.flatnonzero(part), weights[7][part])
    assert some[0].samples[7] == pytest.approx(roc_auc_score(labels["B"][again], scores["B"][again]), abs=1e-12)
    assert some[0].n == classes["B"].n - 30 == 60


def test_labels_that_are_neither_are_left_out_of_their_class_alone():
    """The AUC and its resamples are scikit-learn's of the images that have the label; of blanks none is negative."""
    rng = np.random.default_rng(5)
    whole = {c: (rng.random(80) < share).astype(np.int8) for c, share in (("A", 0.5), ("B", 0.3), ("C", 0.6))}
    scores = {c: rng.normal(size=80) + truth for c, truth in whole.items()}
    labels = {c: truth.copy() for c, truth in whole.items()}
    labels["A"][::4] = -1
    labels["B"][labels["B"] == 1] = np.where(np.arange((whole["B"] == 1).sum()) % 2, 1, -1)
    weights = metrics.resamples([f"p{i}" for i in range(80)], Bootstrap(100), 0)
    macro, classes, notes = metrics.classes_with_intervals(labels, scores, weights, Bootstrap(100))
    for c in "ABC":
        known = labels[c] >= 0
        assert classes[c].value == pytest.approx(roc_auc_score(labels[c][known], scores[c][known]), abs=1e-12)
        assert (classes[c].n, classes[c].positives) == (int(known.sum()), int((labels[c] == 1).sum()))
    again = np.repeat(np.arange(80), weights[3])
    kept = {c: again[labels[c][again] >= 0] for c in "ABC"}
    mean = np.mean([roc_auc_score(labels[c][kept[c]], scores[c][kept[c]]) for c in "ABC"])
    assert macro.samples[3] == pytest.approx(mean, abs=1e-12) and macro.n == 80
    assert notes == [
        "A: 20 test images, uncertain or without this label, are left out",
        f"B: {(labels['B'] < 0).sum()} test images, uncertain or without this label, are left out",
    ]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_an_error(bad):
    labels, scores = np.array([True, False]), np.array([bad, 0.0])
    with pytest.raises(ValueError, match="not finite"):
        metrics.aucs(labels[None], scores[None], np.ones((1, 2)))
    with pytest.raises(ValueError, match="Edema: a score is not finite"):
        metrics.classes_with_intervals({"Edema": labels}, {"Edema": scores}, np.ones((1, 2)), Bootstrap())


def test_nothing_to_evaluate_is_an_error():
    with pytest.raises(ValueError, match="no test item"):
        metrics.resamples([], Bootstrap(), 0)
    with pytest.raises(ValueError, match="no test item"):
        metrics.mean_with_interval(np.zeros(0, dtype=bool), np.zeros((5, 0)), Bootstrap())
    with pytest.raises(ValueError, match="resamples has a value"):
        metrics.mean_with_interval(np.ones(2, dtype=bool), np.zeros((5, 2)), Bootstrap())


def test_precision_recall_points_lie_on_the_curve():
    rng = np.random.default_rng(6)
    labels, scores = rng.random(400) < 0.3, rng.normal(size=400).round(2)
    ours = metrics.precision_recall_points(labels, scores)
    precision, recall, _ = precision_recall_curve(labels, scores)
    theirs = set(zip(recall.round(4), precision.round(4), strict=True))
    assert set(zip(ours["recall"], ours["precision"], strict=True)) <= theirs
    assert len(ours["recall"]) == 60
    assert ours["recall"][-1] == 1.0
    assert ours["recall"] == sorted(ours["recall"])
    few = metrics.precision_recall_points(labels[:20], scores[:20])
    precision, recall, _ = precision_recall_curve(labels[:20], scores[:20])
    best = {r: p for r, p in zip(recall.round(4), precision.round(4), strict=True) if r}  # the last: highest threshold
    assert dict(zip(few["recall"], few["precision"], strict=True)) == best


def test_calibration_equals_scikit_learn():
    rng = np.random.default_rng(7)
    predicted = np.r_[rng.random(300) ** 2 * 0.85, 0.0, 0.3, 1.0]
    labels = rng.random(303) < predicted**1.5
    ours = metrics.calibration(labels, predicted)
    observed, mean = calibration_curve(labels, predicted, n_bins=10)
    assert ours["observed"] == pytest.approx(observed, abs=1e-4)
    assert ours["predicted"] == pytest.approx(mean, abs=1e-4)
    assert sum(ours["count"]) == 303
    error = np.average(np.abs(observed - mean), weights=ours["count"])
    assert ours["ece"] == pytest.approx(error, abs=1e-6)
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        metrics.calibration(labels[:2], np.array([0.5, 1.2]))


def test_roc_points_lie_on_the_curve():
    rng = np.random.default_rng(5)
    labels, scores = rng.random(40) < 0.5, rng.normal(size=40).round(1)
    ours = metrics.roc_points(labels, scores)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert set(zip(ours["fpr"], ours["tpr"], strict=True)) == set(zip(fpr.round(4), tpr.round(4), strict=True))


def coverage(rounds: int, samples: int, patients: int, images: int, seed: int) -> float:
    """How many of ``rounds`` intervals hold the AUC of .7602 = P(N(1, 1) > N(0, 1)).

    Every patient has ``images`` images, all positive or all negative; three quarters of their scores' variance are
    the patient's.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(patients) % 2 > 0, images)
    groups = [str(p) for p in np.repeat(np.arange(patients), images)]
    inside = 0
    for turn in range(rounds):
        own = np.repeat(rng.normal(size=patients), images)
        scores = np.sqrt(0.75) * own + np.sqrt(0.25) * rng.normal(size=len(labels)) + labels
        weights = metrics.resamples(groups, Bootstrap(samples), seed + turn)
        macro = metrics.classes_with_intervals({"A": labels}, {"A": scores}, weights, Bootstrap(samples))[0]
        inside += macro.low <= 0.7602 <= macro.high
    return inside / rounds


def test_intervals_cover_the_truth():
    """300 intervals of 95 %: the standard error of their share is .013. Drawn by image they would cover about .7."""
    assert 0.91 <= coverage(300, 200, 100, 4, seed=0) <= 0.985


@pytest.mark.drill
@pytest.mark.parametrize("images", [1, 4])
def test_a_thousand_intervals_cover_the_truth(images):
    found = coverage(1000, 1000, 200, images, seed=1)
    print(f"{images} images a patient: {found:.1%} of 1,000 intervals hold the truth")
    assert 0.93 <= found <= 0.97
