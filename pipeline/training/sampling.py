"""What one draw of a study is (paper section 3.1): its views, its texts, and the random numbers that decide them."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator
from numpy.random.bit_generator import ISeedSequence

from pipeline.config.run_config import RunConfig
from pipeline.study import Study, View
from pipeline.study_keys import hashed, study_key
from pipeline.text import eda
from pipeline.text.prompts import PromptSentences, caption, validation_caption
from pipeline.text.sentences import swap_sentences
from pipeline.text.translations import Translations


def draw_views(study: Study, count: int, rng: Generator) -> list[View]:
    """``count`` (1 or 2) views: of two distinct positions where the study has them, else two images, else one twice."""
    first = study.views[rng.integers(len(study.views))]
    if count == 1:
        return [first]
    others = [v for v in study.views if v.position != first.position] or [v for v in study.views if v is not first]
    return [first, others[rng.integers(len(others))] if others else first]


def draw_texts(
    study: Study,
    count: int,
    prompts: PromptSentences | None,
    config: RunConfig,
    rng: Generator,
    translations: Translations | None = None,
) -> list[str]:
    """``count`` (1 or 2) texts of a study.

    A report gives findings and impression in random order, without replacement. With ``augment.text`` a section that
    has a back-translation is replaced by it with probability 0.5, and then the sentences of either are swapped with
    probability 0.5. Where only one section exists, the second text is that section in the wording the first is not in
    (its sentences swapped with probability 0.5), or without a back-translation its sentences in another order.
    Labels give captions drawn independently from the prompts.

    With ``sampling.unit: image`` there is one text, and the second is an augmentation of it. It is the whole report,
    both sections in their order, and its back-translation that of both; or one caption, and its sentences swapped.

    With ``augment.text_method: eda`` the last text is changed by EDA, nothing else is, and there are no translations.
    """
    method, alone = config.augment.text and config.augment.text_method, config.sampling.unit == "image"
    if study.labels and prompts is not None:
        negatives = config.sampling.negatives if study.dataset in config.random_negatives else None
        drawn = [_said(caption(study.labels, prompts, rng, negatives), study) for _ in range(1 if alone else count)]
        if len(drawn) < count:
            drawn.append(swap_sentences(drawn[0], rng) if method == "swap" else drawn[0])
        return _last_by_eda(drawn, rng) if method == "eda" else drawn
    sections = [text for text in (study.findings, study.impression) if text]
    if method == "eda":
        sections = [" ".join(sections)] if alone else sections
        drawn = [sections[i] for i in rng.permutation(len(sections))[:count]]
        return _last_by_eda([*drawn, drawn[0]][:count], rng)
    again = [translations.get(text) if translations and config.augment.text else None for text in sections]
    if alone:
        again = [" ".join(filter(None, again))] if all(again) else [None]
        sections = [" ".join(sections)]
    order = rng.permutation(len(sections)).tolist()[:count]
    # Each section as (what is said, the same in other words). Without translations no random number is spent on them.
    said = [(sections[i], again[i]) for i in order]
    said = [(b, a) if b and rng.random() < 0.5 else (a, b) for a, b in said]
    picked = [text for text, _ in said]
    if config.augment.text:
        picked = [_maybe_swapped(text, rng) for text in picked]
    if len(picked) < count:
        other = said[0][1]
        if other:
            picked.append(_maybe_swapped(other, rng))
        else:
            picked.append(swap_sentences(picked[0], rng) if config.augment.text else picked[0])
    return picked


def _last_by_eda(texts: list[str], rng: Generator) -> list[str]:
    return [*texts[:-1], eda.eda_augmented(texts[-1], rng)]


def _maybe_swapped(text: str, rng: Generator) -> str:
    return swap_sentences(text, rng) if rng.random() < 0.5 else text


def speaks(study: Study) -> bool:
    """Whether a study has something to say; a lone image has not."""
    return bool(study.labels or study.findings or study.impression)


def validation_texts(study: Study, prompts: PromptSentences | None, config: RunConfig) -> list[str]:
    """Two fixed texts of a study, equal where there is only one."""
    if study.labels and prompts is not None:
        return [_said(validation_caption(study.labels, prompts), study)] * 2
    sections = [text for text in (study.findings, study.impression) if text]
    if config.sampling.unit == "image":
        sections = [" ".join(sections)]
    return [sections[0], sections[-1]]


def _said(text: str | None, study: Study) -> str:
    if text is None:  # ``corpus`` leaves such studies out
        raise ValueError(f"{study.dataset}: a study of the corpus has labels that no prompt puts into words")
    return text


class _Hashed(ISeedSequence):
    """NumPy's own way from a seed to a state takes longer than all that is drawn from it; a hash is as good."""

    def __init__(self, key: int) -> None:
        self.digest = blake2b(key.to_bytes(8, "little"), digest_size=32).digest()

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """As ``numpy.random.SeedSequence.generate_state``, of at most 32 bytes."""
        return np.frombuffer(self.digest, dtype, n_words)


def generator(key: int) -> Generator:
    """The random numbers of a draw, by its key (see ``study_key``)."""
    return Generator(PCG64(_Hashed(key)))  # type: ignore[arg-type]


def label_key(study: Study) -> int:
    """A number that is equal for two studies if, and only if, the same classes are positive in both and the same ones
    uncertain. A study where none is, as of a report, has a number of its own. From 0 to 2**63 - 1."""
    found = sorted((name, value) for name, value in study.labels.items() if value)
    return hashed(repr(found)) if found else study_key(study)
