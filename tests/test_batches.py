from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.augment import evaluation_image, sentences
from pipeline.batches import (
    TrainingSet,
    ValidationSet,
    draw_texts,
    draw_views,
    epoch_order,
    shuffled,
    training_batches,
    validation_batches,
)
from pipeline.corpus import gather, usable
from pipeline.params import Augment, read_run_config
from pipeline.shards import load_view
from pipeline.study import Study, View, read_studies, write_studies

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

    def __call__(self, texts):
        length = max(map(len, texts))
        mask = torch.tensor([[int(i < len(t)) for i in range(length)] for t in texts])
        return torch.tensor([[ord(c) for c in t.ljust(length, "\0")] for t in texts]), mask


def texts_of(batch):
    return ["".join(map(chr, row)).rstrip("\0") for row in batch.tokens.tolist()]


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
        assert sorted(map(sorted, map(sentences, drawn))) == sorted(
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
        assert first != second and sorted(sentences(first)) == sorted(sentences(second)) == sorted(sentences(text))
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
    words = [s.split() for s in sentences(text)]
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
            templates.update(sentences(text))
    assert len(templates) == 6 * 4 and min(templates.values()) > 140  # of 800 captions a quarter each


# draws do not depend on how they are made


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)


def test_a_draw_depends_on_seed_epoch_and_study_alone(config, studies, prompts):
    run = config()
    train = of_split(studies)
    data, backwards = TrainingSet(train, prompts, run), TrainingSet(train[::-1], prompts, run)
    forward = [data[1, i] for i in range(len(train))]
    for i in reversed(range(len(train))):
        images, texts = backwards[1, len(train) - 1 - i]
        assert texts == forward[i][1] and all(map(np.array_equal, images, forward[i][0]))
    other_epoch = sum(data[2, i][1] == forward[i][1] for i in range(len(train)))
    other_seed = sum(TrainingSet(train, prompts, config(seed=8))[1, i][1] == forward[i][1] for i in range(len(train)))
    assert other_epoch < len(train) / 2 and other_seed < len(train) / 2


def test_workers_change_nothing(config, studies, prompts):
    data = TrainingSet(of_split(studies), prompts, config())
    alone, helped = (list(training_batches(data, Letters(), 3, 0, 1, workers)) for workers in (0, 2))
    assert len(alone) == len(helped) == 5
    assert all(map(same, alone, helped))


def test_two_ranks_share_the_batches_of_one(config, studies, prompts):
    data = TrainingSet(of_split(studies), prompts, config())
    whole = list(training_batches(data, Letters(), 0, 0, 1, 0))
    ranks = [list(training_batches(data, Letters(), 0, rank, 2, 0)) for rank in (0, 1)]
    for one, zero, first in zip(whole, *ranks, strict=True):
        assert (one.studies, zero.studies, first.studies) == (8, 4, 4)
        for k in (0, 1):  # first and second samples
            wanted, text = one.images[8 * k :][:8], texts_of(one)[8 * k :][:8]
            assert torch.equal(wanted[0::2], zero.images[4 * k :][:4])
            assert torch.equal(wanted[1::2], first.images[4 * k :][:4])
            assert text[0::2] == texts_of(zero)[4 * k :][:4] and text[1::2] == texts_of(first)[4 * k :][:4]


def test_a_batch_holds_first_samples_before_second_ones(config, studies, prompts):
    data = TrainingSet(of_split(studies), prompts, config())
    order = epoch_order(len(data), 8, 7, 0)
    for step, batch in zip(order, training_batches(data, Letters(), 0, 0, 1, 0), strict=True):
        samples = [data[0, int(i)] for i in step]
        assert batch.images.shape == (16, 32, 32) and batch.images.dtype == torch.uint8
        assert np.array_equal(batch.images, np.stack([s[0][k] for k in (0, 1) for s in samples]))
        assert texts_of(batch) == [s[1][k] for k in (0, 1) for s in samples]


def test_only_what_the_loss_looks_at_is_drawn(config, studies, prompts):
    vanilla = config(loss={"mvs": False, "icl_weight": 0.0, "tcl_weight": 0.0})
    batch = next(training_batches(TrainingSet(of_split(studies), prompts, vanilla), Letters(), 0, 0, 1, 0))
    assert (len(batch.images), len(batch.tokens), batch.studies) == (8, 8, 8)


# order of an epoch


def test_an_epoch_sees_each_study_once():
    steps = epoch_order(48, 8, 0, 0)
    assert [len(step) for step in steps] == [8] * 6
    assert sorted(np.concatenate(steps).tolist()) == list(range(48))
    seen = Counter()
    for epoch in range(60):
        steps = epoch_order(50, 8, 0, epoch)
        drawn = np.concatenate(steps).tolist()
        assert len(drawn) == len(set(drawn)) == 48
        seen.update(drawn)
    assert len(seen) == 50 and min(seen.values()) >= 50  # the two left out change from epoch to epoch
    assert not np.array_equal(epoch_order(48, 48, 0, 0), epoch_order(48, 48, 0, 1))
    assert not np.array_equal(epoch_order(48, 48, 0, 0), epoch_order(48, 48, 1, 0))
    assert np.array_equal(epoch_order(48, 48, 3, 4), epoch_order(48, 48, 3, 4))


def test_a_batch_larger_than_the_corpus_is_refused():
    with pytest.raises(ValueError, match=r"train\.batch_size: 65 .* only 64; lower it"):
        epoch_order(64, 65, 0, 0)


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
        images, texts = data[0, i]
        assert all(map(np.array_equal, images, straight[0, i][0]))  # the pictures stay
        if other.labels:
            positive = {c for c, v in other.labels.items() if v == 1}
            assert all({c for c, word in said(text) if word == "present"} == positive for text in texts)
        else:
            assert set(texts) <= {other.findings, other.impression}
    assert min(crossed[True], crossed[False]) > 5


# validation


def test_validation_is_fixed(config, studies, prompts):
    for dataset in ("mimic_cxr", "chexpert", "chestxray14"):
        valid = of_split(studies, "valid", dataset)
        first, again = (list(validation_batches(ValidationSet(valid, prompts, config()), Letters())) for _ in range(2))
        other_seed = validation_batches(ValidationSet(valid, prompts, config(seed=99)), Letters())
        assert all(map(same, first, again)) and all(map(same, first, other_seed))
        assert sum(batch.studies for batch in first) == len(valid)


def test_validation_views_and_texts(config, studies, prompts):
    for study in of_split(studies, "valid"):
        images, texts = ValidationSet([study], prompts, config())[0]
        frontal = next(v for v in study.views if v.position in ("PA", "AP"))
        lateral = next((v for v in study.views if v.position == "LATERAL"), frontal)
        for image, view in zip(images, (frontal, lateral), strict=True):
            assert np.array_equal(image, evaluation_image(load_view(view), 32))
        if study.labels:
            positive = [c for c in prompts["chexpert"].pools if study.labels.get(c) == 1]
            expected = " ".join(f"{c} present 0." for c in positive) or "Normal chest."
            assert texts == [expected, expected]
        else:
            assert texts == [study.findings, study.impression or study.findings]


def test_a_lone_last_validation_study_is_left_out(config, studies, prompts):
    valid = of_split(studies, "valid", "mimic_cxr")[:5]
    run = config(train={"batch_size": 2})
    assert [b.studies for b in validation_batches(ValidationSet(valid, prompts, run), Letters())] == [2, 2]


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
    counts = gather(run, tmp_path / "index", tmp_path / "prompts", tmp_path / "out")
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
