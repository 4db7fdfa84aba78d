"""The loss against a hand-written numpy InfoNCE, and its gradient against finite differences."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config.params import Loss
from pipeline.training.losses import Embeddings, clip_loss, cxr_clip_loss, samples_needed


def unit(rng, b=5, d=7):
    x = rng.normal(size=(b, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def info_nce(a, b, scale, smoothing=0.0):
    """Equation 1, one row at a time: -log of the share of the own pair, in both directions."""
    total = 0.0
    n = len(a)
    for first, second in ((a, b), (b, a)):
        for i in range(n):
            logits = [scale * float(first[i] @ second[j]) for j in range(n)]
            log_sum = np.log(sum(np.exp(x) for x in logits))
            own = -(logits[i] - log_sum)
            spread = -sum(x - log_sum for x in logits) / n
            total += ((1 - smoothing) * own + smoothing * spread) / n
    return total / 2


def batch(seed=0, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    arrays = [unit(rng) for _ in range(4)]
    return arrays, Embeddings(*(torch.tensor(x, dtype=dtype) for x in (arrays[0], arrays[2], arrays[1], arrays[3])))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_clip_loss_equals_numpy(smoothing):
    rng = np.random.default_rng(1)
    a, b = unit(rng), unit(rng)
    ours = clip_loss(torch.tensor(a), torch.tensor(b), torch.tensor(14.3), smoothing)
    assert ours.item() == pytest.approx(info_nce(a, b, 14.3, smoothing), rel=1e-5)


def test_total_is_mvs_plus_weighted_terms():
    (i1, i2, t1, t2), e = batch()
    scale = 10.0
    mvs = np.mean([info_nce(i, t, scale) for i in (i1, i2) for t in (t1, t2)])
    icl, tcl = info_nce(i1, i2, scale), info_nce(t1, t2, scale)
    total, parts = cxr_clip_loss(e, torch.tensor(scale), Loss(icl_weight=1.0, tcl_weight=0.5))
    assert parts["mvs"].item() == pytest.approx(mvs, rel=1e-5)
    assert parts["icl"].item() == pytest.approx(icl, rel=1e-5)
    assert parts["tcl"].item() == pytest.approx(tcl, rel=1e-5)
    assert total.item() == pytest.approx(mvs + 1.0 * icl + 0.5 * tcl, rel=1e-5)


def test_vanilla_clip_uses_the_first_pair_only():
    (i1, _, t1, _), e = batch()
    total, parts = cxr_clip_loss(e, torch.tensor(10.0), Loss(mvs=False, icl_weight=0.0, tcl_weight=0.0))
    assert total.item() == pytest.approx(info_nce(i1, t1, 10.0), rel=1e-5)
    assert set(parts) == {"mvs"}


@pytest.mark.parametrize(
    ("weights", "needed"),
    [
        (Loss(), (2, 2)),
        (Loss(mvs=False, icl_weight=0.0, tcl_weight=0.0), (1, 1)),
        (Loss(mvs=False, icl_weight=1.0, tcl_weight=0.0), (2, 1)),
        (Loss(mvs=False, icl_weight=0.0, tcl_weight=0.5), (1, 2)),
    ],
)
def test_samples_needed(weights, needed):
    assert samples_needed(weights) == needed


def test_missing_second_sample_is_an_error():
    _, e = batch()
    with pytest.raises(ValueError, match="two images"):
        cxr_clip_loss(Embeddings(e.image1, e.text1), torch.tensor(1.0), Loss())
    with pytest.raises(ValueError, match="icl_weight"):
        cxr_clip_loss(Embeddings(e.image1, e.text1), torch.tensor(1.0), Loss(mvs=False))


@pytest.mark.parametrize("weights", [Loss(tcl_weight=0.0), Loss(icl_weight=0.0), Loss(mvs=False), Loss()])
def test_gradient_equals_finite_differences(weights):
    """d(total)/d(every embedding and the log scale), through normalisation, by central differences in numpy."""
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(4, 5, 7))
    log_scale = np.log(5.0)

    def numpy_total(x, log_s):
        i1, i2, t1, t2 = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in x)
        s = np.exp(log_s)
        pairs = [(i, t) for i in (i1, i2) for t in (t1, t2)] if weights.mvs else [(i1, t1)]
        total = np.mean([info_nce(i, t, s) for i, t in pairs])
        return total + weights.icl_weight * info_nce(i1, i2, s) + weights.tcl_weight * info_nce(t1, t2, s)

    x = torch.tensor(raw, dtype=torch.float32, requires_grad=True)
    ls = torch.tensor(log_scale, dtype=torch.float32, requires_grad=True)
    i1, i2, t1, t2 = torch.nn.functional.normalize(x, dim=-1)
    cxr_clip_loss(Embeddings(i1, t1, i2, t2), ls.exp(), weights)[0].backward()
    h = 1e-5
    for index in [tuple(rng.integers(s) for s in raw.shape) for _ in range(12)]:
        up, down = raw.copy(), raw.copy()
        up[index] += h
        down[index] -= h
        slope = (numpy_total(up, log_scale) - numpy_total(down, log_scale)) / (2 * h)
        assert x.grad[index].item() == pytest.approx(slope, rel=2e-3, abs=2e-5)
    slope = (numpy_total(raw, log_scale + h) - numpy_total(raw, log_scale - h)) / (2 * h)
    assert ls.grad.item() == pytest.approx(slope, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_over_processes_of_their_rows_is_the_loss_of_all(world):
    rng = np.random.default_rng(2)
    arrays = [unit(rng, b=8) for _ in range(4)]
    i1, i2, t1, t2 = arrays
    everyone = Embeddings(*(torch.tensor(x) for x in (i1, t1, i2, t2)))
    totals = []
    for rank in range(world):
        own = slice(8 // world * rank, 8 // world * (rank + 1))
        mine = Embeddings(*(torch.tensor(x[own]) for x in (i1, t1, i2, t2)))
        totals.append(cxr_clip_loss(mine, torch.tensor(9.0), Loss(label_smoothing=0.1), everyone, rank)[0].item())
    pairs = [(i1, t1), (i1, t2), (i2, t1), (i2, t2)]
    expected = np.mean([info_nce(a, b, 9.0, 0.1) for a, b in pairs])
    expected += info_nce(i1, i2, 9.0, 0.1) + 0.5 * info_nce(t1, t2, 9.0, 0.1)
    assert np.mean(totals) == pytest.approx(expected, rel=1e-9)


def test_a_process_holds_no_more_logits_than_its_rows_need(monkeypatch):
    shapes = []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda x, *a, **k: shapes.append(tuple(x.shape)) or real(x, *a, **k)
    )
    _, e = batch()
    cxr_clip_loss(
        Embeddings(*(x[2:4] for x in (e.image1, e.text1, e.image2, e.text2))), torch.tensor(1.0), Loss(), e, 1
    )
    assert shapes == [(2, 5)] * 12


def test_products_are_in_single_precision_under_autocast():
    """At scale 100 half precision would be off in the second digit."""
    arrays, e = batch(seed=4, dtype=torch.float32)
    expected = info_nce(arrays[0], arrays[2], 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = clip_loss(e.image1, e.text1, torch.tensor(100.0))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=1e-5)
    halves = clip_loss(e.image1.bfloat16(), e.text1.bfloat16(), torch.tensor(100.0))
    assert halves.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_positives_equal_brute_force(smoothing):
    """UniCL: of each row minus the mean log share of all candidates of its label, one at a time, in both directions."""
    (i1, i2, t1, t2), e = batch(seed=6)
    labels, scale = [4, 9, 4, 7, 4], 8.0

    def brute(a, b):
        total = 0.0
        for first, second in ((a, b), (b, a)):
            for i in range(5):
                logits = [scale * float(first[i] @ second[j]) for j in range(5)]
                log_share = [x - np.log(sum(np.exp(y) for y in logits)) for x in logits]
                positive = [log_share[j] for j in range(5) if labels[j] == labels[i]]
                total -= ((1 - smoothing) * np.mean(positive) + smoothing * np.mean(log_share)) / 5
        return total / 2

    weights = Loss(label_positives=True, label_smoothing=smoothing)
    labelled = replace(e, labels=torch.tensor(labels))
    total, parts = cxr_clip_loss(labelled, torch.tensor(scale), weights)
    mvs = np.mean([brute(i, t) for i in (i1, i2) for t in (t1, t2)])
    assert parts["mvs"].item() == pytest.approx(mvs, rel=1e-6)
    assert parts["icl"].item() == pytest.approx(info_nce(i1, i2, scale, smoothing), rel=1e-6)  # images stay their own
    alone, _ = cxr_clip_loss(replace(e, labels=torch.arange(5)), torch.tensor(scale), weights)
    assert alone.item() == pytest.approx(
        cxr_clip_loss(e, torch.tensor(scale), Loss(label_smoothing=smoothing))[0].item()
    )
    assert total.item() != pytest.approx(alone.item(), rel=1e-3)
    with pytest.raises(ValueError, match="label_positives needs the labels"):
        cxr_clip_loss(e, torch.tensor(scale), weights)


def test_weight_of_the_image_text_term():
    _, e = batch()
    whole, _ = cxr_clip_loss(e, torch.tensor(10.0), Loss(icl_weight=0.0))
    total, parts = cxr_clip_loss(e, torch.tensor(10.0), Loss(mvs_weight=0.4, icl_weight=0.0))
    assert whole.item() - total.item() == pytest.approx(0.6 * parts["mvs"].item())
    total, parts = cxr_clip_loss(e, torch.tensor(10.0), Loss(mvs_weight=0.0, tcl_weight=0.0))
    assert set(parts) == {"icl"} and total == parts["icl"]
