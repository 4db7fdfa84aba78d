"""AUC against scikit-learn, bootstrap against an explicit resample, retrieval ranks against brute force."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from pipeline import metrics, retrieval, zero_shot
from pipeline.params import Bootstrap
from pipeline.study import Study, View


@pytest.mark.parametrize("levels", [3, 10, 10_000])
def test_auc_equals_scikit_learn_with_ties(levels):
    rng = np.random.default_rng(levels)
    labels, scores = rng.random(200) < 0.3, rng.integers(levels, size=200).astype(float)
    ours = metrics.weighted_auc(labels, scores, np.ones((1, 200)))[0]
    assert ours == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_weighted_auc_is_the_auc_of_the_resample():
    rng = np.random.default_rng(0)
    labels, scores = rng.random(80) < 0.4, rng.normal(size=80).round(1)
    weights = metrics.resamples([f"p{i // 2}" for i in range(80)], Bootstrap(samples=20), seed=1)
    for row, auc in zip(weights, metrics.weighted_auc(labels, scores, weights), strict=True):
        again = np.repeat(np.arange(80), row)
        assert auc == pytest.approx(roc_auc_score(labels[again], scores[again]), abs=1e-12)


def test_resamples_draw_whole_patients():
    groups = ["a", "a", "b", "c", "c", "c"]
    weights = metrics.resamples(groups, Bootstrap(samples=200), seed=0)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, 0] + weights[:, 2] + weights[:, 3] == 3).all()  # as many patients as there are


def test_one_class_only_has_no_auc():
    labels = np.zeros(10, dtype=bool)
    assert np.isnan(metrics.weighted_auc(labels, np.arange(10.0), np.ones((1, 10))))[0]
    macro, _, classes, notes = metrics.classes_with_intervals(
        {"A": labels, "B": np.arange(10) > 4},
        {"A": np.arange(10.0), "B": np.arange(10.0)},
        metrics.resamples(list("abcdefghij"), Bootstrap(50), 0),
        Bootstrap(50),
    )
    assert macro["value"] == 1.0
    assert set(classes) == {"B"}
    assert "A: no AUC" in notes[0]


def test_nan_score_is_an_error():
    with pytest.raises(ValueError, match="not finite"):
        metrics.weighted_auc(np.array([True, False]), np.array([np.nan, 0.0]), np.ones((1, 2)))


def test_roc_points_lie_on_the_curve():
    rng = np.random.default_rng(5)
    labels, scores = rng.random(40) < 0.5, rng.normal(size=40).round(1)
    ours = metrics.roc_points(labels, scores)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert set(zip(ours["fpr"], ours["tpr"], strict=True)) == set(zip(fpr.round(4), tpr.round(4), strict=True))


def test_interval_covers_the_truth():
    """On data whose AUC is known, about 95 % of the 95 % intervals hold it."""
    rng = np.random.default_rng(0)
    truth = 0.7602  # P(N(1, 1) > N(0, 1))
    labels = np.arange(120) < 60
    weights = metrics.resamples([str(i) for i in range(120)], Bootstrap(200), 0)
    inside = 0
    for _ in range(300):
        m, _ = metrics.auc_with_interval(labels, rng.normal(size=120) + labels, weights, Bootstrap())
        inside += m["low"] <= truth <= m["high"]
    assert 0.90 <= inside / 300 <= 0.98


def study(name, findings=None, impression=None, dataset="mimic_cxr", positions=("PA",)):
    views = tuple(View(f"{name}{i}", p) for i, p in enumerate(positions))
    return Study(dataset, name, name, "test", views, findings, impression)


def test_ranks_equal_brute_force():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(50, 8)).astype("f4"), rng.normal(size=(30, 8)).astype("f4")
    texts[7] = texts[3]  # a tie
    targets = rng.integers(30, size=50)
    ours = retrieval.ranks(images, texts, targets)
    for i in range(50):
        cosines = [float(np.float32(images[i] @ texts[j])) for j in range(30)]
        own = cosines[targets[i]]
        assert abs(ours[i] - sum(c >= own - 1e-6 for c in cosines)) <= 0
    assert retrieval.ranks(np.ones((3, 2), "f4"), np.ones((9, 2), "f4"), np.array([0, 4, 8])).tolist() == [9, 9, 9]


def test_candidates_are_distinct_and_the_longer_section():
    studies = [
        study("a", "Clear lungs.", "Normal chest radiograph."),
        study("b", "Normal chest radiograph.", "Ok."),
        study("c"),
        study("d", "Only a lateral.", positions=("LATERAL",)),
        study("e", None, "Effusion.", positions=("LATERAL", "AP")),
    ]
    pool = retrieval.candidates(studies)
    assert pool.texts == ["Normal chest radiograph.", "Effusion."]
    assert pool.queries == [0, 1, 4]
    assert pool.targets.tolist() == [0, 0, 1]
    assert retrieval.candidates([study("x", "Long findings here.", "Short.", "chexpert")]).texts == ["Short."]


def test_zero_shot_scores():
    images = np.array([[1, 0], [0.6, 0.8]])
    pair = np.array([[0, 1.0], [1.0, 0]])
    cosines = images @ pair.T
    softmax = np.exp(cosines[:, 0]) / np.exp(cosines).sum(axis=1)
    assert np.argsort(zero_shot.pair_scores(images, pair)).tolist() == np.argsort(softmax).tolist()
    grid = {"A": np.array([[1.0, 0], [0, 1.0]]), "B": np.array([[0.0, 1.0]])}
    assert zero_shot.grid_scores(images, grid) == pytest.approx(np.array([[0.5, 0.0], [0.7, 0.8]]))
