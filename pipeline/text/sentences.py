"""A text's sentences, and the same in another order (paper section 4.2)."""

from __future__ import annotations

import re

from numpy.random import Generator

_AFTER_STOP = re.compile(r"(?<=[.!?])\s+")


def split_sentences(text: str) -> list[str]:
    """Split prose after full stops, question and exclamation marks that are followed by white space."""
    return [s for s in _AFTER_STOP.split(text.strip()) if s]


def swap_sentences(text: str, rng: Generator) -> str:
    """The same sentences in another order, any other with the same chance; a text of one sentence stays as it is."""
    parts = split_sentences(text)
    if len(set(parts)) < 2:
        return text
    while True:  # a swap that swaps nothing is no second text: half of the draws for two sentences, few for more
        swapped = [parts[i] for i in rng.permutation(len(parts)).tolist()]
        if swapped != parts:
            return " ".join(swapped)
