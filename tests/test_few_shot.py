import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pipeline import few_shot, protocols
from pipeline.augment import augment_image
from pipeline.few_shot import linear_probe, subset
from pipeline.model import CxrClip
from pipeline.params import Augment, Bootstrap, FewShot
from pipeline.shards import load_view
from pipeline.study import write_studies

OPTIONS = FewShot({"p10": 0.1, "p100": 1.0}, {"p10": 4, "p100": 4}, lr=0.02, batch_size=64, draws=4)


def overlapping(count, seed):
    """Two labels that a linear rule explains but for noise: features float32 [N, 6], labels bool [N, 2]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6)) * [1, 2, 0.5, 1, 1, 1]
    logits = x @ np.array([[1.5, 0], [-0.5, 1], [0, 2], [0, 0], [0.5, -1], [0, 0]]) + [-1, 0.5]
    return x.astype(np.float32), rng.random((count, 2)) < 1 / (1 + np.exp(-logits))


def test_the_probe_finds_the_optimum_of_logistic_regression():
    x, y = overlapping(800, 0)
    xt, yt = overlapping(800, 1)
    layer = linear_probe(x[None], y, x, y, 60, replace(OPTIONS, lr=0.05, weight_decay=0.0), 0)
    for k in (0, 1):
        best = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(x, y[:, k])
        np.testing.assert_allclose(layer.weight[k].detach().numpy(), best.coef_[0], atol=0.03)
        assert layer.bias[k].item() == pytest.approx(best.intercept_[0], abs=0.03)
        ours = roc_auc_score(yt[:, k], (xt @ layer.weight[k].detach().numpy()))
        assert ours == pytest.approx(roc_auc_score(yt[:, k], best.decision_function(xt)), abs=0.002)


def test_the_epoch_of_lowest_validation_loss_is_kept():
    """Validation labels are turned round, so the probe is best before it has learnt much."""
    x, y = overlapping(300, 2)

    weights = {}
    for name, valid_labels in (("turned", ~y), ("straight", y)):
        w, b = recipe(lambda epoch: x, y, x, valid_labels, 8, OPTIONS, 0)
        layer = linear_probe(x[None], y, x, valid_labels, 8, OPTIONS, 0)
        np.testing.assert_allclose(layer.weight.detach().numpy(), w.T, atol=1e-4)
        np.testing.assert_allclose(layer.bias.detach().numpy(), b, atol=1e-4)
        weights[name] = w
    assert np.abs(weights["turned"] - weights["straight"]).max() > 0.1


def test_same_seed_same_probe():
    x, y = overlapping(300, 3)
    one, two, other = (linear_probe(x[None], y, x, y, 3, OPTIONS, seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    assert not torch.equal(one.weight, other.weight)


def recipe(features, labels, valid, valid_labels, epochs, options, seed):
    """The paper's recipe written out: features of an epoch are computed in that epoch; AdamW by hand, in float64."""
    torch.manual_seed(seed)
    start = torch.nn.Linear(valid.shape[1], labels.shape[1])
    w = [start.weight.detach().double().numpy().T, start.bias.detach().double().numpy()]
    m, v = [np.zeros_like(p) for p in w], [np.zeros_like(p) for p in w]
    order = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(labels) / options.batch_size)
    warm = max(1, round(total / 10))
    step, best, best_loss = 0, None, math.inf
    for epoch in range(epochs):
        x = features(epoch).astype(np.float64)
        shuffled = torch.randperm(len(labels), generator=order).numpy()
        for i in range(0, len(labels), options.batch_size):
            rows = shuffled[i : i + options.batch_size]
            error = (1 / (1 + np.exp(-(x[rows] @ w[0] + w[1]))) - labels[rows]) / (len(rows) * labels.shape[1])
            rate = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
            step += 1
            for k, g in enumerate((x[rows].T @ error, error.sum(axis=0))):
                w[k] = w[k] * (1 - options.lr * rate * options.weight_decay)
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g**2
                hat = m[k] / (1 - 0.9**step), v[k] / (1 - 0.999**step)
                w[k] = w[k] - options.lr * rate * hat[0] / (np.sqrt(hat[1]) + 1e-8)
        logits = valid @ w[0] + w[1]
        loss = np.mean(np.logaddexp(0, logits) - valid_labels * logits)
        if loss < best_loss:
            best, best_loss = [p.copy() for p in w], loss
    return best


@pytest.fixture(scope="module")
def probed(config, studies, tmp_path_factory):
    """RSNA made of the tiny studies, a model, and what evaluate hands to the probe and gets back."""
    folder = tmp_path_factory.mktemp("few")
    run = config()
    torch.manual_seed(1)
    model = CxrClip(run, 300).eval()
    rows = []
    for i, s in enumerate(s for s in studies if s.dataset == "mimic_cxr"):
        split = ("train", "train", "valid", "test")[i % 4]
        label = {"Pneumonia": int(i // 4 % 2)}
        rows.append(replace(s, dataset="rsna", split=split, findings=None, impression=None, labels=label))
    write_studies(folder / "rsna.parquet", rows)
    write_studies(folder / "siim.parquet", [replace(s, dataset="siim") for s in rows if s.split != "valid"])
    calls = []

    def spy(*args):
        calls.append((args, linear_probe(*args)))
        return calls[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_shot, "linear_probe", spy)
        found = few_shot.evaluate(
            *(model, 32, Augment(), folder, protocols.load("paper"), ["rsna", "siim", "openi"], OPTIONS),
            *(Bootstrap(50, 0.9), 5, torch.device("cpu"), 3),
        )
    return model, {k: [s for s in rows if s.split == k] for k in ("train", "valid", "test")}, found, calls


def test_cached_draws_are_the_uncached_recipe(probed):
    """With as many draws as epochs every epoch sees fresh augmentations, as if they were made in that epoch."""
    model, rows, _, calls = probed
    args, layer = calls[1]
    train, labels, valid, valid_labels = args[:4]
    assert train.shape == (4, len(rows["train"]), 32) and train.dtype == np.float32

    def encode(images):
        with torch.no_grad():
            return model.image_tower(torch.from_numpy(np.stack(images))).numpy()

    def fresh(epoch):
        views = [load_view(s.first_frontal) for s in rows["train"]]
        return encode(
            [augment_image(v, 32, Augment(), np.random.default_rng([3, epoch, i])) for i, v in enumerate(views)]
        )

    for epoch in range(4):
        np.testing.assert_allclose(train[epoch], fresh(epoch), atol=1e-5)
    assert np.abs(train[0] - train[1]).max() > 1e-3
    w, b = recipe(fresh, labels, valid, valid_labels, 4, OPTIONS, 3)
    np.testing.assert_allclose(layer.weight.detach().numpy(), w.T, atol=1e-4)
    np.testing.assert_allclose(layer.bias.detach().numpy(), b, atol=1e-4)


def test_draws_are_used_in_turn():
    x, y = overlapping(100, 5)
    draws = np.stack([x, 2 * x, 3 * x])
    w, b = recipe(lambda epoch: draws[epoch % 3], y, x, y, 7, OPTIONS, 0)
    layer = linear_probe(draws, y, x, y, 7, OPTIONS, 0)
    np.testing.assert_allclose(layer.weight.detach().numpy(), w.T, atol=1e-4)
    np.testing.assert_allclose(layer.bias.detach().numpy(), b, atol=1e-4)


def test_both_shares_are_probed_on_their_subset(probed):
    _, rows, found, calls = probed
    assert len(calls) == 2
    truth = np.array([[s.labels["Pneumonia"] == 1] for s in rows["train"]])
    for (args, _), share in zip(calls, (0.1, 1.0), strict=True):
        chosen = subset(len(truth), share, 3)
        assert np.array_equal(args[1], truth[chosen]) and args[1].dtype == bool
        assert args[0].shape[1] == len(chosen)
        assert np.array_equal(args[0], calls[1][0][0][:, chosen])
    assert set(found["metrics"]) == {"rsna.p10", "rsna.p100"}
    assert found["notes"] == ["siim: a split has no study"]


def test_the_metric_is_the_auc_of_the_test_split(probed):
    model, rows, found, calls = probed
    from pipeline.augment import evaluation_image

    images = np.stack([evaluation_image(load_view(s.first_frontal), 32) for s in rows["test"]])
    truth = [s.labels["Pneumonia"] for s in rows["test"]]
    for (_, layer), name in zip(calls, ("p10", "p100"), strict=True):
        with torch.no_grad():
            scores = layer(model.image_tower(torch.from_numpy(images)))[:, 0].numpy()
        metric = found["metrics"][f"rsna.{name}"]
        assert metric["value"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
        assert metric["low"] <= metric["value"] <= metric["high"] and metric["n"] == len(truth)


def test_subset():
    for count, share, size in ((1000, 0.1, 100), (18678, 0.1, 1868), (1000, 1.0, 1000), (3, 0.1, 1), (105, 0.1, 10)):
        chosen = subset(count, share, 0)
        assert len(chosen) == size == len(set(chosen.tolist()))
        assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < count
        assert np.array_equal(chosen, subset(count, share, 0))
    assert not np.array_equal(subset(1000, 0.1, 0), subset(1000, 0.1, 1))
    drawn = np.concatenate([subset(100, 0.1, seed) for seed in range(500)])
    assert np.bincount(drawn, minlength=100).min() > 20 and drawn.mean() == pytest.approx(49.5, abs=1.5)
