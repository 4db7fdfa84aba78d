from collections import Counter
from dataclasses import replace
from hashlib import blake2b
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, hypergeom

from pipeline.config.params import Augment
from pipeline.config.run_config import read_run_config
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.index import read_studies, write_studies
from pipeline.storage.shards import load_view
from pipeline.study import Study, View
from pipeline.study_keys import study_key
from pipeline.text.sentences import split_sentences
from pipeline.training import batches
from pipeline.training.batches import (
    TrainingSet,
    ValidationSet,
    collate,
    collator,
    epoch_draws,
    length_groups,
    shuffled,
    steps_before,
    training_batches,
    validation_parts,
)
from pipeline.training.corpus import usable, write_corpus
from pipeline.training.sampling import draw_texts, draw_views, generator

QUIET = Augment(image=False, text=False)
MANY = 3000


def generators(count=MANY):
    return (np.random.default_rng([5, seed]) for seed in range(count))


def with_views(*positions):
    return Study("mimic_cxr", "p", "s", "train", tuple(View(str(i), p) for i, p in enumerate(positions)), "A.", "B.")


def pairs(study):
    drawn = Counter(tuple(v.id for v in draw_views(study, 2, rng)) for rng in generators())
    return {"".join(pair): n / MANY for pair, n in drawn.items()}


def report(findings="One a. Two b. Three c.", impression="Four d. Five e."):
    return Study("mimic_cxr", "p", "s", "train", (View("0"),), findings, impression)


class Letters:
    """A tokenizer for tests: a character is a token."""

    def encode(self, texts):
        return [np.array([ord(c) for c in t], dtype=np.int64) for t in texts]


def texts_of(batch):
    """In their order, taken from the groups; the masks say where they end."""
    rows = [
        row[: int(m.sum())]
        for group in zip(batch.tokens, batch.mask, strict=True)
        for row, m in zip(*group, strict=True)
    ]
    return ["".join(map(chr, rows[i].tolist())) for i in batch.order]


def of_split(studies, split="train", dataset=None):
    return [s for s in studies if s.split == split and dataset in (None, s.dataset)]


# views


def test_two_distinct_positions_whenever_they_exist():
    assert pairs(with_views("PA", "PA", "LATERAL")) == {  # the first view is any; the second any of another position
        **{"02": pytest.approx(1 / 3, abs=0.04), "12": pytest.approx(1 / 3, abs=0.04)},
        **{"20": pytest.approx(1 / 6, abs=0.03), "21": pytest.approx(1 / 6, abs=0.03)},
    }
    six = pairs(with_views("PA", "AP", "LATERAL"))
    assert len(six) == 6 and all(share == pytest.approx(1 / 6, abs=0.03) for share in six.values())


def test_else_two_images_else_one_twice():
    six = pairs(with_views("AP", "AP", "AP"))
    assert set(six) == {"01", "02", "10", "12", "20", "21"}
    assert all(share == pytest.approx(1 / 6, abs=0.03) for share in six.values())
    assert pairs(with_views("", "")) == {"01": pytest.approx(0.5, abs=0.04), "10": pytest.approx(0.5, abs=0.04)}
    assert pairs(with_views("PA")) == {"00": 1.0}


def test_a_single_view_is_any_of_them():
    drawn = Counter(draw_views(with_views("PA", "PA", "LATERAL"), 1, rng)[0].id for rng in generators())
    assert sorted(drawn) == ["0", "1", "2"] and min(drawn.values()) > MANY * 0.29


def test_a_view_that_is_drawn_twice_is_read_once(config, studies, prompts, monkeypatch):
    read = []
    monkeypatch.setattr(batches, "load_view", lambda view, reduce, every: read.append(view) or load_view(view, reduce))
    train = of_split(studies)
    quiet = replace(QUIET, image=True, crop_scale=(2.0, 2.0))  # at one scale
    data = TrainingSet(train, prompts, config(sampling={"unit": "image"}, augment=quiet))
    assert [data[0, i] for i in range(len(train))] and len(read) == len(train)
    read.clear()
    data = TrainingSet(train, prompts, config(augment=quiet))
    assert [data[0, i] for i in range(len(train))] and len(read) == sum(min(2, len(s.views)) for s in train)


# texts of a report


def test_both_sections_in_both_orders_without_replacement(config):
    run = config(augment=QUIET)
    drawn = Counter(tuple(draw_texts(report(), 2, None, run, rng)) for rng in generators())
    f, i = report().findings, report().impression
    assert set(drawn) == {(f, i), (i, f)}
    assert drawn[f, i] / MANY == pytest.approx(0.5, abs=0.04)
    single = Counter(draw_texts(report(), 1, None, run, rng)[0] for rng in generators())
    assert set(single) == {f, i} and single[f] / MANY == pytest.approx(0.5, abs=0.04)


def test_half_of_the_texts_have_their_sentences_swapped(config):
    kept = Counter()
    for rng in generators():
        drawn = draw_texts(report(), 2, None, config(), rng)
        assert sorted(map(sorted, map(split_sentences, drawn))) == sorted(
            [["Five e.", "Four d."], ["One a.", "Three c.", "Two b."]]
        )
        kept.update(text in (report().findings, report().impression) for text in drawn)
    assert kept[True] / (2 * MANY) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("only", [{"findings": None}, {"impression": None}])
def test_one_section_is_followed_by_its_own_sentences_in_another_order(config, only):
    study = replace(report(), **only)
    text = study.findings or study.impression
    for rng in generators(200):
        first, second = draw_texts(study, 2, None, config(), rng)
        assert first != second and sorted(split_sentences(first)) == sorted(split_sentences(second)) == sorted(
            split_sentences(text)
        )
        assert draw_texts(study, 2, None, config(augment=QUIET), rng) == [text, text]


def test_unit_image_gives_the_whole_report(config):
    run = config(sampling={"unit": "image"}, augment=QUIET)
    whole = "One a. Two b. Three c. Four d. Five e."
    for rng in generators(20):
        assert draw_texts(report(), 1, None, run, rng) == [whole]
        assert draw_texts(report(), 2, None, run, rng) == [whole, whole]
        assert draw_texts(report(findings=None), 1, None, run, rng) == ["Four d. Five e."]


def test_unit_image_takes_one_view(config, studies, prompts):
    run = config(sampling={"unit": "image"}, augment=replace(QUIET, image=True, crop_scale=(2.0, 2.0), clahe=0.0))
    run = replace(run, augment=replace(run.augment, brightness=0.0, contrast=0.0))
    data = TrainingSet(of_split(studies), prompts, run)
    assert all(np.array_equal(*data[0, i][0]) for i in range(len(data)))
    by_study = TrainingSet(of_split(studies), prompts, replace(run, sampling=config().sampling))
    differ = [not np.array_equal(*by_study[0, i][0]) for i in range(len(data))]
    assert differ == [len(s.views) > 1 for s in of_split(studies)]


# texts of labels


def said(text):
    """A caption of the fixture's prompts as (class, value word) pairs."""
    words = [s.split() for s in split_sentences(text)]
    assert all(len(w) == 3 and w[2][:-1] in "0123" for w in words)
    return [(w[0], w[1]) for w in words]


def test_chestxray14_names_its_positives_and_three_fresh_negatives(config, prompts):
    labels = {f"Class{i}": int(i in (2, 9)) for i in range(14)}
    study = Study("chestxray14", "p", "s", "train", (View("0"),), labels=labels)
    negatives, alike, first = Counter(), 0, Counter()
    for rng in generators():
        drawn = [said(t) for t in draw_texts(study, 2, prompts["chestxray14"], config(), rng)]
        for caption in drawn:
            assert len(caption) == len(set(caption)) == 5
            assert {c for c, word in caption if word == "present"} == {"Class2", "Class9"}
            named = {c for c, word in caption if word == "absent"}
            assert len(named) == 3
            negatives.update(named)
            first[caption[0]] += 1
        alike += set(drawn[0]) == set(drawn[1])
    assert len(negatives) == 12
    assert all(n / (2 * MANY) == pytest.approx(3 / 12, abs=0.03) for n in negatives.values())
    assert alike / MANY == pytest.approx(1 / 220, abs=0.006)  # 12 choose 3: the second caption draws its own
    assert first["Class2", "present"] / (2 * MANY) == pytest.approx(1 / 5, abs=0.025)  # sentences in random order


def test_chexpert_says_every_label_as_it_is(config, prompts):
    labels = {"Class1": 1, "Class4": -1, "Class5": 0, "Class6": 0, "Class7": 0, "Class8": 0}
    study = Study("chexpert", "p", "s", "train", (View("0"),), labels=labels)
    words = {1: "present", 0: "absent", -1: "possible"}
    templates = Counter()
    for rng in generators(400):
        for text in draw_texts(study, 2, prompts["chexpert"], config(), rng):
            assert sorted(said(text)) == sorted((c, words[v]) for c, v in labels.items())
            templates.update(split_sentences(text))
    assert len(templates) == 6 * 4 and min(templates.values()) > 140  # of 800 captions a quarter each


# distributions, against probabilities worked out by hand; draws of one study in many epochs, as training makes them

EPOCHS = 6000


def fits(drawn, expected):
    """Whether counts are those of the expected probabilities: nothing else is drawn, and chi-square does not object."""
    total = sum(drawn.values())
    assert set(drawn) <= set(expected) and sum(expected.values()) == pytest.approx(1)
    assert min(expected.values()) * total >= 5
    if len(expected) == 1:
        return True
    return chisquare([drawn[k] for k in expected], [p * total for p in expected.values()]).pvalue > 0.001


def by_epoch(study):
    return (generator(study_key(study, 7, epoch)) for epoch in range(EPOCHS))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (("PA",), {"00": 1}),
        (("PA", "LATERAL"), {"01": 1 / 2, "10": 1 / 2}),
        (("AP", "AP"), {"01": 1 / 2, "10": 1 / 2}),
        (("PA", "PA", "LATERAL"), {"02": 1 / 3, "12": 1 / 3, "20": 1 / 6, "21": 1 / 6}),
        # The first is any of four; the second any of those in another position: two for PA, three for the others.
        (
            ("PA", "PA", "AP", "LATERAL"),
            {
                **dict.fromkeys(["02", "03", "12", "13"], 1 / 8),
                **dict.fromkeys(["20", "21", "23", "30", "31", "32"], 1 / 12),
            },
        ),
        (("", "", "AP"), {"02": 1 / 3, "12": 1 / 3, "20": 1 / 6, "21": 1 / 6}),
    ],
)
def test_distribution_of_views(positions, expected):
    study = with_views(*positions)
    drawn = Counter("".join(v.id for v in draw_views(study, 2, rng)) for rng in by_epoch(study))
    assert fits(drawn, expected)


def orders(text):
    """The text's sentences in every order but its own."""
    return [" ".join(p) for p in permutations(split_sentences(text)) if " ".join(p) != text]


def test_distribution_of_the_texts_of_a_report(config):
    """Either section first; each, on its own, as it is (1/2) or in one of its other orders (1/2 in all)."""
    study = report()
    chances = {
        t: {t: 1 / 2, **dict.fromkeys(orders(t), 1 / 2 / len(orders(t)))} for t in (study.findings, study.impression)
    }
    assert [len(c) for c in chances.values()] == [6, 2]
    f, i = chances.values()
    expected = {(a, b): f[a] * i[b] / 2 for a in f for b in i}
    expected |= {(b, a): share for (a, b), share in expected.items()}
    drawn = Counter(tuple(draw_texts(study, 2, None, config(), rng)) for rng in by_epoch(study))
    assert fits(drawn, expected)


def test_distribution_of_the_texts_of_one_section(config):
    """The first as it is or in another order; the second in any order but the first one's."""
    study = report(impression=None)
    own = study.findings
    first = {own: 1 / 2, **dict.fromkeys(orders(own), 1 / 10)}
    expected = {(a, b): share / 5 for a, share in first.items() for b in first if b != a}
    drawn = Counter(tuple(draw_texts(study, 2, None, config(), rng)) for rng in by_epoch(study))
    assert len(expected) == 30 and fits(drawn, expected)


def test_distribution_of_negatives(config, prompts):
    """Three of the twelve, each of the 220 sets alike; the two captions of a draw, and draws of two epochs, apart."""
    labels = {f"Class{i}": int(i in (2, 9)) for i in range(14)}
    study = Study("chestxray14", "p", "s", "train", (View("0"),), labels=labels)
    sets = [frozenset(c) for c in combinations([c for c, v in labels.items() if not v], 3)]
    drawn, met, before, places = Counter(), Counter(), None, Counter()
    for rng in by_epoch(study):
        captions = [said(t) for t in draw_texts(study, 2, prompts["chestxray14"], config(), rng)]
        two = [frozenset(c for c, word in caption if word == "absent") for caption in captions]
        drawn.update(two)
        met["of one draw", len(two[0] & two[1])] += 1
        if before:
            met["of two epochs", len(before & two[0])] += 1
        before = two[0]
        places.update(place for caption in captions for place, (c, _) in enumerate(caption) if c == "Class2")
    assert fits(drawn, dict.fromkeys(sets, 1 / 220))
    assert fits(places, dict.fromkeys(range(5), 1 / 5))
    for pair in ("of one draw", "of two epochs"):  # classes in common, hypergeometric
        assert fits(
            Counter({k: n for (p, k), n in met.items() if p == pair}),
            {0: 84 / 220, 1: 108 / 220, 2: 27 / 220, 3: 1 / 220},
        )


def test_distribution_of_prompts(config, prompts):
    """Each of two captions takes any of four templates, whatever the other one took."""
    study = Study("chexpert", "p", "s", "train", (View("0"),), labels={"Class1": -1})
    drawn = Counter(tuple(draw_texts(study, 2, prompts["chexpert"], config(), rng)) for rng in by_epoch(study))
    said_of = [f"Class1 possible {k}." for k in range(4)]
    assert fits(drawn, {(a, b): 1 / 16 for a in said_of for b in said_of})


# draws do not depend on how they are made


def same(a, b):
    names = ("images", "order", "places", "keys")
    pairs = [(getattr(a, name), getattr(b, name)) for name in names]
    pairs += [*zip(a.tokens, b.tokens, strict=True), *zip(a.mask, b.mask, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def test_a_draw_depends_on_seed_epoch_and_study_alone(config, studies, prompts):
    run = config()
    train = of_split(studies)
    data, backwards = TrainingSet(train, prompts, run), TrainingSet(train[::-1], prompts, run)
    forward = [data[1, i] for i in range(len(train))]
    for i in reversed(range(len(train))):
        images, texts, place, key = backwards[1, len(train) - 1 - i][:4]
        assert texts == forward[i][1] and all(map(np.array_equal, images, forward[i][0]))
        assert place == len(train) - 1 - i and key == forward[i].key
    other_epoch = sum(data[2, i][1] == forward[i][1] for i in range(len(train)))
    other_seed = sum(TrainingSet(train, prompts, config(seed=8))[1, i][1] == forward[i][1] for i in range(len(train)))
    assert other_epoch < len(train) / 2 and other_seed < len(train) / 2
    keys = {draw.key for draw in forward} | {data[2, i].key for i in range(len(train))}
    keys |= {TrainingSet(train, prompts, config(seed=8))[1, i].key for i in range(len(train))}
    assert len(keys) == 3 * len(train)


def test_random_numbers_of_neighbouring_keys_have_nothing_in_common():
    drawn = np.array([generator(key).random(4) for key in range(4000)])
    assert np.array_equal(drawn[7], generator(7).random(4)) and np.unique(drawn).size == drawn.size
    for column in drawn.T:  # each alike over all keys
        assert chisquare(np.histogram(column, 20, (0, 1))[0]).pvalue > 0.001
    with_next = np.corrcoef(np.hstack([drawn[:-1], drawn[1:]]).T) - np.eye(8)
    assert np.abs(with_next).max() < 4.5 / np.sqrt(len(drawn))  # of 28 pairs of columns
    generator(2**63 - 1).integers(10)  # the largest key


def test_a_key_is_a_hash_of_purpose_and_ids():
    """By hand: what is drawn must stay what it was, or trainings could not be repeated."""
    study = Study("mimic_cxr", "p1", "s2", "train", (View("0"),))
    for purpose, name in (
        ((7, 3), b"7/3/mimic_cxr/p1\0s2"),
        ((7, "pair"), b"7/pair/mimic_cxr/p1\0s2"),
        ((), b"mimic_cxr/p1\0s2"),
    ):
        whole = int.from_bytes(blake2b(name, digest_size=8).digest(), "little")
        assert study_key(study, *purpose) == whole // 2


def test_a_sample_names_its_study_and_the_key_of_its_randomness(config, studies, prompts):
    train = of_split(studies)
    data = TrainingSet(train, prompts, config())
    keys = {}
    for epoch in (0, 1, 2):
        for place, study in enumerate(train):
            sample = data[epoch, place]
            assert sample.place == place and sample.key == study_key(study, 7, epoch)
            assert 0 <= sample.key < 2**63
            keys[epoch, place] = sample.key
    keys |= {("seed", i): study_key(s, 8, 0) for i, s in enumerate(train)}
    study = train[0]
    for name in ("dataset", "patient", "study"):
        keys[name] = study_key(replace(study, **{name: "other"}), 7, 0)
    shifted = replace(study, patient=study.patient + "/" + study.study[:1], study=study.study[1:])
    keys["shifted"] = study_key(shifted, 7, 0)
    assert len(set(keys.values())) == len(keys)
    assert study_key(replace(study, split="valid", views=(), findings=None), 7, 0) == keys[0, 0]  # of the name alone
    valid = ValidationSet(of_split(studies, "valid"), prompts, config())
    for i, study in enumerate(of_split(studies, "valid")):
        assert (valid[i].key, valid[i].place) == (study_key(study, 0, 0), i)  # the same every time


def drawn_by(data, world, workers, epochs):
    """What every rank is given: for each epoch, step and rank, the images and texts of each of its studies."""
    found = {}
    for epoch in range(epochs):
        for rank in range(world):
            for step, batch in enumerate(
                training_batches(data, collator(Letters(), data.config), epoch, rank, world, workers)
            ):
                texts, n = texts_of(batch), batch.studies
                found[epoch, step, rank] = [
                    (batch.images[i::n].numpy().tobytes(), tuple(texts[i::n])) for i in range(n)
                ]
    return found


def test_pairs_are_the_same_on_any_number_of_ranks_and_workers(config, studies, prompts):
    """37 studies in batches of 8, so that the second epoch begins with what the first one left."""
    data = TrainingSet(of_split(studies)[:37], prompts, config())
    alone = drawn_by(data, 1, 0, 2)
    assert len(alone) == 2 * 37 // 8 and len({pair for step in alone.values() for pair in step}) == 9 * 8
    truth = {}
    for epoch in range(2):
        for step, draws in enumerate(epoch_draws(37, 8, 7, epoch)):
            samples = [data[draw] for draw in draws]
            truth[epoch, step, 0] = [(np.stack(s.images).tobytes(), tuple(s.texts)) for s in samples]
    assert alone == truth
    for world, workers in ((1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2)):
        found = drawn_by(data, world, workers, 2)
        assert len(found) == world * len(alone)
        for (epoch, step, _), pairs in alone.items():
            for rank in range(world):
                assert found[epoch, step, rank] == pairs[rank::world]


def test_two_ranks_share_the_batches_of_one(config, studies, prompts):
    data = TrainingSet(of_split(studies), prompts, config())
    whole = list(training_batches(data, collator(Letters(), data.config), 0, 0, 1, 0))
    ranks = [list(training_batches(data, collator(Letters(), data.config), 0, rank, 2, 0)) for rank in (0, 1)]
    for one, zero, first in zip(whole, *ranks, strict=True):
        assert (one.studies, zero.studies, first.studies) == (8, 4, 4)
        for k in (0, 1):  # first and second samples
            wanted, text = one.images[8 * k :][:8], texts_of(one)[8 * k :][:8]
            assert torch.equal(wanted[0::2], zero.images[4 * k :][:4])
            assert torch.equal(wanted[1::2], first.images[4 * k :][:4])
            assert text[0::2] == texts_of(zero)[4 * k :][:4] and text[1::2] == texts_of(first)[4 * k :][:4]


def test_a_batch_holds_first_samples_before_second_ones(config, studies, prompts):
    data = TrainingSet(of_split(studies), prompts, config())
    order = epoch_draws(len(data), 8, 7, 0)
    for step, batch in zip(order, training_batches(data, collator(Letters(), data.config), 0, 0, 1, 0), strict=True):
        samples = [data[draw] for draw in step]
        assert batch.images.shape == (16, 32, 32) and batch.images.dtype == torch.uint8
        assert np.array_equal(batch.images, np.stack([s[0][k] for k in (0, 1) for s in samples]))
        assert texts_of(batch) == [s[1][k] for k in (0, 1) for s in samples]


@pytest.mark.parametrize("groups", [1, 3, 64])
def test_texts_are_padded_to_the_longest_of_their_group(config, studies, prompts, groups):
    data = TrainingSet(of_split(studies), prompts, config())
    drawn = [data[0, i] for i in range(8)]
    texts = [s.texts[k] for k in (0, 1) for s in drawn]
    batch = collate(drawn, Letters(), groups)
    assert texts_of(batch) == texts
    assert batch.places.tolist() == list(range(8)) and batch.keys.tolist() == [s.key for s in drawn]
    lengths = sorted(map(len, texts))
    assert len(batch.tokens) == min(groups, len(set(lengths))) and sum(map(len, batch.tokens)) == 16
    for tokens, mask in zip(batch.tokens, batch.mask, strict=True):
        own, lengths = lengths[: len(tokens)], lengths[len(tokens) :]
        assert tokens.shape == mask.shape == (len(own), own[-1])
        assert mask.sum(1).tolist() == own
        assert (mask.diff(dim=1) <= 0).all() and not tokens[mask == 0].any()


def test_texts_are_cut_where_the_fewest_tokens_are_computed():
    """Against every way to cut a few texts, and against even groups of as many as the paper's step has."""
    rng = np.random.default_rng(0)

    def tokens(lengths, cuts):
        return sum(len(part) * part[-1] for part in np.split(lengths, cuts))

    for _ in range(200):
        lengths, groups = np.sort(rng.integers(1, 12, rng.integers(1, 11))), int(rng.integers(1, 6))
        ways = [c for k in range(min(groups, len(lengths))) for c in combinations(range(1, len(lengths)), k)]
        cuts = length_groups(lengths, groups)
        assert len(cuts) < groups and tokens(lengths, cuts) == min(tokens(lengths, list(way)) for way in ways)
    lengths = np.sort(np.clip(np.exp(rng.normal(3.8, 0.7, 256)).astype(int), 4, 256))
    even = np.cumsum([len(part) for part in np.array_split(lengths, 4)])[:-1]
    assert tokens(lengths, length_groups(lengths, 4)) < 0.9 * tokens(lengths, even)


def test_only_what_the_loss_looks_at_is_drawn(config, studies, prompts):
    vanilla = config(loss={"mvs": False, "icl_weight": 0.0, "tcl_weight": 0.0})
    batch = next(
        training_batches(TrainingSet(of_split(studies), prompts, vanilla), collator(Letters(), vanilla), 0, 0, 1, 0)
    )
    assert (len(batch.images), len(texts_of(batch)), batch.studies) == (8, 8, 8)


# order of an epoch


@pytest.mark.parametrize(
    ("count", "batch"), [(48, 8), (50, 8), (8, 8), (9, 8), (15, 8), (16, 8), (17, 8), (23, 8), (3, 2), (1000, 128)]
)
def test_every_epoch_draws_every_study_once(count, batch):
    epochs = 9
    steps = [epoch_draws(count, batch, 5, epoch) for epoch in range(epochs)]
    for epoch in reversed(range(epochs)):  # an epoch needs no other one to have been asked for
        again = epoch_draws(count, batch, 5, epoch)
        assert np.array_equal(again, steps[epoch]) and again.shape[1:] == (batch, 2)
        assert len(again) == steps_before(count, batch, epoch + 1) - steps_before(count, batch, epoch)
        assert all(len(set(step[:, 1].tolist())) == batch for step in again)  # nobody is their own negative
        assert set(again[:, :, 0].ravel().tolist()) <= {epoch - 1, epoch}
        assert (again[1:, :, 0] == epoch).all()
    assert sum(map(len, steps)) == steps_before(count, batch, epochs) == epochs * count // batch
    drawn = [tuple(draw) for draw in np.concatenate(steps).reshape(-1, 2).tolist()]
    missing = {(e, i) for e in range(epochs) for i in range(count)} - set(drawn)
    assert len(drawn) == len(set(drawn)) and len(missing) == epochs * count % batch
    assert {epoch for epoch, _ in missing} <= {epochs - 1}  # the rest of the last epoch, less than a batch


def test_the_order_depends_on_seed_and_epoch():
    def order(seed, epoch):
        return epoch_draws(48, 48, seed, epoch)[0, :, 1].tolist()

    assert order(0, 0) != order(0, 1) != order(1, 1) and order(0, 0) != order(1, 0)
    assert order(3, 4) == order(3, 4)


def test_any_study_may_come_at_any_place():
    """With a remainder, too: places of one study over many epochs, in the stream of 10 studies in batches of 4."""
    places, second = Counter(), Counter()
    for epoch in range(0, 4000, 2):  # an even epoch of 10 begins with a whole batch: 2 batches, 2 studies are left
        own = [draw for draw in epoch_draws(10, 4, 1, epoch).reshape(-1, 2).tolist() if draw[0] == epoch]
        places.update(i for i, draw in enumerate(own) if draw[1] == 7)
        carried, *others = epoch_draws(10, 4, 1, epoch + 1).reshape(-1, 2).tolist()
        second[carried[1]] += 1
        assert len(own) == 8 and carried[0] == epoch and len(others) == 11
    places["left"] = 2000 - sum(places.values())
    assert chisquare([places[i] for i in range(8)] + [places["left"]], [200] * 8 + [400]).pvalue > 0.001
    assert chisquare([second[i] for i in range(10)]).pvalue > 0.001


def test_data_sets_are_mixed_in_proportion(studies):
    """An epoch holds each data set's studies once. Of a batch of 8 out of 40 with 24 reports the number of reports is
    hypergeometric: 24/40 of 8 on average, and no batch is made for a data set."""
    train = of_split(studies)
    reports = np.array([s.dataset == "mimic_cxr" for s in train])
    assert len(reports) == 40 and reports.sum() == 24
    first = Counter()
    for seed in range(4000):
        steps = epoch_draws(40, 8, seed, 0)
        first[int(reports[steps[0, :, 1]].sum())] += 1
        assert reports[steps[:, :, 1].ravel()].sum() == 24
    share = hypergeom(40, 24, 8).pmf(np.arange(9)) * 4000
    rare = share < 5
    counts = np.array([first[k] for k in range(9)])
    grouped = [[*x[~rare], x[rare].sum()] for x in (counts, share)]
    assert chisquare(*grouped).pvalue > 0.001
    assert sum(k * n for k, n in first.items()) / 4000 == pytest.approx(8 * 24 / 40, abs=0.06)


def test_a_batch_larger_than_the_corpus_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size: 65 .* only 64; lower it"):
        epoch_draws(64, 65, 0, 0)


# the shuffled control


@pytest.mark.parametrize("count", [2, 3, 10, 501])
def test_the_control_leaves_nobody_their_own_text(config, count):
    partner = shuffled(count, config(train={"shuffle_pairs": True}))
    assert sorted(partner.tolist()) == list(range(count))
    assert (partner != np.arange(count)).all()
    assert np.array_equal(partner, shuffled(count, config(train={"shuffle_pairs": True})))
    assert shuffled(count, config()).tolist() == list(range(count))


def test_the_control_mixes_within_and_across_data_sets(config, studies, prompts):
    train = of_split(studies)
    run = config(train={"shuffle_pairs": True}, augment=replace(QUIET, image=True))
    data, straight = TrainingSet(train, prompts, run), TrainingSet(train, prompts, config(augment=run.augment))
    crossed = Counter()
    for i in range(len(train)):
        own, other = train[i], train[int(data.texts_of[i])]
        assert own is not other
        crossed[own.dataset == other.dataset] += 1
        images, texts, *_ = data[0, i]
        assert all(map(np.array_equal, images, straight[0, i][0]))  # the pictures stay
        if other.labels:
            positive = {c for c, v in other.labels.items() if v == 1}
            assert all({c for c, word in said(text) if word == "present"} == positive for text in texts)
        else:
            assert set(texts) <= {other.findings, other.impression}
    assert min(crossed[True], crossed[False]) > 5


# validation


def validation_batches(data):
    parts = validation_parts(len(data), data.config.train.batch_size)
    return (collator(Letters(), data.config)([data[int(i)] for i in part]) for part in parts)


def test_validation_is_fixed(config, studies, prompts):
    for dataset in ("mimic_cxr", "chexpert", "chestxray14"):
        valid = of_split(studies, "valid", dataset)
        first, again = (list(validation_batches(ValidationSet(valid, prompts, config()))) for _ in range(2))
        other_seed = validation_batches(ValidationSet(valid, prompts, config(seed=99)))
        assert all(map(same, first, again)) and all(map(same, first, other_seed))
        assert sum(batch.studies for batch in first) == len(valid)


def test_validation_views_and_texts(config, studies, prompts):
    for study in of_split(studies, "valid"):
        images, texts, *_ = ValidationSet([study], prompts, config())[0]
        frontal = next(v for v in study.views if v.position in ("PA", "AP"))
        lateral = next((v for v in study.views if v.position == "LATERAL"), frontal)
        for image, view in zip(images, (frontal, lateral), strict=True):
            assert np.array_equal(image, evaluation_crop(load_view(view), 32))
        if study.labels:
            positive = [c for c in prompts["chexpert"].pools if study.labels.get(c) == 1]
            expected = " ".join(f"{c} present 0." for c in positive) or "Normal chest."
            assert texts == [expected, expected]
        else:
            assert texts == [study.findings, study.impression or study.findings]


def test_a_lone_last_validation_study_is_left_out(config, studies, prompts):
    valid = of_split(studies, "valid", "mimic_cxr")[:5]
    run = config(train={"batch_size": 2})
    assert [b.studies for b in validation_batches(ValidationSet(valid, prompts, run))] == [2, 2]


# the corpus


def test_a_study_with_nothing_to_say_is_left_out(config, studies, prompts, tmp_path):
    pools = prompts["chexpert"]
    view = (View("0"),)
    assert usable(Study("chexpert", "p", "s", "train", view, labels={"Class1": 0}), pools)
    assert not usable(Study("chexpert", "p", "s", "train", view), pools)
    assert not usable(Study("chexpert", "p", "s", "train", view, labels={"No Finding": 0}), pools)  # no sentence
    assert not usable(Study("chexpert", "p", "s", "train", (), labels={"Class1": 0}), pools)
    assert not usable(Study("mimic_cxr", "p", "s", "train", view), None)
    assert usable(Study("mimic_cxr", "p", "s", "train", view, impression="A."), None)

    silent = Study("chexpert", "p", "silent", "train", view)
    tested = Study("chexpert", "p", "tested", "test", view, labels={"Class1": 1})
    for dataset in ("mimic_cxr", "chexpert"):
        rows = [s for s in studies if s.dataset == dataset]
        write_studies(tmp_path / "index" / f"{dataset}.parquet", [silent, *rows, tested] if rows[0].labels else rows)
    pools.write_pools(tmp_path / "prompts" / "chexpert.json")
    run = config(datasets=("chexpert", "mimic_cxr"))
    counts = write_corpus(run, tmp_path / "index", tmp_path / "prompts", tmp_path / "out")
    assert counts == {
        **{"chexpert.silent": 1, "chexpert.train": 8, "chexpert.valid": 4},
        **{"mimic_cxr.silent": 0, "mimic_cxr.train": 24, "mimic_cxr.valid": 6},
    }
    kept = read_studies(tmp_path / "out" / "studies.parquet")
    assert [s.dataset for s in kept] == ["chexpert"] * 12 + ["mimic_cxr"] * 30
    assert kept == [s for d in run.datasets for s in studies if s.dataset == d]
    assert read_run_config(tmp_path / "out" / "run.json") == run


def test_a_study_without_words_in_the_corpus_is_an_error(config, prompts):
    study = Study("chexpert", "p", "s", "train", (View("0"),), labels={"No Finding": 0})
    with pytest.raises(ValueError, match="no prompt puts into words"):
        draw_texts(study, 2, prompts["chexpert"], config(), np.random.default_rng(0))
