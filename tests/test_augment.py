from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy.stats import chisquare

from pipeline.config.params import Augment
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.pictures import decode, encode
from pipeline.study import View
from pipeline.text.sentences import split_sentences, swap_sentences
from pipeline.training import augment
from pipeline.training.augment import augment_view, cut_and_resize, draw_crop

QUIET = Augment(crop_scale=(2.0, 2.0), clahe=0.0, brightness=0.0, contrast=0.0)  # a share of 2 is the whole image


def augmented(image, size, options, rng):
    """A draw of a view whose picture is at hand and so small that it is decoded in full."""

    def load(_, reduce):
        assert reduce == 1
        return image

    return augment_view(View("0", width=image.shape[1], height=image.shape[0]), size, options, rng, load)


def crops(monkeypatch, image, scale, draws, size=128):
    """The pieces that are cut out of an image, before they are resized."""
    pieces = []
    monkeypatch.setattr(augment, "resize_to", lambda piece, *_: pieces.append(piece.copy()) or piece)
    for seed in range(draws):
        cut_and_resize(image, draw_crop(*image.shape, size, scale, np.random.default_rng(seed)), size)
    return pieces


def texture(height, width, low=0, high=256, seed=0):
    return np.random.default_rng(seed).integers(low, high, (height, width), dtype=np.uint8)


def test_crop_has_the_share_and_aspect_asked_for(monkeypatch):
    pieces = crops(monkeypatch, texture(200, 200), (0.3, 0.7), 2000)
    shares = np.array([piece.size / 200**2 for piece in pieces])
    ratios = np.array([piece.shape[1] / piece.shape[0] for piece in pieces])
    assert 0.295 < shares.min() < 0.31 and 0.69 < shares.max() < 0.705
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert 0.74 < ratios.min() < 0.76 and 1.315 < ratios.max() < 1.345
    assert np.log(ratios).mean() == pytest.approx(0, abs=0.02)  # as often too wide as too tall
    assert np.quantile(np.log(ratios), 0.25) == pytest.approx(np.log(4 / 3) * -0.5, abs=0.025)


def test_crop_lies_anywhere(monkeypatch):
    column, row = np.meshgrid(np.arange(200), np.arange(200))
    left = np.array([piece[0, 0] for piece in crops(monkeypatch, column.astype(np.uint8), (0.25, 0.25), 1000)])
    right = np.array([piece[0, -1] for piece in crops(monkeypatch, column.astype(np.uint8), (0.25, 0.25), 1000)])
    top = np.array([piece[0, 0] for piece in crops(monkeypatch, row.astype(np.uint8), (0.25, 0.25), 1000)])
    assert left.min() <= 1 and right.max() >= 198 and top.min() <= 1
    assert ((left + right.astype(int)) / 2).mean() == pytest.approx(99.5, abs=3)


def test_a_share_above_one_is_the_image_itself(monkeypatch):
    image = texture(60, 60)
    for piece in crops(monkeypatch, image, (1.34, 1.4), 200):  # sqrt(4/3 * 3/4) = 1: whole whatever the aspect
        assert np.array_equal(piece, image)
    wide = texture(40, 80)
    whole = crops(monkeypatch, wide, (1.0001, 1.1), 400)
    assert all(piece.shape[0] == 40 for piece in whole)  # whole along the side that the share goes beyond
    widths = [piece.shape[1] for piece in whole]  # sqrt(3200 * share * aspect), the share up to 1.1
    assert 49 <= min(widths) <= 51 and 67 <= max(widths) <= 69


def waves(height, width, period):
    """Grey values at places in pixels: a wave along each axis, steep enough that half a pixel shows."""
    y, x = np.meshgrid(height, width, indexing="ij")
    return 127.5 + 60 * np.sin(2 * np.pi * x / period) + 60 * np.cos(2 * np.pi * y / period)


@pytest.mark.parametrize(("height", "width"), [(240, 256), (241, 255), (243, 353)])
@pytest.mark.parametrize(("size", "reduce"), [(200, 1), (72, 2), (36, 4)])
def test_a_crop_is_cut_where_it_was_drawn_at_every_scale(height, width, size, reduce):
    """Against the formula: output pixel u is at x + (u + 0.5) * w / S, in pixels of the full picture."""
    data = encode(np.rint(waves(np.arange(height), np.arange(width), 60)).astype(np.uint8), 100)
    seen = 0
    for seed in range(60):
        crop = draw_crop(height, width, size, (0.6, 1.1), np.random.default_rng(seed))
        if crop.reduce != reduce:
            continue
        seen += 1
        assert crop.x % reduce == crop.y % reduce == crop.width % reduce == crop.height % reduce == 0
        assert crop.x + crop.width <= width and crop.y + crop.height <= height
        x, y = (
            crop.x + (np.arange(size) + 0.5) * crop.width / size,
            crop.y + (np.arange(size) + 0.5) * crop.height / size,
        )
        truth = waves(y - 0.5, x - 0.5, 60)
        for scale in {1, reduce}:
            image = decode(data, scale)
            assert image.shape == (-(-height // scale), -(-width // scale))
            # An output pixel is a mean over the pixels that it covers, which flattens a wave a little.
            assert np.abs(cut_and_resize(image, crop, size, scale) - truth).mean() < 2
            aside = crop._replace(x=abs(crop.x - 4), width=crop.width - 4)
            assert np.abs(cut_and_resize(image, aside, size, scale) - truth).mean() > 3
    assert seen > 20


def test_a_picture_is_decoded_as_small_as_its_crop_allows():
    found = Counter()
    for seed in range(500):
        crop = draw_crop(620, 512, 120, (0.1, 1.1), np.random.default_rng(seed))
        side = min(crop.width, crop.height)
        assert side >= crop.reduce * 120 or crop.reduce == 1
        assert crop.reduce == 4 or side <= crop.reduce * 2 * 120
        found[crop.reduce] += 1
    assert min(found.values()) > 20 and set(found) == {1, 2, 4}


@pytest.mark.parametrize("size", [48, 100, 224])
def test_a_view_gives_what_its_full_picture_gives(size):
    """The crop that was drawn, of the full picture, to within 2 of 255 grey levels on average."""
    rng = np.random.default_rng(3)
    image = rng.normal(0, 2, (312, 256))  # noise, and detail the fainter the finer, as radiographs have it
    for octave in range(1, 7):
        blurred = cv2.GaussianBlur(rng.normal(0, 1, image.shape), (0, 0), 2**octave)
        image += blurred * (2.5 * 2**octave / 6 / blurred.std())
    image = cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    data, view, scales = encode(image, 95), View("0", width=256, height=312), Counter()

    def load(_, reduce):
        scales.update([reduce])
        return decode(data, reduce)

    options = Augment(clahe=0.0, brightness=0.0, contrast=0.0)
    for seed in range(40):
        one, two = np.random.default_rng(seed), np.random.default_rng(seed)
        ours = augment_view(view, size, options, one, load)
        full = cut_and_resize(decode(data), draw_crop(312, 256, size, options.crop_scale, two), size)
        two.random(4)  # whether to equalise, brightness, contrast, their order
        assert ours.shape == full.shape == (size, size) and ours.dtype == np.uint8
        assert np.abs(ours.astype(int) - full).mean() < 2
        assert abs(ours.mean() - full.mean()) < 0.5
        assert one.random() == two.random()
    assert scales[{48: 4, 100: 2, 224: 1}[size]] > 25


@pytest.mark.parametrize("shape", [(64, 64), (37, 90), (90, 37), (20, 20), (33, 400)])
@pytest.mark.parametrize("options", [Augment(), Augment(image=False), QUIET])
def test_output_is_a_square_of_uint8(shape, options):
    for seed in range(5):
        out = augmented(texture(*shape), 48, options, np.random.default_rng(seed))
        assert out.shape == (48, 48) and out.dtype == np.uint8 and out.flags.c_contiguous


def test_same_generator_same_image_and_input_untouched():
    image = texture(50, 60)
    before = image.copy()
    first, again, other = (augmented(image, 32, Augment(), np.random.default_rng(s)) for s in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(image, before)


def test_jitter_is_a_gain_about_black_and_a_gain_about_the_mean():
    """out = b * (m + c * (x - m)): b and c are found by regression and must be in their ranges and fill them."""
    image = texture(40, 40, 70, 160)
    mean, x = image.mean(), image.ravel().astype(float)
    found = []
    for seed in range(400):
        options = replace(QUIET, brightness=0.1, contrast=0.2)
        out = augmented(image, 40, options, np.random.default_rng(seed)).ravel().astype(float)
        slope, offset = np.polyfit(x, out, 1)
        assert np.abs(out - (slope * x + offset)).max() < 1.0  # half a grey level of rounding, and as much for the fit
        b = (slope * mean + offset) / mean
        found.append((b, slope / b))
    b, c = np.array(found).T
    assert 0.895 < b.min() < 0.91 and 1.09 < b.max() < 1.105 and b.mean() == pytest.approx(1, abs=0.01)
    assert 0.79 < c.min() < 0.82 and 1.18 < c.max() < 1.21 and c.mean() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(b, c)[0, 1]) < 0.15


class Fixed:
    """A generator whose numbers in [0, 1] are given, a row a call."""

    def __init__(self, *rows):
        self.rows = iter(rows)

    def random(self, count):
        row = next(self.rows)
        assert len(row) == count
        return np.array(row)


@pytest.mark.parametrize("b", [0.0, 0.9, 1.1, 1.9])
@pytest.mark.parametrize("c", [0.0, 0.8, 1.2, 1.9])
def test_jitter_clips_at_black_and_white_in_either_order(b, c):
    """Pixel by pixel in float, on a picture a third of which is white: the second step sees the clipped first one."""
    image = np.where(texture(30, 30, seed=1) > 170, 255, texture(30, 30)).astype(np.uint8)
    x = image.astype(float)

    def contrast(y):
        return np.clip(y.mean() + (y - y.mean()) * c, 0, 255)

    expected = (contrast(np.clip(x * b, 0, 255)), np.clip(contrast(x) * b, 0, 255))
    options = replace(QUIET, brightness=1.0, contrast=1.0)
    for chance, truth in zip((0.0, 0.9), expected, strict=True):
        jitter = [1.0, b / 2, c / 2, chance]
        out = augmented(image, 30, options, Fixed([0.5, 0.5, 0.0, 0.0], jitter))
        assert np.abs(out - truth).max() <= 0.51


def test_clahe_is_drawn_with_its_probability():
    image = cv2.GaussianBlur(texture(64, 64), (0, 0), 5)
    equalised = cv2.createCLAHE(4.0, (8, 8)).apply(image)
    assert not np.array_equal(image, equalised)
    hits = 0
    for seed in range(400):
        out = augmented(image, 64, replace(QUIET, clahe=0.3), np.random.default_rng(seed))
        assert np.array_equal(out, equalised) or np.array_equal(out, image)
        hits += np.array_equal(out, equalised)
    assert 90 <= hits <= 150  # 120, three standard deviations of 9.2


def test_nothing_is_ever_flipped():
    image = np.zeros((60, 60), dtype=np.uint8)
    image[:30, :] += 50
    image[:, 30:] += 150
    for seed in range(300):
        out = augmented(image, 32, Augment(clahe=0.0), np.random.default_rng(seed)).astype(float)
        assert out[:, 16:].mean() > out[:, :16].mean() + 50
        assert out[:16].mean() > out[16:].mean() + 10


def test_without_image_augmentation_only_a_mild_crop_is_left(monkeypatch):
    image = texture(100, 100, 60, 200)
    off = Augment(image=False)
    levels = [augmented(image, 100, off, np.random.default_rng(seed)) for seed in range(20)]
    assert all(abs(out.mean() - image.mean()) < 3 for out in levels)
    sizes = []
    monkeypatch.setattr(augment, "resize_to", lambda piece, *_: sizes.append(piece.size) or piece)
    for seed in range(300):
        augmented(image, 64, off, np.random.default_rng(seed))
    assert min(sizes) > 0.75 * 100**2 and max(sizes) <= 100**2


def test_evaluation_image_is_the_centre_square():
    wide = np.full((40, 100), 255, dtype=np.uint8)
    wide[:, 30:70] = np.arange(40) * 4  # the centre square; halved, each pixel is the mean of a pair of columns
    expected = np.tile(np.round(np.arange(20) * 8 + 2), (20, 1))
    assert np.array_equal(evaluation_crop(wide, 20), expected)
    assert np.array_equal(evaluation_crop(np.ascontiguousarray(wide.T), 20), expected.T)


@pytest.mark.parametrize("shape", [(32, 32), (31, 77), (77, 31), (200, 33), (10, 12)])
def test_evaluation_image_shape(shape):
    out = evaluation_crop(texture(*shape), 32)
    assert out.shape == (32, 32) and out.dtype == np.uint8 and out.flags.c_contiguous
    if shape == (32, 32):
        assert np.array_equal(out, texture(32, 32))


def test_enlarging_keeps_the_picture():
    ramp = np.tile(np.linspace(0, 200, 12), (12, 1)).astype(np.uint8)
    out = evaluation_crop(ramp, 48).astype(float)
    assert (np.diff(out[0]) >= 0).all() and out[0, 0] == 0 and out[0, -1] == ramp[0, -1]


def test_sentences_are_cut_after_their_stop():
    assert split_sentences("  No effusion. Is it 3.5 cm? Yes!  Heart normal ") == [
        *("No effusion.", "Is it 3.5 cm?", "Yes!", "Heart normal")
    ]
    assert split_sentences("") == []


def test_swap_really_swaps_and_loses_nothing():
    text = "One a. Two b. Three c. Two b."
    seen = Counter(swap_sentences(text, np.random.default_rng(seed)) for seed in range(600))
    for other in seen:
        assert other != text
        assert sorted(split_sentences(other)) == sorted(split_sentences(text))
    assert len(seen) == 11  # 4! / 2! orders, less the text's own
    assert chisquare(list(seen.values())).pvalue > 0.001
    two = {swap_sentences("First. Second.", np.random.default_rng(seed)) for seed in range(20)}
    assert two == {"Second. First."}
    for text in ("Only one sentence.", "Twice. Twice.", ""):
        assert swap_sentences(text, np.random.default_rng(0)) == text
