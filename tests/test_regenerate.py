"""Regeneration: PSNR and SSIM against slow formulas, what is hidden, and what the stage says of models we know."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from pipeline.config.params import Bootstrap
from pipeline.datasets import paired_tests
from pipeline.evaluation import protocols, regenerate
from pipeline.evaluation.image_quality import averaged, psnr, ssim, without_model
from pipeline.evaluation.metric_key import read_key
from pipeline.evaluation.metrics import resamples
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.index import read_studies, write_studies
from pipeline.storage.pictures import encode
from pipeline.storage.shards import EncodedPicture, ShardWriter, load_view
from pipeline.study import Study, View

SIZE, GRID = 48, 4
BOOTSTRAP = Bootstrap(80, 0.9)
SETS = protocols.load_protocol("paper").retrieval
MIMIC, OPENI = SETS["mimic_cxr"], SETS["openi"]


def pair(seed, size=20):
    """Two grey pictures [1, size, size] and hidden pixels of the second."""
    rng = np.random.default_rng(seed)
    truth, guess = rng.random((2, 1, size, size))
    return truth, guess, rng.random((1, size, size)) < 0.4


# measures


def test_psnr_by_hand():
    truth, guess, hidden = np.zeros((1, 2, 2)), np.array([[[0.1, 0.3], [0.9, 0.5]]]), np.zeros((1, 2, 2), dtype=bool)
    hidden[0, 0] = True  # errors of 0.1 and 0.3
    assert psnr(truth, guess, hidden) == pytest.approx([10 * math.log10(1 / 0.05)])
    assert psnr(truth, truth, hidden) == [100.0]


def slow_ssim(x, y):
    """The map of Wang et al. by loops: a window of 11 x 11 Gaussian weights around each pixel, mirrored beyond it."""
    offsets = np.arange(-5, 6)
    weights = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights /= weights.sum()
    x5, y5 = np.pad(x, 5, mode="symmetric"), np.pad(y, 5, mode="symmetric")
    out = np.empty(x.shape)
    for i, j in np.ndindex(x.shape):
        a, b = x5[i : i + 11, j : j + 11], y5[i : i + 11, j : j + 11]
        ma, mb = (weights * a).sum(), (weights * b).sum()
        va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
        cov = (weights * (a - ma) * (b - mb)).sum()
        out[i, j] = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))
    return out


def test_ssim_is_wangs_over_the_hidden_pixels_of_the_completed_picture():
    truth, guess, hidden = pair(0)
    completed = truth[0].copy()
    completed[hidden[0]] = guess[0][hidden[0]]
    assert ssim(truth, guess, hidden) == pytest.approx([slow_ssim(truth[0], completed)[hidden[0]].mean()], abs=1e-9)
    assert ssim(truth, truth, hidden) == pytest.approx([1.0])


def test_a_guess_of_visible_pixels_changes_no_measure():
    truth, guess, hidden = pair(1)
    other = np.where(hidden, guess, 1 - guess)
    for measure in (psnr, ssim):
        assert measure(truth, guess, hidden) == measure(truth, other, hidden)
        assert measure(truth, np.where(hidden, guess + 0.1, guess), hidden) != measure(truth, guess, hidden)


def test_averages_are_those_of_a_pool():
    x = np.random.default_rng(0).random((3, 16, 16))
    for scale in (1, 2):
        pool = torch.nn.functional.avg_pool2d(torch.from_numpy(x)[:, None], 2**scale)[:, 0]
        assert averaged(x, scale) == pytest.approx(pool.numpy())


def test_what_needs_no_model_sees_visible_pixels_alone():
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE)).astype(np.uint8)
    images[1] = 77
    hidden = regenerate.pixels_of(np.eye(GRID, dtype=bool)[None].repeat(2, axis=0), SIZE)
    found = without_model(images, hidden)
    assert found["mean"][0] == pytest.approx(images[0][~hidden[0]].mean() / 255)
    assert found["inpainted"][1] == pytest.approx(77 / 255, abs=0.03)
    changed = without_model(np.where(hidden, 255 - images, images).astype(np.uint8), hidden)
    assert all((changed[way][hidden] == found[way][hidden]).all() for way in found)


# what is hidden, and whose report is whose


def named(number, patient=None):
    return Study("openi", f"p{number if patient is None else patient}", f"s{number}", "test", (View("v"),))


def test_masks_hide_their_share_everywhere_and_grow_with_it():
    studies = [named(n) for n in range(2000)]
    quarter, half = (regenerate.cells_to_hide(studies, GRID, ratio, 0) for ratio in (0.25, 0.5))
    assert (quarter.sum(axis=(1, 2)) == 4).all() and (half.sum(axis=(1, 2)) == 8).all()
    assert not (quarter & ~half).any()  # nested
    assert np.abs(half.mean(axis=0) - 0.5).max() < 5 * math.sqrt(0.25 / 2000)
    assert len({m.tobytes() for m in half}) > 1800  # of 12,870; chance leaves 1,850
    assert (regenerate.cells_to_hide(studies[7:9], GRID, 0.5, 0) == half[7:9]).all()
    assert (regenerate.cells_to_hide(studies, GRID, 0.5, 1) != half).any()
    sums = [regenerate.cells_to_hide(studies[:1], 2, ratio, 0).sum() for ratio in (0.01, 0.99)]
    assert sums == [1, 3]  # never none, never all


def test_pixels_are_those_of_their_cell():
    cells = np.array([[[True, False], [False, False]]])
    assert regenerate.pixels_of(cells, 6)[0].astype(int).tolist() == [[1, 1, 1, 0, 0, 0]] * 3 + [[0] * 6] * 3


def test_a_shuffle_gives_everybody_another_patients_other_text():
    texts = [f"text {n % 9}" for n in range(60)]
    patients = [f"p{n // 2}" for n in range(60)]
    for seed in range(20):
        order = regenerate.derangement(texts, patients, seed)
        assert sorted(order) == list(range(60))
        assert all(texts[i] != texts[j] and patients[i] != patients[j] for i, j in enumerate(order))
    assert (regenerate.derangement(texts, patients, 3) == regenerate.derangement(texts, patients, 3)).all()
    for bad in ((["same"] * 4, list("abcd")), (list("abcd"), ["one"] * 4), (["a", "a", "a", "b"], list("wxyz"))):
        with pytest.raises(ValueError, match="cannot be shuffled"):
            regenerate.derangement(*bad, 0)


# all of it


@dataclass
class Reader:
    """A model that knows some pictures by heart: asked with a text, it answers with that text's picture, else grey.
    Visible pixels it answers wrongly."""

    known: dict[str, np.ndarray]
    grid: int = GRID
    calls: list[tuple[np.ndarray, np.ndarray, list[str] | None]] = field(default_factory=list)

    def regenerate_scales(self, images, mask, texts):
        self.calls.append((images.numpy(), mask.numpy(), texts))
        blank = np.full((SIZE, SIZE), 0.5)
        found = np.stack([self.known[t] / 255 for t in texts] if texts else [blank] * len(images))
        found = np.where(regenerate.pixels_of(mask.numpy(), SIZE), found, 0.123)
        return [torch.from_numpy(averaged(found, k)).float() for k in (0, 1)]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """24 test studies of Open-I, two a patient, and 6 of another split; a study without a report, one lateral only."""
    folder = tmp_path_factory.mktemp("regenerate")
    rng = np.random.default_rng(5)
    placed = []
    with ShardWriter(folder / "openi.tar") as writer:
        for n in range(30):
            coarse = rng.integers(40, 220, (6, 6)).astype(np.uint8)
            image = coarse.repeat(10, axis=0).repeat(10, axis=1)
            position = "LATERAL" if n == 3 else "PA"
            text = None if n == 5 else f"Report {n}."
            split = "test" if n < 24 else "train"
            views = (View(f"v{n}", position),)
            study = Study("openi", f"p{n // 2}", f"s{n}", split, views, findings=text)
            placed.append(writer.write(study, [EncodedPicture(encode(image, 95), 60, 60)]))
    write_studies(folder / "openi.parquet", placed)
    (folder / "openi.json").write_text(json.dumps({"phantom": True}))
    (folder / "mimic_cxr.json").write_text(json.dumps({"phantom": False}))
    return folder


def participants(index):
    """Test studies that take part, and the picture of each text."""
    studies = [s for s in read_studies(index / "openi.parquet", ("test",)) if s.study not in ("s3", "s5")]
    return studies, {s.findings: evaluation_crop(load_view(s.first_frontal), SIZE) for s in studies}


def evaluated(index, model, ratios=(0.25, 0.75), most=0, clean=None, seed=0):
    clean = clean or (lambda dataset, studies: np.ones(len(studies), dtype=bool))
    return regenerate.evaluate_regeneration(model, SIZE, 7, index, [OPENI], ratios, most, BOOTSTRAP, seed, clean)


def test_a_model_that_reads_is_found_to_read(index):
    studies, known = participants(index)
    model = Reader(known)
    found = evaluated(index, model)
    metrics = {key.name: m for key, m in found["metrics"].items()}
    assert metrics["openi_psnr25_matching"].value == pytest.approx(100, abs=1e-6)
    assert metrics["openi_ssim75_matching"].value == pytest.approx(1, abs=1e-6)
    assert metrics["openi_psnr75_matching_scale1"].value == pytest.approx(100, abs=1e-3)
    assert {m.n for m in metrics.values()} == {22}
    truth = np.stack([known[s.findings] for s in studies]) / 255
    hidden = regenerate.pixels_of(regenerate.cells_to_hide(studies, GRID, 0.75, 0), SIZE)
    errors = [((t[h] - 0.5) ** 2).mean() for t, h in zip(truth, hidden, strict=True)]
    by_hand = np.array([10 * math.log10(1 / e) for e in errors])
    assert metrics["openi_psnr75_none"].value == pytest.approx(by_hand.mean(), abs=1e-4)
    # the interval is over patients: the mean of the values under each resample's weights
    weights = resamples([s.patient for s in studies], BOOTSTRAP, 0)
    samples = (weights * by_hand).sum(axis=1) / weights.sum(axis=1)
    assert metrics["openi_psnr75_none"].samples == pytest.approx(samples, abs=1e-4)
    low, high = np.percentile(samples, [5, 95])
    assert (metrics["openi_psnr75_none"].low, metrics["openi_psnr75_none"].high) == pytest.approx((low, high), 1e-5)
    for way in ("none", "shuffled"):
        for name in ("psnr25", "psnr75", "ssim25", "ssim75"):
            gain, own, other = (metrics[f"openi_{name}_{m}"] for m in (f"gain_{way}", "matching", way))
            assert gain.low > 0 and gain.value == pytest.approx(own.value - other.value)
            assert gain.samples == pytest.approx(own.samples - other.samples)  # paired: the same resamples
    shown = [text for _, _, texts in model.calls if texts for text in texts]
    assert Counter(shown) == dict.fromkeys(known, 4)  # two ratios, its own and somebody else's
    assert regenerate.regeneration_lines(found)[0].startswith("openi_psnr25_matching 100.000 (+")


def test_all_ways_see_the_same_images_and_masks_in_batches(index):
    _, known = participants(index)
    model = Reader(known)
    evaluated(index, model, ratios=(0.5,))
    assert [len(images) for images, _, _ in model.calls] == [7] * 9 + [1] * 3
    for k in range(0, len(model.calls), 3):
        (a, am, at), (b, bm, bt), (c, cm, ct) = model.calls[k : k + 3]
        assert (a == b).all() and (b == c).all() and (am == bm).all() and (bm == cm).all()
        assert bt is None and all((known[t] == image).all() for t, image in zip(at, a, strict=True))
        assert not any(own == other for own, other in zip(at, ct, strict=True))


def test_a_model_that_does_not_read_gains_nothing(index):
    class Deaf(Reader):
        def regenerate_scales(self, images, mask, texts):
            return super().regenerate_scales(images, mask, None)

    found = evaluated(index, Deaf({}), ratios=(0.5,))
    gains = [m for key, m in found["metrics"].items() if key.way in ("gain_none", "gain_shuffled")]
    assert len(gains) == 4 and {(m.value, m.low, m.high) for m in gains} == {(0, 0, 0)}


def test_clean_images_and_what_is_missing(index):
    studies, known = participants(index)
    odd = lambda dataset, some: np.array([int(s.study[1:]) % 2 == 1 for s in some])  # noqa: E731
    found = evaluated(index, Reader(known), ratios=(0.5,), clean=odd)
    kept = odd("openi", studies)
    assert found["removed"] == {"openi": int((~kept).sum())}
    assert {m.n for key, m in found["metrics"].items() if key.clean} == {int(kept.sum())}
    truth = np.stack([known[s.findings] for s in studies]) / 255
    hidden = regenerate.pixels_of(regenerate.cells_to_hide(studies, GRID, 0.5, 0), SIZE)
    by_hand = psnr(truth, np.full(truth.shape, 0.5), hidden)[kept]
    clean = found["metrics"][read_key("openi_psnr50_none_clean")]
    assert clean.value == pytest.approx(by_hand.mean(), abs=1e-4)
    weights = resamples([s.patient for s in studies], BOOTSTRAP, 0)[:, kept]  # the same draws as of all images
    samples = (weights * by_hand).sum(axis=1) / weights.sum(axis=1)
    assert clean.samples == pytest.approx(samples, abs=1e-4)
    none = evaluated(index, Reader(known), ratios=(0.5,), clean=lambda d, some: np.zeros(len(some), dtype=bool))
    assert not any(key.clean for key in none["metrics"]) and none["notes"] == ["openi: no test image is clean"]


def test_only_sets_with_written_reports_that_are_there_take_part():
    assert paired_tests() == ("mimic_cxr", "openi")
    assert regenerate.rules(SETS, ["openi", "rsna"]) == [OPENI]
    assert regenerate.rules(SETS, paired_tests()) == [MIMIC, OPENI]


def test_a_sample_is_drawn_once_for_all_models(index):
    drawn = [regenerate.read_sample(index, OPENI, 9, 4) for _ in range(2)]
    assert drawn[0] == drawn[1] and len(drawn[0].studies) == 9 and drawn[0].positions == sorted(drawn[0].positions)
    assert regenerate.read_sample(index, OPENI, 9, 5).positions != drawn[0].positions
    tests = read_studies(index / "openi.parquet", ("test",))
    assert [tests[p].findings for p in drawn[0].positions] == drawn[0].texts
    assert regenerate.read_sample(index, OPENI, 1, 0) is None


def test_a_broken_model_is_one_line(index):
    _, known = participants(index)
    known[next(iter(known))] = np.full((SIZE, SIZE), np.nan)
    with pytest.raises(ValueError, match="openi: a regenerated pixel is not finite"):
        evaluated(index, Reader(known))
    with pytest.raises(ValueError, match="no mixed run"):
        regenerate.of_network(torch.nn.Linear(1, 1), None, torch.device("cpu"))


def test_pictures_are_what_they_say_and_of_phantoms_only(index):
    studies, known = participants(index)
    model = Reader(known)
    shown = regenerate.may_be_shown(index, [OPENI, MIMIC], False)
    assert shown == [OPENI] and regenerate.may_be_shown(index, [MIMIC], True) == [MIMIC]
    found = regenerate.regeneration_examples(model, SIZE, index, shown, (0.25, 0.5), 0, 0)
    assert found["ratio"].tolist() == [0.25, 0.25, 0.5, 0.5] and set(found["dataset"]) == {"openi"}
    tests = read_studies(index / "openi.parquet", ("test",))
    hidden = np.concatenate(
        [regenerate.pixels_of(regenerate.cells_to_hide(studies[:2], GRID, r, 0), SIZE) for r in (0.25, 0.5)]
    )
    for n, position in enumerate(found["position"]):
        own = known[tests[int(position)].findings]
        assert found["text"][n] == tests[int(position)].findings
        assert (found["input"][n] == own).all() and (found["with"][n] == own).all()
        assert (found["without"][n] == np.where(hidden[n], 128, own)).all()
        assert (found["masked"][n] == np.where(hidden[n], 0, own)).all()
    assert not found["difference"].any() and found["difference"].dtype == np.int16
    empty = regenerate.regeneration_examples(model, SIZE, index, [], (0.25, 0.5), 0, 0)
    assert empty["with"].shape == (0, SIZE, SIZE) and empty["ratio"].shape == (0,)
