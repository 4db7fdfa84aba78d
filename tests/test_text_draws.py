"""How training draws from reports and their back-translations."""

import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.study import Study, View
from pipeline.text.sentences import split_sentences
from pipeline.text.translations import TRANSLATIONS_FILE, Translations, text_hash
from pipeline.training import loop
from pipeline.training.batches import TrainingSet
from pipeline.training.sampling import draw_texts

MANY = 4000
FINDINGS, IMPRESSION = "One a. Two b. Three c.", "Four d. Five e."
AGAIN = {FINDINGS: "First a. Second b. Third c.", IMPRESSION: "Fourth d. Fifth e."}


def report(findings=FINDINGS, impression=IMPRESSION):
    return Study("mimic_cxr", "p", "s", "train", (View("0"),), findings, impression)


def known(said):
    hashes = pa.array([text_hash(text) for text in said], pa.uint64())
    return Translations(pa.table({"hash": hashes, "translation": pa.array(said.values(), pa.string())}))


def draws(study, count, config, said):
    return [draw_texts(study, count, None, config, np.random.default_rng([5, k]), known(said)) for k in range(MANY)]


def wording(text):
    """(section, whether in other words, whether its sentences are swapped) of a text."""
    for section, again in AGAIN.items():
        for other, whole in enumerate((section, again)):
            if sorted(split_sentences(text)) == sorted(split_sentences(whole)):
                return section, bool(other), text != whole
    raise AssertionError(text)


def share(found):
    return sum(found) / MANY


def test_without_translations_a_draw_is_what_it_was_before_there_were_any(config):
    """The number was computed by the sampler as it stood before back-translation."""
    seen = 0
    for study in (report(), report(impression=None), report(findings=None), report("Single.", None)):
        for run in (config(), config(augment={"text": False}), config(sampling={"unit": "image"})):
            for count in (1, 2):
                for seed in range(50):
                    for translations in (None, known({"A text of another study.": "Words."})):
                        rng = np.random.default_rng([5, seed])
                        drawn = draw_texts(study, count, None, run, rng, translations), rng.integers(1000)
                    seen = zlib.crc32(repr(drawn).encode(), seen)
    assert seen == 1442875399


def test_each_of_two_sections_is_in_other_words_with_probability_one_half(config):
    drawn = [[wording(text) for text in pair] for pair in draws(report(), 2, config(), AGAIN)]
    assert all({section for section, _, _ in pair} == set(AGAIN) for pair in drawn)
    for k in (0, 1):
        assert share(pair[k][0] == FINDINGS for pair in drawn) == pytest.approx(0.5, abs=0.03)
        combined = Counter(pair[k][1:] for pair in drawn)  # words and order of sentences are drawn apart
        assert all(combined[w, s] / MANY == pytest.approx(0.25, abs=0.03) for w in (True, False) for s in (True, False))
    both = Counter((pair[0][1], pair[1][1]) for pair in drawn)
    assert all(n / MANY == pytest.approx(0.25, abs=0.03) for n in both.values()) and len(both) == 4
    single = [wording(text) for (text,) in draws(report(), 1, config(), AGAIN)]
    assert share(again for _, again, _ in single) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("only", [{"findings": None}, {"impression": None}])
def test_a_single_section_comes_in_both_wordings(config, only):
    drawn = [[wording(text) for text in pair] for pair in draws(replace(report(), **only), 2, config(), AGAIN)]
    assert all(first[1] != second[1] for first, second in drawn)
    assert share(first[1] for first, _ in drawn) == pytest.approx(0.5, abs=0.03)
    for k in (0, 1):
        assert share(pair[k][2] for pair in drawn) == pytest.approx(0.5, abs=0.03)


def test_a_single_sentence_gets_a_second_text_at_last(config):
    pairs = draws(report("No effusion.", None), 2, config(), {"No effusion.": "There is no effusion."})
    assert {tuple(pair) for pair in pairs} == {
        ("No effusion.", "There is no effusion."),
        ("There is no effusion.", "No effusion."),
    }


def test_a_section_without_a_translation_keeps_its_words(config):
    drawn = [
        dict(wording(text)[:2] for text in pair) for pair in draws(report(), 2, config(), {FINDINGS: AGAIN[FINDINGS]})
    ]
    assert not any(pair[IMPRESSION] for pair in drawn)
    assert share(pair[FINDINGS] for pair in drawn) == pytest.approx(0.5, abs=0.03)


def test_without_text_augmentation_no_translation_is_drawn(config):
    for pair in draws(report(), 2, config(augment={"text": False}), AGAIN)[:200]:
        assert sorted(pair) == sorted(AGAIN)


def test_unit_image_says_the_whole_report_again_or_not_at_all(config):
    run = config(sampling={"unit": "image"})
    whole, again = f"{FINDINGS} {IMPRESSION}", " ".join(AGAIN.values())
    drawn = [sorted(split_sentences(text)) for (text,) in draws(report(), 1, run, AGAIN)]
    assert all(text in (sorted(split_sentences(whole)), sorted(split_sentences(again))) for text in drawn)
    assert share(text == sorted(split_sentences(again)) for text in drawn) == pytest.approx(0.5, abs=0.03)
    half = draws(report(), 1, run, {FINDINGS: AGAIN[FINDINGS]})
    assert all(sorted(split_sentences(text)) == sorted(split_sentences(whole)) for (text,) in half)


def test_training_draws_from_the_translations_it_is_given(config, studies, prompts):
    train = [s for s in studies if s.split == "train"]
    said = {text: f"Again {text}" for s in train for text in (s.findings, s.impression) if text}
    run = config(train={"shuffle_pairs": True})
    with_words, without = TrainingSet(train, prompts, run, known(said)), TrainingSet(train, prompts, run)
    shares = Counter()
    for epoch in range(10):
        for i, other in enumerate(with_words.texts_of):
            (images, texts), (plain_images, plain) = with_words[epoch, i][:2], without[epoch, i][:2]
            assert all(map(np.array_equal, images, plain_images))
            if train[other].labels:
                assert texts == plain  # captions are drawn anew anyway
            else:
                shares.update("Again" in text for text in texts)
    assert shares[True] / shares.total() == pytest.approx(0.5, abs=0.07)


class Reached(Exception):
    pass


def test_training_reads_the_translations_of_its_corpus(config, corpus, tmp_path, monkeypatch):
    folder = corpus(config(datasets=("mimic_cxr",)))
    known(AGAIN).write(folder / TRANSLATIONS_FILE)

    def spy(studies, prompts, run, translations):
        raise Reached({text: translations.get(text) for text in AGAIN})

    monkeypatch.setattr(loop, "TrainingSet", spy)
    threads = torch.get_num_threads()
    try:
        with pytest.raises(Reached) as reached:
            loop.train_run(
                folder, tmp_path / "model", tmp_path / "history.csv", tmp_path / "work", lambda row, epoch: None
            )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert reached.value.args == (AGAIN,)
