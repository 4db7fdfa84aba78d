"""The objective of mixed runs: each term by hand, what lone studies leave alone, mixtures as sums of their parts. That
several processes compute what one does is in test_step.py, whose processes do both."""

import numpy as np
import pytest
import torch

from pipeline.models.hidden_cells import hidden_cells
from pipeline.models.keyed_random import row_keys
from pipeline.models.masked_tokens import WordMask
from pipeline.training.methods.mixed import joint
from tests.conftest import make_mixed
from tests.mixed_steps import WORDS, Ids, batch_of, method_of, model, samples, step
from tests.test_losses import info_nce

ALIGNMENT = ("grad.image_projection", "grad.text_projection", "grad.log_scale")
TEXT = ("grad.word_embeddings", "grad.words.", "grad.text_projection")
IMAGE = ("grad.pieces_", "grad.hidden_tokens", "grad.scale_embeddings", "grad.image_projection")
ONE = {"regeneration_weight": 1.0, "mlm_weight": 1.0, "alignment_weight": 1.0}
NONE = {"regeneration_weight": 0.0, "mlm_weight": 0.0, "alignment_weight": 0.0}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(got):
    return {name: value for name, value in got.items() if name.startswith("grad.")}


def assert_sums(got, parts, tolerance=1e-5):
    """Each gradient of ``got`` is the weighted sum of those of ``parts``, (share, gradients) each."""
    largest = max(float(v.norm()) for v in gradients(got).values())
    for name, value in gradients(got).items():
        expected = sum(share * part[name] for share, part in parts)
        assert float((value - expected).norm()) <= tolerance * float(value.norm()) + 1e-9 * largest, name


def of_kind(drawn, kinds, wanted):
    return [s for s, kind in zip(drawn, kinds, strict=True) if kind in wanted]


def test_every_term_by_hand():
    """Study by study: hidden pixels by numpy from the guesses put together again, words one by one, then InfoNCE."""
    drawn = samples("pitppit")
    net, config, batch = model(), make_mixed(), batch_of(drawn)
    with torch.no_grad():
        total, parts = method_of(net, config).loss(batch)
        errors, missed, asked, images, texts, jointly = [], 0.0, 0, [], [], []
        for s in drawn:
            key = torch.tensor([s.key])
            image = torch.from_numpy(np.stack(s.images)) if s.images else None
            tokens = torch.tensor([[int(w) for w in s.texts[0].split()]]) if s.texts else None
            hidden = hidden_cells(row_keys(key, 3, 1), net.grid, net.mask_ratio) if s.images else None
            together = bool(s.images and s.texts and joint(key))
            jointly.append(together)
            if tokens is not None:
                ones = torch.ones_like(tokens)
                said, words = WordMask.of(Ids(), 0.4).take_out(tokens, ones, row_keys(key, 2, 1))
                states = net(image, hidden, said, ones)[1] if together else net(tokens=said, mask=ones)[1]
                x = net.words.transform(states[0])
                log_p = (x @ net.word_embeddings.weight.T + net.words.bias).log_softmax(dim=1)
                for place in range(tokens.shape[1]):
                    if words[0, place] >= 0:
                        asked += 1
                        missed -= float(log_p[place, tokens[0, place]])
            if image is not None:
                states = net(image, hidden, said, ones)[0] if together else net(image, hidden)[0]
                scales = []
                for k, (guess, g) in enumerate(zip(net.guess(states), (8, 4), strict=True)):
                    rows = guess[0].numpy().reshape(g, g, 4, 4).transpose(0, 2, 1, 3).reshape(4 * g, 4 * g)
                    small = s.images[0].reshape(4 * g, 1 << k, 4 * g, 1 << k).mean(axis=(1, 3))
                    at = np.kron(hidden[0].numpy(), np.ones((g, g))).astype(bool)
                    scales.append(((rows - (small / 255 - 0.5) / 0.25) ** 2)[at].mean())
                errors.append(np.mean(scales))
            if s.images and s.texts:
                images.append(net.encode_image(image)[0].numpy())
                texts.append(net.encode_text(tokens, ones)[0].numpy())
    assert True in jointly and jointly[0] + jointly[3] + jointly[4] < 3 and asked > 5
    assert parts["regeneration"].item() == pytest.approx(np.mean(errors), rel=1e-6)
    assert parts["mlm"].item() == pytest.approx(missed / asked, rel=1e-9)
    aligned = info_nce(np.array(images), np.array(texts), net.scale.item())
    assert parts["alignment"].item() == pytest.approx(aligned, rel=1e-9)
    expected = parts["regeneration"] + 0.3 * parts["mlm"] + 0.5 * parts["alignment"]
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("kinds", "silent"), [("iiii", TEXT + ALIGNMENT), ("tttt", IMAGE + ALIGNMENT), ("itit", ALIGNMENT)]
)
def test_lone_studies_leave_cross_modal_terms_alone(kinds, silent):
    """Exact zeros, not small numbers; what is theirs has gradients."""
    got = step(batch_of(samples(kinds)))
    assert got["loss.alignment"].item() == 0.0
    for name, value in gradients(got).items():
        if name.startswith(silent):
            assert not value.any(), name
        elif "modalities" not in name:
            assert value.any(), name
    row = {"iiii": 1, "tttt": 0}.get(kinds)
    assert row is None or not got["grad.modalities"][row].any()


def test_an_image_learns_nothing_from_a_lone_text_beside_it():
    """Each term's gradient on what belongs to the other modality is exactly zero where no pair is."""
    batch = batch_of(samples("itit"))
    for weight, other in (("regeneration_weight", TEXT), ("mlm_weight", IMAGE)):
        got = gradients(step(batch, **{**NONE, weight: 1.0}))
        assert not any(value.any() for name, value in got.items() if name.startswith(other))
        assert got["grad.encoder.norm.weight"].any()


def test_a_mixture_is_the_weighted_sum_of_its_parts():
    """By images for regeneration, by words for mlm; alignment is of the pairs alone."""
    kinds = "piptpit"
    drawn = samples(kinds)
    batches = {wanted: batch_of(of_kind(drawn, kinds, wanted)) for wanted in "pit"}
    words = {wanted: int((batch.words >= 0).sum()) for wanted, batch in batches.items()}
    images = {"p": 3, "i": 2, "t": 0}
    shares = {
        "regeneration": {w: images[w] / 5 for w in "pit"},
        "mlm": {w: words[w] / sum(words.values()) for w in "pit"},
        "alignment": {"p": 1.0, "i": 0.0, "t": 0.0},
    }
    assert words["p"] > 2 and words["t"] > 2 and words["i"] == 0
    everything = {**batches, "all": batch_of(drawn)}
    base = {w: step(batch, **ONE) for w, batch in everything.items()}
    for term, share in shares.items():  # a term's gradient: what a weight of 2 adds to that of 1
        found = {}
        for w, batch in everything.items():
            twice = step(batch, **{**ONE, f"{term}_weight": 2.0})
            found[w] = {name: twice[name] - base[w][name] for name in gradients(twice)}
        assert_sums(found["all"], [(share[w], found[w]) for w in "pit"])
        value = sum(share[w] * base[w][f"loss.{term}"].item() for w in "pit")
        assert base["all"][f"loss.{term}"].item() == pytest.approx(value)


def test_the_place_in_the_batch_and_batch_mates_change_nothing():
    drawn = samples("piptpitp")
    whole, turned = step(batch_of(drawn)), step(batch_of(drawn[::-1]))
    assert turned["loss.total"].item() == pytest.approx(whole["loss.total"].item(), rel=1e-9)
    assert_sums(whole, [(1.0, turned)])
    other = step(batch_of([s._replace(key=s.key + 1) for s in drawn]))
    assert other["loss.regeneration"] != whole["loss.regeneration"] and other["loss.mlm"] != whole["loss.mlm"]
    assert other["loss.alignment"] == whole["loss.alignment"]  # nothing is hidden there


def test_half_of_the_pairs_are_masked_jointly():
    found = joint(torch.arange(10_000)).double()
    assert abs(found.mean() - 0.5) < 4.5 * 0.5 / 100
    masks = hidden_cells(row_keys(torch.arange(10_000), 3, 1), 4, 0.5).flatten(1).double()
    assert (masks[found.bool()].mean(0) - masks[~found.bool()].mean(0)).abs().max() < 4.5 * 2 * 0.5 / 100


def test_what_no_term_asks_for_is_not_hidden(monkeypatch):
    seen = []
    net = model()
    real = type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda self, *a, **k: seen.append((a, k)) or real(self, *a, **k))
    batch = batch_of(samples("pppp"))
    got = step(batch, **{**NONE, "alignment_weight": 1.0})
    assert len(seen) == 2 and {n for n in got if n.startswith("loss.")} == {"loss.total", "loss.alignment"}
    seen.clear()
    step(batch, **{**NONE, "mlm_weight": 1.0})
    assert all(len(a) < 2 or a[1] is None for a, _ in seen)


def test_a_batch_without_any_item_has_gradients_of_zero():
    got = step(batch_of(samples("tttt")), **{**NONE, "regeneration_weight": 1.0})
    assert got["loss.total"].item() == 0 and not any(v.any() for v in gradients(got).values())


def test_the_studies_whose_embeddings_are_not_finite():
    net, config = model(), make_mixed()
    batch = batch_of(samples("pitpi"))
    assert method_of(net, config).finite(batch).all()
    with torch.no_grad():
        net.word_embeddings.weight[int(batch.tokens[1, 1])] = float("nan")
    found = method_of(net, config).finite(batch)
    assert not found[batch.text_of[1]] and found[batch.image_of[~torch.isin(batch.image_of, batch.text_of)]].all()
    assert method_of(model(), config).finite(batch_of(samples("ii"))).all()
    assert WORDS == 50
