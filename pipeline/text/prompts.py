"""Labels -> sentences: the training prompts of label data sets (evaluation's: ``pipeline.evaluation.protocols``).

A label data set has no reports. Its captions are made of one sentence a class, drawn from templates radiologists wrote
(paper section 3.1; grammar in ``prompts.yaml``). The sentences of a data set are written out once, to
``data/prompts/file/<dataset>.json`` (an ablation's to ``ablation/``), and training draws its captions from that alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.records import hint, shown
from pipeline.config.yaml_file import YamlFileError, read_yaml
from pipeline.storage.atomic import write_text
from pipeline.study import NEGATIVE, POSITIVE, UNCERTAIN

NO_FINDING = "No Finding"
VALUES = {"positive": POSITIVE, "negative": NEGATIVE, "uncertain": UNCERTAIN}
PROMPT_CLASSES = (  # what a prompt file may describe: CheXpert's labels, then those that only ChestX-ray14 has
    NO_FINDING, "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
    "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
    "Infiltration", "Mass", "Nodule", "Emphysema", "Fibrosis", "Pleural Thickening", "Hernia",
)  # fmt: skip


# A file of a few kilobytes could ask for more sentences than any memory holds.
LONGEST = 10_000  # characters of a template
MOST_TEXT = 4_000_000  # characters of all sentences of one value of a class; the paper's largest has 20,000
DEEPEST = 20  # brackets in one another
PARTS = re.compile(r"[^\[\],]+|.", re.DOTALL)  # of a template


class PromptError(ValueError):
    """A prompt file that cannot be used; the message is one line that names the file, the class and the template."""


@dataclass(frozen=True)
class PromptSentences:
    """Sentences by class and value. The order of classes is that of validation captions. ``defaults``: value ->
    templates of classes without their own."""

    pools: Mapping[str, Mapping[int, tuple[str, ...]]]
    defaults: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def sentences(self, class_name: str, value: int) -> tuple[str, ...]:
        """All sentences that say ``class_name`` is positive (1), negative (0) or uncertain (-1).

        Empty where the file says that this value is passed over.

        Raises:
            PromptError: the class has no templates, or the value is none of 1, 0, -1.
        """
        if class_name not in self.pools:
            raise PromptError(f"class {class_name!r} has no prompt templates{hint(class_name, self.pools)}")
        if value not in VALUES.values():
            raise PromptError(f"class {class_name!r}: label value {value!r} is none of 1, 0, -1")
        return self.pools[class_name][value]

    def with_defaults(self, classes: Iterable[str]) -> PromptSentences:
        """Also with sentences of these classes, where they have none: the default templates with the class's name."""
        new = {
            name: {
                value: tuple(dict.fromkeys(text for template in templates for text in expand(template, name)))
                for value, templates in self.defaults.items()
            }
            for name in classes
            if name not in self.pools
        }
        return PromptSentences({**self.pools, **new}, self.defaults)

    def subset(self, classes: Iterable[str]) -> PromptSentences:
        """These classes and "No Finding", whose sentence validation needs, in this order of classes.

        Raises:
            PromptError: a class has no templates; every such class is named.
        """
        wanted = {*classes, NO_FINDING}
        if missing := sorted(wanted - self.pools.keys()):
            raise PromptError(f"no prompt templates for {', '.join(missing)}; add them to the file of prompts.file")
        return PromptSentences({name: pools for name, pools in self.pools.items() if name in wanted})

    def write_pools(self, path: Path) -> None:
        """Write every sentence as JSON: {class: {"1": [...], "0": [...], "-1": [...]}}."""
        pools = {name: {str(v): list(p[v]) for v in VALUES.values()} for name, p in self.pools.items()}
        write_text(path, json.dumps(pools, indent=1, ensure_ascii=False) + "\n")


def read_pools(path: Path) -> PromptSentences:
    """Inverse of ``Prompts.write_pools``.

    Raises:
        PromptError: the file is absent or not of that form.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return PromptSentences({name: {v: tuple(p[str(v)]) for v in VALUES.values()} for name, p in raw.items()})
    except FileNotFoundError:
        raise PromptError(f"{path}: not found; the prompts stage writes it (dvc repro prompts)") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PromptError(f"{path}: not a file of prompt sentences; dvc repro --force prompts writes it") from None


def expand(template: str, expression: str = "") -> list[str]:
    """All sentences of a template such as "[there is, ] no [visible, definite, ] {}.".

    Brackets are alternatives, in every combination, the last one varying fastest; "{}" becomes ``expression``. Spaces
    are tidied and the first letter becomes a capital; no other letter changes ("the SVC" stays).

    Raises:
        PromptError: a bracket without its partner, a brace that is not "{}", a blank outcome, or too many of them.
    """
    texts = _alternatives(template)
    if len(texts) * (len(template) + template.count("{}") * len(expression)) > MOST_TEXT:
        raise PromptError(f"{shown(template)}: {len(texts)} sentences of such a length are too many")
    sentences = [_tidy(text.replace("{}", expression)) for text in texts]
    return [text[0].upper() + text[1:] for text in sentences]


def load_templates(path: Path) -> PromptSentences:
    """Read a file of training templates (form and meaning are described at the top of ``prompts.yaml``).

    Raises:
        PromptError: one line naming file, class and template: unknown class or key, blank or unreadable template.
    """
    try:
        raw = _keys(_yaml(path), ("like", "default", "classes"), "the file")
        if "like" in raw:
            raw = _merged(path.parent / str(raw["like"]), raw)
        default = _keys(raw.get("default"), tuple(VALUES), "default")
        templates = {name: _texts(default.get(name), f"default.{name}") for name in VALUES}
        for name, texts in templates.items():
            for text in texts:
                if "{}" not in text:
                    raise PromptError(f"default.{name}: {shown(text)} does not hold {{}}, the place of the class")
        pools = {}
        for name, spec in _keys(raw.get("classes"), PROMPT_CLASSES, "classes").items():
            spec = _spec(spec, name)
            pools[name] = {VALUES[v]: _pool(spec, v, templates[v], f"classes.{name}") for v in VALUES}
        if not pools.get(NO_FINDING, {}).get(POSITIVE):
            raise PromptError(f"classes.{NO_FINDING}: needs a positive template, the caption of a normal study")
    except PromptError as error:
        raise PromptError(f"{path}: {error}") from None
    return PromptSentences(pools, {VALUES[name]: tuple(texts) for name, texts in templates.items()})


def caption(
    labels: Mapping[str, int], prompts: PromptSentences, rng: np.random.Generator, negatives: int | None = None
) -> str | None:
    """A caption for training: one sentence a class, drawn at random, joined in random order (paper section 3.1).

    Args:
        labels: class -> 1, 0 or -1; a class that is not mentioned says nothing. Their order does not matter.
        prompts: the sentences.
        rng: its state is all the randomness there is.
        negatives: how many negative classes to name, drawn again each time (ChestX-ray14: 3, section 4.1), all of them
            where there are fewer; None names every label as it is (CheXpert).

    Returns:
        The caption, or None where there is nothing to say: no label at all, or only values without sentences.

    Raises:
        PromptError: a label's class has no templates.
    """
    pools = {(name, value): prompts.sentences(name, value) for name, value in sorted(labels.items())}
    sayable = [(value, pool) for (_, value), pool in pools.items() if pool]
    if negatives is not None:
        absent = [i for i, (value, _) in enumerate(sayable) if value == NEGATIVE]
        named = set(rng.permutation(absent)[:negatives].tolist())
        sayable = [item for i, item in enumerate(sayable) if item[0] != NEGATIVE or i in named]
    drawn = [pool[rng.integers(len(pool))] for _, pool in sayable]
    return " ".join(drawn[i] for i in rng.permutation(len(drawn))) or None


def validation_caption(labels: Mapping[str, int], prompts: PromptSentences) -> str | None:
    """The caption of validation, always the same: first sentence of each positive class, in the order of ``prompts``.

    Returns:
        The caption; the "No Finding" sentence where no class is positive; None where the study has no label at all.

    Raises:
        PromptError: a label's class has no templates.
    """
    if not labels:
        return None
    for name, value in labels.items():
        prompts.sentences(name, value)
    positive = [name for name in prompts.pools if labels.get(name) == POSITIVE]
    pools = [prompts.sentences(name, POSITIVE) for name in positive or [NO_FINDING]]
    return " ".join(pool[0] for pool in pools if pool) or None


def _merged(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """A file that is like the one at ``path``: what it does not say of a class, or by default, is said there."""
    try:
        like = _keys(_yaml(path), ("default", "classes"), "the file")
        default = _keys(like.get("default"), tuple(VALUES), "default")
        classes = _keys(like.get("classes"), PROMPT_CLASSES, "classes")
    except PromptError as error:
        raise PromptError(f"like: {path}: {error}") from None
    theirs = {
        name: _spec(spec, name) for name, spec in _keys(own.get("classes", {}), PROMPT_CLASSES, "classes").items()
    }
    merged = {name: {**_spec(spec, name), **theirs.get(name, {})} for name, spec in classes.items()}
    merged |= {name: spec for name, spec in theirs.items() if name not in merged}
    return {"default": {**default, **_keys(own.get("default", {}), tuple(VALUES), "default")}, "classes": merged}


def _pool(spec: dict[str, Any], value: str, default: list[str], at: str) -> tuple[str, ...]:
    """All sentences of one value of a class, each once, in the order of expressions and templates."""
    own = _texts(spec.get(value, ["default"]), f"{at}.{value}")
    templates = [t for text in own for t in (default if text == "default" else [text])]
    expressions = spec.get("expressions")
    if isinstance(expressions, dict):
        expressions = _keys(expressions, tuple(VALUES), f"{at}.expressions").get(value)
    if expressions is not None:
        if not _texts(expressions, f"{at}.expressions"):
            raise PromptError(f"{at}.expressions: an empty list; leave the class out instead")
    elif any("{}" in template for template in templates):
        raise PromptError(f"{at}: needs expressions, the words for the class, for its {value} templates")
    try:
        words = [""] if expressions is None else _bounded(_tidy(w) for text in expressions for w in _alternatives(text))
        for template in templates:
            if not template.rstrip().endswith("."):
                raise PromptError(f"{shown(template)} does not end in a full stop")
        found: dict[str, None] = {}  # a template without {} says the same for every expression, which is kept once
        size = 0
        for word, template in product(words, templates):
            sentences = expand(template, word)
            size += sum(map(len, sentences))
            if size > MOST_TEXT:
                raise PromptError(f"the sentences have more than {MOST_TEXT:,} characters")
            found.update(dict.fromkeys(sentences))
        return tuple(found)
    except PromptError as error:
        raise PromptError(f"{at}.{value}: {error}") from None


def _bounded(texts: Iterable[str]) -> list[str]:
    """The texts, no more of them than ``MOST_TEXT`` characters hold."""
    found, size = [], 0
    for text in texts:
        found.append(text)
        size += len(text) + 1
        if size > MOST_TEXT:
            raise PromptError(f"the expressions have more than {MOST_TEXT:,} characters")
    return found


def _alternatives(template: str) -> list[str]:
    """The bracket grammar: "a [b, c] d" -> ["a b d", "a c d"]."""

    def fail(what: str) -> PromptError:
        return PromptError(f"{shown(template)}: {what}")

    def sequence(at: int, depth: int) -> tuple[list[str], int]:
        """Text and brackets from ``at`` to a comma or closing bracket (of ``depth`` that are open) or the end."""
        texts = [""]
        if depth > DEEPEST:
            raise fail(f"more than {DEEPEST} brackets in one another")
        while at < len(parts):
            part = parts[at]
            if part == "[":
                options: list[str] = []
                while part != "]":
                    more, at = sequence(at + 1, depth + 1)
                    if at == len(parts):
                        raise fail("a [ is not closed")
                    options += more
                    part = parts[at]
                if len(texts) * len(options) * len(template) > MOST_TEXT:
                    raise fail("too many alternatives")
                texts = [text + option for text in texts for option in options]
            elif depth and part in ",]":
                break
            elif part == "]":
                raise fail("a ] closes nothing")
            else:
                texts = [text + part for text in texts]
            at += 1
        return texts, at

    if len(template) > LONGEST:
        raise fail(f"longer than {LONGEST:,} characters")
    if any(brace in template.replace("{}", "") for brace in "{}"):
        raise fail("a brace is not {}")
    parts = PARTS.findall(template)
    texts, _ = sequence(0, 0)
    if not all(_tidy(text).strip(". ") for text in texts):
        raise fail("blank, or an alternative leaves it blank")
    return texts


def _tidy(text: str) -> str:
    """Single spaces, and none at the ends or before punctuation."""
    return " ".join(text.split()).replace(" .", ".").replace(" ,", ",")


def _yaml(path: Path) -> Any:
    try:
        return read_yaml(path)
    except FileNotFoundError:
        raise PromptError("not found") from None
    except YamlFileError as error:
        raise PromptError(f"{error}; a template with [ ] or {{}} must be in quotes") from None


def _keys(raw: Any, known: tuple[str, ...], at: str) -> dict[str, Any]:
    """``raw`` as a mapping whose keys are all in ``known``."""
    kind, listed = ("class", "names of classes") if at == "classes" else ("key", ", ".join(known))
    if not isinstance(raw, dict):
        raise PromptError(f"{at}: expected a mapping of {listed}")
    for key in raw:
        if key not in known:
            raise PromptError(f"{at}.{shown(key)[1:-1]}: unknown {kind}{hint(str(key), known)}; expected {listed}")
    return raw


def _spec(raw: Any, name: str) -> dict[str, Any]:
    """What a file says of a class."""
    return _keys(raw, ("expressions", *VALUES), f"classes.{name}")


def _texts(raw: Any, at: str) -> list[str]:
    """``raw`` as a list of texts, none blank."""
    if not isinstance(raw, list):
        raise PromptError(f"{at}: expected a list of texts")
    for text in raw:
        if not isinstance(text, str):
            raise PromptError(f"{at}: {shown(text)} is not text; put it in quotes")
        if not text.strip():
            raise PromptError(f"{at}: a blank text")
    return raw
