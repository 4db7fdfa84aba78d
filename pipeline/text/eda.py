"""EDA (Wei & Zou, 2019), the text augmentation of DeCLIP: one small change to the words of a text."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import yaml
from numpy.random import Generator

SYNONYMS = Path(__file__).with_name("synonyms.yaml")
DELETED = 0.1  # probability of each word


@cache
def synonyms() -> dict[str, list[str]]:
    """Word -> the others of its line in synonyms.yaml, all in small letters."""
    lines = yaml.safe_load(SYNONYMS.read_text(encoding="utf-8"))
    return {word: [other for other in line if other != word] for line in lines for word in line}


def eda_augmented(text: str, rng: Generator) -> str:
    """One of three, each with the same chance: a word becomes a synonym, two words change places, or each word goes
    with probability 0.1. Words are what white space parts.

    A text stays as it is where it draws the first and no word has a synonym, or one of the others and there is a single
    word. Where all words would go, one stays.
    """
    words = text.split()
    choice = rng.integers(3)
    if choice == 0:
        return " ".join(_synonym(words, rng))
    if len(words) < 2:
        return text
    if choice == 1:
        i, j = rng.choice(len(words), 2, replace=False)
        words[i], words[j] = words[j], words[i]
        return " ".join(words)
    kept = [word for word, gone in zip(words, rng.random(len(words)) < DELETED, strict=True) if not gone]
    return " ".join(kept or [words[rng.integers(len(words))]])


def _synonym(words: list[str], rng: Generator) -> list[str]:
    """The words with one of them, its punctuation and capital letter kept, in another word's place."""
    known = synonyms()
    parts = [re.fullmatch(r"(\W*)(.*?)(\W*)", word, re.DOTALL) for word in words]
    places = [i for i, part in enumerate(parts) if part and part[2].lower() in known]
    if not places:
        return words
    i = places[rng.integers(len(places))]
    before, word, after = parts[i].groups()  # type: ignore[union-attr]
    others = known[word.lower()]
    other = others[rng.integers(len(others))]
    if word[:1].isupper():
        other = other[:1].upper() + other[1:]
    return [*words[:i], f"{before}{other}{after}", *words[i + 1 :]]
