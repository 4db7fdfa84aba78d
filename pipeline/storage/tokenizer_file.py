"""tokenizer.json, looked at before the tokenizers library reads it: a text may not become many times as long."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.storage.torch_archive import Refused

LARGEST_TOKENIZER = 64 << 20  # bytes; of a vocabulary of 256,000 words 33 MB
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "padding", "truncation")
MOST_STEP_PARTS = 1000  # tables and lists' members of all steps; a BERT's have 20
LONGEST_TEXT = 1000  # characters of what a step puts in; published ones put in a sign or a token
LARGEST_LENGTH = 1 << 20  # token ids and lengths
MOST_GROWTH = 64  # of a text by all replacements together; published ones put a letter for a letter
DRAWN = ("dropout", "alpha", "nbest_size")  # of a model that is drawn from
LONGEST_LETTERS = 256  # bytes for which a compiled table may change a letter; the longest in Unicode takes 33


def check_tokenizer(table: Mapping[str, Any], path: Path) -> None:
    """Look at the steps of a tokenizer.json.

    Raises:
        Refused: together they could make a text longer without bound, or are no steps of any published tokenizer.
    """
    model = table.get("model")
    if isinstance(model, Mapping) and (drawn := [key for key in DRAWN if model.get(key)]):
        raise Refused(f"{path}: model.{drawn[0]}: it cuts words at random; set it to null")
    growth = 1
    for count, (key, value) in enumerate(_parts({step: table.get(step) for step in STEPS}), 1):
        if key == "precompiled_charsmap" and isinstance(value, str):
            most, size = LONGEST_LETTERS, _longest(value)
        elif isinstance(value, str):
            most, size = LONGEST_TEXT, len(value)
        else:
            most, size = LARGEST_LENGTH, int(min(value, 1 << 30)) if isinstance(value, int | float) else 0
        if isinstance(value, Mapping):
            growth *= _growth(value)
        named = _sequences(value) if key in ("single", "pair") else []
        growth *= 1 + MOST_GROWTH * (len(set(named)) < len(named))
        if size > most or growth > MOST_GROWTH or count > MOST_STEP_PARTS:
            raise Refused(f"{path}: its steps ({', '.join(STEPS[:3])}) could make a text many times as long; refused")


def _growth(step: Mapping[str, Any]) -> int:
    """How many times as long a step can make a text, for each time that it is there."""
    if "content" in step and "pattern" in step:  # it replaces, whether or not its type is said
        pattern, size = step["pattern"], len(str(step["content"]))
        literal = pattern.get("String") if isinstance(pattern, Mapping) else None
        return max(1, -(-size // len(literal))) if isinstance(literal, str) and literal else 1 + size  # else of nothing
    if isinstance(step.get("precompiled_charsmap"), str):
        return max(1, _longest(step["precompiled_charsmap"]) // 2)  # no letter that it changes has one byte alone
    return 2 if step.get("type") == "ByteLevel" else 1


def _parts(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value within a value of JSON, at any depth, with its key."""
    for name, part in value.items() if isinstance(value, Mapping) else ((key, each) for each in value):
        yield str(name), part
        if isinstance(part, Mapping | list):
            yield from _parts(part, str(name))


def _longest(table: str) -> int:
    """Bytes of the longest text in a table that sentencepiece compiled: a trie's size, it, texts that end in 0."""
    try:
        content = base64.b64decode(table, validate=True)
    except ValueError:
        return 0  # which the library refuses
    return max(map(len, content[4 + int.from_bytes(content[:4], "little") :].split(b"\0")))


def _sequences(template: Any) -> list[Any]:
    """The texts that a template names, such as A of "[CLS] A [SEP]"."""
    pieces = template if isinstance(template, list) else []
    named = [piece["Sequence"] for piece in pieces if isinstance(piece, Mapping) and "Sequence" in piece]
    return [piece.get("id") if isinstance(piece, Mapping) else None for piece in named]
