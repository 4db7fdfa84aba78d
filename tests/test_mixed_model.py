"""The model of mixed runs: what is hidden stays hidden at every scale, and what is seen counts."""

import numpy as np
import pytest
import torch

from pipeline.config.records import ParamsError
from pipeline.models.hidden_cells import hidden_cells
from pipeline.models.keyed_random import row_keys
from pipeline.models.masked_tokens import WordMask
from pipeline.models.mixed import MixedNet
from tests.conftest import make_config, make_mixed
from tests.mixed_steps import WORDS, Ids

GRIDS = (8, 4, 2)  # of 32 pixels in patches of 4


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(1)
    config = make_mixed(mixed={"scales": 3, "mask_ratio": 0.5})
    return MixedNet(config, WORDS).double().eval()


@pytest.fixture(scope="module")
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8))


@pytest.fixture(scope="module")
def text():
    tokens = torch.tensor([[2, 7, 8, 9, 3, 0], [2, 20, 21, 22, 23, 3]])
    return tokens, torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6])


HIDDEN = torch.tensor([[[True, False], [False, False]], [[True, False], [True, True]]])


def guesses(net, images, hidden=HIDDEN, text=(None, None)):
    with torch.no_grad():
        states, _ = net(images, hidden, *text)
        return net.guess(states)


def pixels(hidden, size=32):
    """Hidden pixels of bool [B, G, G]: bool [B, S, S]."""
    times = size // hidden.shape[1]
    return hidden.repeat_interleave(times, 1).repeat_interleave(times, 2)


def test_pieces_are_patches_of_averages(net, images):
    """By numpy: block means, then blocks of 4 x 4 row by row."""
    for k, (g, found) in enumerate(zip(GRIDS, net.pieces(images), strict=True)):
        small = images.numpy().reshape(2, 32 >> k, 1 << k, 32 >> k, 1 << k).mean(axis=(2, 4))
        for number in range(g * g):
            y, x = 4 * (number // g), 4 * (number % g)
            patch = (small[:, y : y + 4, x : x + 4].reshape(2, 16) / 255 - 0.5) / 0.25
            assert np.allclose(found[:, number].numpy(), patch, atol=1e-6)


def test_hidden_pixels_change_no_guess_at_any_scale(net, images, text):
    """Every hidden pixel replaced: bit by bit the same guesses, with and without a text."""
    other = torch.where(pixels(HIDDEN), 255 - images, images)
    assert (other != images).sum() == pixels(HIDDEN).sum()
    for said in ((None, None), text):
        for a, b in zip(guesses(net, images, text=said), guesses(net, other, text=said), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(*(net.image_features(x) for x in (images, other)))


@pytest.mark.parametrize("scale", range(3))
def test_a_hidden_token_of_one_scale_changes_no_guess(net, images, scale, monkeypatch):
    """Not even what a single scale's tokens hold of the hidden cells, all else as it was."""
    real = net.pieces(images)
    at = net.covered(HIDDEN)[scale]
    assert at.sum() == 4 * (GRIDS[scale] // 2) ** 2
    before = guesses(net, images)
    changed = [p.clone() for p in real]
    changed[scale][at] += 3.0
    monkeypatch.setattr(net, "pieces", lambda _: changed)
    assert all(torch.equal(a, b) for a, b in zip(before, guesses(net, images), strict=True))


@pytest.mark.parametrize("scale", range(3))
def test_a_visible_token_of_every_scale_counts_at_every_scale(net, images, scale, monkeypatch):
    real = net.pieces(images)
    before = guesses(net, images)
    changed = [p.clone() for p in real]
    changed[scale][~net.covered(HIDDEN)[scale]] += 1.0
    monkeypatch.setattr(net, "pieces", lambda _: changed)
    for guess, was, hidden in zip(guesses(net, images), before, net.covered(HIDDEN), strict=True):
        assert (guess - was).abs()[hidden].amax(dim=1).min() > 1e-6


def test_the_tokens_of_a_cell_are_those_that_lie_in_it(net):
    for covered, g in zip(net.covered(HIDDEN), GRIDS, strict=True):
        assert torch.equal(
            covered.unflatten(1, (g, g)), HIDDEN.repeat_interleave(g // 2, 1).repeat_interleave(g // 2, 2)
        )


def test_words_that_were_taken_out_are_not_seen(net, text):
    """Other words at the places that became [MASK] or another word give the same input. What is left counts."""
    tokens, mask = (x.repeat(40, 1) for x in text)
    keys = row_keys(torch.arange(len(tokens)), kind=2, samples=1)
    taker = WordMask.of(Ids(), 0.6)
    said, words = taker.take_out(tokens, mask, keys)
    gone, left = (words >= 0) & (said != tokens), mask.bool() & (words < 0) & (tokens > 4)
    assert gone.sum() > 100 and left.sum() > 50
    others = torch.where(gone, tokens + 15, tokens)
    said_of_others, words_of_others = taker.take_out(others, mask, keys)
    assert torch.equal(said_of_others, said) and torch.equal(words_of_others >= 0, words >= 0)
    with torch.no_grad():
        states = net(tokens=said, mask=mask)[1]
        for row in left.any(dim=1).nonzero().flatten().tolist():
            changed = torch.where(left[row], said[row] + 15, said[row])
            moved = (net(tokens=changed[None], mask=mask[row][None])[1][0] - states[row]).abs().amax(dim=1)
            assert moved[words[row] >= 0].min() > 1e-6 if (words[row] >= 0).any() else True


def test_the_guess_at_words_is_their_log_probability(net, text):
    tokens, mask = text
    words = torch.full_like(tokens, -1)
    words[1, 2], words[1, 4] = 21, 23
    with torch.no_grad():
        states = net(tokens=tokens, mask=mask)[1]
        linear, _, norm = net.words.transform
        x = norm(torch.nn.functional.gelu(states[1, [2, 4]] @ linear.weight.T + linear.bias))
        p = (x @ net.word_embeddings.weight.T + net.words.bias).softmax(dim=1)
        found = net.words(states, words, 2, net.word_embeddings.weight)
    assert found.tolist() == pytest.approx([0.0, -float(p[0, 21].log() + p[1, 23].log())])


def test_padding_is_not_seen(net, images, text):
    tokens, mask = text
    other = tokens.clone()
    other[0, 5] = 33
    with torch.no_grad():
        for seen in ((None, None), (images, HIDDEN)):
            a, b = net(*seen, tokens, mask), net(*seen, other, mask)
            assert torch.equal(a[0], b[0]) and torch.equal(a[1][mask.bool()], b[1][mask.bool()])
        short = net(images[:1], HIDDEN[:1], tokens[:1, :5], mask[:1, :5])
    assert torch.allclose(short[0], a[0][:1], atol=1e-9) and torch.allclose(short[1], a[1][:1, :5], atol=1e-9)


def test_a_text_changes_the_guess_and_an_absent_modality_is_absent(net, images, text):
    with_text, without = guesses(net, images, text=text), guesses(net, images)
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(with_text, without, strict=True))
    with torch.no_grad():
        image_states, nothing = net(images)
        assert image_states.shape == (2, 64 + 16 + 4, 16) and nothing.shape == (2, 0, 16)
        nothing, text_states = net(tokens=text[0], mask=text[1])
        assert nothing.shape == (2, 0, 16) and text_states.shape == (2, 6, 16)
        a, b = net(images, None, *text)
        assert a.shape == image_states.shape and b.shape == text_states.shape


def test_masks_over_ten_thousand_draws():
    """Exactly the share asked for, each cell as often as any other, any two as independent as such a draw can be."""
    keys = row_keys(torch.arange(10_000), kind=3, samples=1)
    hidden = hidden_cells(keys, 4, 0.3).flatten(1).double()  # of 4 x 4 cells: round(4.8) = 5
    assert (hidden.sum(dim=1) == 5).all()
    p = 5 / 16
    sd = (p * (1 - p) / 10_000) ** 0.5
    assert (hidden.mean(dim=0) - p).abs().max() < 4.5 * sd
    together = (hidden.T @ hidden / 10_000)[~torch.eye(16, dtype=torch.bool)]
    expected = 5 * 4 / (16 * 15)
    assert (together - expected).abs().max() < 5 * (expected * (1 - expected) / 10_000) ** 0.5
    assert torch.equal(hidden_cells(keys[[7, 3]], 4, 0.3), hidden_cells(keys, 4, 0.3)[[7, 3]])
    assert not (hidden_cells(keys, 4, 0.3) & ~hidden_cells(keys, 4, 0.6)).any()  # nested
    assert (hidden_cells(keys[:9], 4, 0.01).flatten(1).sum(1) == 1).all()
    assert (hidden_cells(keys[:9], 4, 0.99).flatten(1).sum(1) == 15).all()


def test_words_over_ten_thousand_draws():
    """15 % of the words are asked for: of those 80 % [MASK], 10 % any word, 10 % as they were."""
    tokens = torch.tensor([[2, 7, 8, 9, 10, 11, 3, 0]]).repeat(10_000, 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]]).repeat(10_000, 1)
    said, words = WordMask.of(Ids(), 0.15).take_out(tokens, mask, row_keys(torch.arange(10_000), kind=2, samples=1))
    asked = words >= 0
    assert not asked[:, [0, 6, 7]].any() and torch.equal(said[~asked], tokens[~asked])
    assert torch.equal(words[asked], tokens[asked])
    rate = asked[:, 1:6].double().mean(dim=0)
    assert (rate - 0.15).abs().max() < 4.5 * (0.15 * 0.85 / 10_000) ** 0.5
    total = int(asked.sum())
    masked, same = (said[asked] == 4).sum() / total, (said[asked] == tokens[asked]).sum() / total
    sd = (0.1 * 0.9 / total) ** 0.5
    assert abs(masked - 0.8) < 4.5 * (0.8 * 0.2 / total) ** 0.5
    assert abs(same - (0.1 + 0.1 / 45)) < 4.5 * sd
    drawn = said[asked & (said != 4) & (said != tokens)]
    assert set(drawn.tolist()) <= set(range(5, 50)) and len(set(drawn.tolist())) == 45


def test_regeneration_keeps_what_was_given(net, images, text):
    found = net.regenerate_scales(images, HIDDEN, *text)
    for k, x in enumerate(found):
        small = torch.nn.functional.avg_pool2d(images.double().unsqueeze(1) / 255, 1 << k).squeeze(1)
        kept = ~pixels(HIDDEN, 32 >> k)
        assert x.shape == small.shape and torch.allclose(x[kept], small[kept], atol=1e-9)
        assert (x[~kept] - small[~kept]).abs().max() > 0.01 and x.min() >= 0 and x.max() <= 1
    assert torch.equal(net.regenerate(images, HIDDEN, *text), found[0])
    guess = net.guess(net(images, HIDDEN, *text)[0])[0][1, 0].unflatten(0, (4, 4))  # the first patch of the second
    assert torch.allclose(found[0][1, :4, :4], (guess * 0.25 + 0.5).clamp(0, 1))


def test_embeddings_are_of_one_modality_and_unit_norm(net, images, text):
    with torch.no_grad():
        a, b = net.encode_image(images), net.encode_text(*text)
        assert a.shape == b.shape == (2, 16)
        assert torch.allclose(a.norm(dim=1), torch.ones(2).double()) and torch.allclose(b.norm(dim=1), a.norm(dim=1))
        assert torch.equal(net.image_tower(images), net.image_features(images)) and net.image_tower.width == 16
        expected = torch.nn.functional.normalize(net.image_projection(net(images)[0].mean(1)), dim=1)
        assert torch.allclose(a, expected)
        for row, length in enumerate((5, 6)):
            mean = net(tokens=text[0][row : row + 1, :length], mask=text[1][row : row + 1, :length])[1].mean(1)
            assert torch.allclose(b[row], torch.nn.functional.normalize(net.text_projection(mean)[0], dim=0))


def test_positions_are_of_the_centres_in_the_picture(net):
    """Of the coarsest scale, whose cells are 16 pixels wide: centres at 8 and 24, 2 and 6 patches from the edge. Waves
    are 2, 4, 8 and 16 patches long: a series that 32, four times the picture's 8, would go on."""
    for found, (y, x) in zip(net.image_positions[-4:], [(2, 2), (2, 6), (6, 2), (6, 6)], strict=True):
        angles = np.array([[2 * np.pi * c / length for length in (2, 4, 8, 16)] for c in (y, x)])
        assert np.allclose(found, np.concatenate([np.sin(angles), np.cos(angles)], axis=1).ravel(), atol=1e-6)


def test_a_run_that_is_not_mixed_has_no_such_model():
    with pytest.raises(ParamsError, match=r"runs\.tiny: no mixed run"):
        MixedNet(make_config(), WORDS)
