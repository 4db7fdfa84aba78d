"""Evaluation protocols: which prompts are used, how they become scores, what is measured, and which texts are searched;
read from YAML files.

``pipeline/evaluation/protocols/<name>.yaml`` are those of the paper and of other projects (docs/protocols.md); a user's
own is named by its path. Prompts are used letter for letter.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import field
from itertools import product
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from pipeline.config.records import NAME, RECORD, Count, Flag, ParamsError, hint, read_record, shown
from pipeline.config.yaml_file import YamlFileError, read_yaml
from pipeline.datasets import Table, tested, used_for, with_own
from pipeline.text import prompts as templates

FOLDER = Path(__file__).parent / "protocols"
WAYS = ("positive", "grid", "lists", "file", "as_in")
Text = Literal["findings", "impression", "labels"]


class ProtocolError(ValueError):
    """A protocol that cannot be used; the message is one line that names the file and the key."""


@dataclass(frozen=True, config=RECORD)
class PromptSample:
    """So many prompts of each class, drawn without replacement; 0 = all, as where a class has no more."""

    count: Count = 0
    seed: Count = 0


@dataclass(frozen=True, config=RECORD)
class PromptRule:
    """Where a test set's prompts come from: exactly one of ``WAYS``.

    ``positive`` and ``negative``: templates, {} being the class, for each of ``classes``. ``grid``: class -> lists of
    terms, each combination of which, joined by spaces, is a prompt. ``lists``: class -> prompts. ``file``: a file of
    training templates (as ``pipeline/text/prompts.yaml``; relative to the protocol), whose positive sentences of
    ``classes`` are the prompts. ``as_in``: "<protocol>/<test set>", the prompts of that one.
    """

    classes: tuple[str, ...] = ()
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    grid: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)
    file: str = ""
    as_in: str = ""
    sample: PromptSample = field(default_factory=PromptSample)


@dataclass(frozen=True, config=RECORD)
class TestSet:
    """One test set as a protocol's file writes it.

    ``aggregate``: a class's cosine is the mean or the largest over its prompts, or that with the normalised mean of
    their embeddings. ``local``: a prompt's cosine is first averaged with the local score where the model has one.
    ``z_score``: a class's values are made mean 0 and deviation 1 over the test set. ``score``: the cosine itself, or
    positive and negative cosine as a difference or through a softmax without a scale. ``metric``: macro AUC over the
    classes, or accuracy of the class with the largest score.
    """

    dataset: str
    prompts: PromptRule
    aggregate: Literal["mean", "max", "embedding"]
    score: Literal["difference", "softmax", "cosine"]
    metric: Literal["auc", "accuracy"]
    split: Literal["test"] = "test"  # only test images are embedded
    local: Flag = False
    z_score: Flag = False


@dataclass(frozen=True, config=RECORD)
class RetrievalSet:
    """One retrieval set as a protocol's file writes it.

    ``text``: sections of a report, or ``labels``, the names of the positive classes. The longest represents its study;
    of equally long ones the one named first does; a study without any takes no part. ``candidates``: the distinct texts
    of all studies that take part. ``studies``: those with a frontal view, which is the query.
    """

    dataset: str
    text: tuple[Text, ...]
    candidates: Literal["distinct"]
    studies: Literal["frontal"]
    split: Literal["test"] = "test"  # only test images are embedded


@dataclass(frozen=True, config=RECORD)
class _File:
    test_sets: dict[str, TestSet]
    retrieval: dict[str, RetrievalSet] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class Task:
    """A test set with its prompts written out: class -> prompts, in order, repeated ones included.

    ``negative`` is empty where the score is the cosine itself.
    """

    name: str
    rule: TestSet
    positive: dict[str, list[str]]
    negative: dict[str, list[str]]


@dataclass(frozen=True, config=RECORD)
class Protocol:
    """``name`` is its file's, without ``.yaml``; ``tasks`` and ``retrieval`` (name -> set) in the order of the file."""

    name: str
    tasks: dict[str, Task]
    retrieval: dict[str, RetrievalSet] = field(default_factory=dict)


def load_protocol(name: str, own: Table | None = None) -> Protocol:
    """Read a protocol: one of ``FOLDER`` by its name, or any file by its path (it holds a "/" or ends in ".yaml").

    Args:
        own: the user's own data sets, of which it may have test sets, too.

    Raises:
        ProtocolError: one line that names the file, the key, and what is wrong with it.
    """
    path = _path(name)
    if not NAME.fullmatch(path.stem):
        raise ProtocolError(f"{path}: a protocol's name is letters, digits and _, a letter first; rename the file")
    tasks, size = {}, 0
    found = _read(path)
    for key, rule in found.test_sets.items():
        if not NAME.fullmatch(key):
            raise ProtocolError(f"{path}: test_sets.{key}: a test set's name is letters, digits and _, a letter first")
        try:
            _known(rule.dataset, own or {})
            positive, negative = _sides(rule.prompts, path)
            _check(rule, positive, negative)
        except (ParamsError, ProtocolError, templates.PromptError) as error:
            raise ProtocolError(f"{path}: test_sets.{key}.{error}") from None
        size += sum(len(text) for side in (positive, negative) for texts in side.values() for text in texts)
        if size > templates.MOST_TEXT:
            raise ProtocolError(
                f"{path}: its prompts have more than {templates.MOST_TEXT:,} characters; leave some out"
            )
        tasks[key] = Task(key, rule, positive, negative)
    _check_retrieval(found.retrieval, path, own or {})
    return Protocol(path.stem, tasks, found.retrieval)


def first_protocol(names: Sequence[str], own: Table) -> Protocol:
    """What the tables show; raises as ``load_protocols``."""
    return load_protocols(names, own)[0]


def load_protocols(names: Sequence[str], own: Table | None = None) -> list[Protocol]:
    """The protocols of ``evaluate.protocols``; the first is what the tables show. It has a default test set, too, of
    each data set of the user's own that no protocol tests: the cosine with ``{class}`` less that with ``no {class}``,
    and the search for each report.

    Raises:
        ProtocolError: one cannot be used, or two have one name.
    """
    found = [load_protocol(name, own) for name in names]
    for i, protocol in enumerate(found):
        if protocol.name in {p.name for p in found[:i]}:
            raise ProtocolError(f"evaluate.protocols: two are named {protocol.name}; rename a file")
    return [_with_defaults(found, own or {}), *found[1:]]


def _with_defaults(found: Sequence[Protocol], own: Table) -> Protocol:
    """The first protocol, with a test set and a retrieval set of each of the user's own data sets that has none."""
    first = found[0]
    measured = {task.rule.dataset for protocol in found for task in protocol.tasks.values()}
    searched = {rule.dataset for rule in first.retrieval.values()}
    tasks, retrieval = dict(first.tasks), dict(first.retrieval)
    for name in used_for("own_classification", own):
        if name not in measured:
            rule = PromptRule(own[name].classes, positive=("{}",), negative=("no {}",))
            sides = _filled(rule, "positive"), _filled(rule, "negative")
            tasks[name] = Task(name, TestSet(name, rule, "mean", "difference", "auc"), *sides)
    for name in used_for("retrieval", own):
        if name not in searched:
            text: tuple[Text, ...] = ("labels",) if own[name].captioned else ("findings", "impression")
            retrieval[name] = RetrievalSet(name, text, "distinct", "frontal")
    return Protocol(first.name, tasks, retrieval)


def prompt_texts(names: Sequence[str], own: Table | None = None) -> list[str]:
    """All distinct prompts of these protocols, in order of first appearance; what every model embeds."""
    tasks = [task for protocol in load_protocols(names, own) for task in protocol.tasks.values()]
    sides = [side for task in tasks for side in (task.positive, task.negative)]
    return list(dict.fromkeys(text for side in sides for texts in side.values() for text in texts))


def classes_of(protocol: Protocol, dataset: str) -> list[str]:
    """The classes whose AUC a protocol measures on a data set; what a probe on it learns.

    Raises:
        ProtocolError: the protocol measures no AUC there.
    """
    for task in protocol.tasks.values():
        if task.rule.dataset == dataset and task.rule.metric == "auc":
            return list(task.positive)
    raise ProtocolError(f"evaluate.protocols: {protocol.name}, the first, measures no AUC on {dataset}")


def retrieval_sets(protocol: Protocol, sources: Collection[str]) -> dict[str, RetrievalSet]:
    """The retrieval sets of a protocol by name.

    Raises:
        ProtocolError: it has none, although a data set among ``sources`` has reports.
    """
    if not protocol.retrieval and (there := [d for d in used_for("retrieval") if d in sources]):
        raise ProtocolError(
            f"evaluate.protocols: {protocol.name}, the first, has no retrieval sets, and {', '.join(there)} could be "
            "searched; give it a key retrieval (docs/protocols.md)"
        )
    return protocol.retrieval


def measuring(names: Sequence[str], dataset: str, own: Table | None = None) -> Protocol:
    """The first of these protocols that measures an AUC on a data set.

    Raises:
        ProtocolError: none does, or one cannot be used.
    """
    for protocol in load_protocols(names, own):
        if any(t.rule.dataset == dataset and t.rule.metric == "auc" for t in protocol.tasks.values()):
            return protocol
    raise ProtocolError(f"evaluate.protocols: none measures an AUC on {dataset}; add the protocol chestxray14")


def probed(names: Sequence[str], datasets: Iterable[str], own: Table) -> Protocol:
    """What a probe learns: of each data set the test set of the first protocol that measures an AUC on it.

    Raises:
        ProtocolError: of one none does, or a protocol cannot be used.
    """
    found: dict[str, Task] = {}
    for dataset in datasets:
        protocol = measuring(names, dataset, own)
        task = next(t for t in protocol.tasks.values() if (t.rule.dataset, t.rule.metric) == (dataset, "auc"))
        found[f"{protocol.name}/{task.name}"] = task
    return Protocol("probed", found)


def _path(name: str) -> Path:
    if "/" in name or name.endswith(".yaml"):
        return Path(name)
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise ProtocolError(
            f"evaluate.protocols: {shown(name)} is none of {', '.join(known)}{hint(name, known)}, nor a path of a "
            ".yaml file"
        )
    return path


def _read(path: Path) -> _File:
    try:
        return read_record(_File, read_yaml(path))
    except FileNotFoundError:
        raise ProtocolError(f"{path}: not found; evaluate.protocols names it") from None
    except YamlFileError as error:
        raise ProtocolError(f"{path}: {error}; a prompt with {{}} must be in quotes") from None
    except ParamsError as error:
        raise ProtocolError("\n".join(f"{path}: {line}" for line in error.lines)) from None


def _known(dataset: str, own: Table) -> None:
    if dataset not in (known := tested(with_own(own))):
        raise ProtocolError(
            f"dataset: {shown(dataset)} is no test set; known are {', '.join(known)}{hint(dataset, known)}"
        )


def _check_retrieval(found: dict[str, RetrievalSet], path: Path, own: Table) -> None:
    """Raises ``ProtocolError`` where a retrieval set cannot be used."""
    taken: dict[str, str] = {}
    for key, rule in found.items():
        at = f"{path}: retrieval.{key}"
        if not NAME.fullmatch(key):
            raise ProtocolError(f"{at}: a retrieval set's name is letters, digits and _, a letter first")
        if rule.dataset not in (known := used_for("retrieval", with_own(own))):
            close = hint(rule.dataset, known)
            raise ProtocolError(f"{at}.dataset: {shown(rule.dataset)} is none with reports: {', '.join(known)}{close}")
        if rule.dataset in taken:
            raise ProtocolError(f"{at}.dataset: {rule.dataset} is searched by {taken[rule.dataset]} already")
        if not rule.text or len(set(rule.text)) < len(rule.text):
            raise ProtocolError(f"{at}.text: expected one section or more, each once")
        taken[rule.dataset] = key


def _sides(spec: PromptRule, path: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Positive and negative prompts by class, sampled."""
    ways = [way for way in WAYS if getattr(spec, way)]
    if len(ways) != 1:
        raise ProtocolError(f"prompts: needs one of {', '.join(WAYS)}, has {' and '.join(ways) or 'none'}")
    if (spec.classes != ()) != (ways[0] in ("positive", "file")):
        what = "missing" if not spec.classes else f"not to be given beside {ways[0]}"
        raise ProtocolError(f"prompts.classes: {what}")
    if len(set(spec.classes)) != len(spec.classes):
        raise ProtocolError("prompts.classes: a class is named twice")
    if spec.negative and not spec.positive:
        raise ProtocolError(f"prompts.negative: not to be given beside {ways[0]}")
    if spec.negative and spec.sample.count:
        raise ProtocolError("prompts.sample: not to be given beside negative prompts")
    negative: dict[str, list[str]] = {}
    if spec.positive:
        positive, negative = _filled(spec, "positive"), _filled(spec, "negative")
    elif spec.grid:
        if sum(map(_size, spec.grid.values())) > templates.MOST_TEXT:
            raise ProtocolError("prompts.grid: too many combinations; name fewer terms")
        positive = {name: _combined(name, lists) for name, lists in spec.grid.items()}
    elif spec.lists:
        positive = {name: list(texts) for name, texts in spec.lists.items()}
    elif spec.file:
        pools = templates.load_templates(path.parent / spec.file)
        positive = {name: list(pools.sentences(name, templates.VALUES["positive"])) for name in spec.classes}
    else:
        positive, negative = _of_another(spec.as_in)
    for name, texts in positive.items():
        if not texts or not all(text.strip() for text in texts):
            raise ProtocolError(f"prompts: {name} has {'a blank prompt' if texts else 'no prompt'}")
    return {name: _drawn(name, texts, spec.sample) for name, texts in positive.items()}, negative


def _of_another(reference: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    name, slash, key = reference.rpartition("/")
    if not slash:
        raise ProtocolError(f"prompts.as_in: {shown(reference)} is not <protocol>/<test set>")
    path = _path(name)
    others = _read(path).test_sets
    if key not in others:
        raise ProtocolError(f"prompts.as_in: {path} has no test set {shown(key)}{hint(key, others)}")
    if others[key].prompts.as_in:
        raise ProtocolError(f"prompts.as_in: {reference} itself refers to {others[key].prompts.as_in}; name that")
    return _sides(others[key].prompts, path)


def _filled(spec: PromptRule, side: Literal["positive", "negative"]) -> dict[str, list[str]]:
    """The templates of one side with each class put in; {} where the side has none."""
    found: tuple[str, ...] = getattr(spec, side)
    for text in found:
        if any(brace in text.replace("{}", "") for brace in "{}"):
            raise ProtocolError(f"prompts.{side}: {shown(text)}: a brace is not {{}}, the place of the class")
        if not text.strip():
            raise ProtocolError(f"prompts.{side}: a blank prompt")
        if "{}" not in text and len(spec.classes) > 1:
            raise ProtocolError(
                f"prompts.{side}: {shown(text)} is the same for every class; put {{}} where the class goes"
            )
    size = sum(len(text) * len(spec.classes) + text.count("{}") * sum(map(len, spec.classes)) for text in found)
    if size > templates.MOST_TEXT:
        raise ProtocolError(f"prompts.{side}: more than {templates.MOST_TEXT:,} characters once classes are put in")
    return {name: [text.replace("{}", name) for text in found] for name in spec.classes} if found else {}


def _combined(name: str, lists: dict[str, tuple[str, ...]]) -> list[str]:
    """Every combination of a class's lists, the last varying fastest; repeated terms count each time."""
    combinations = [" ".join(filter(None, terms)) for terms in product(*lists.values())] if lists else []
    if not combinations:
        raise ProtocolError(f"prompts.grid.{name}: expected lists of terms, none of them empty")
    return combinations


def _size(lists: dict[str, tuple[str, ...]]) -> int:
    """Characters of all combinations of a class's lists, at most."""
    return math.prod(map(len, lists.values())) * sum(sum(map(len, terms)) + len(terms) for terms in lists.values())


def _drawn(name: str, texts: list[str], sample: PromptSample) -> list[str]:
    """A seeded draw without replacement, in the order of the list; each class has its own stream."""
    if not sample.count or sample.count >= len(texts):
        return texts
    rng = np.random.default_rng([sample.seed, zlib.crc32(name.encode())])
    return [texts[i] for i in np.sort(rng.permutation(len(texts))[: sample.count])]


def _check(rule: TestSet, positive: dict[str, list[str]], negative: dict[str, list[str]]) -> None:
    """What types alone cannot say."""
    if bool(negative) != (rule.score != "cosine"):
        has = "has" if negative else "has no"
        raise ProtocolError(f"score: {rule.score}, but the test set {has} negative prompts")
    if rule.local and rule.aggregate == "embedding":
        raise ProtocolError("local: a local score is one prompt's; aggregate it by mean or max")
    if rule.metric == "accuracy" and len(positive) < 2:
        raise ProtocolError("metric: accuracy needs two classes or more")
