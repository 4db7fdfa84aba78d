"""Zero-shot classification: embeddings of test images and prompts -> AUC or accuracy, as protocols say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.params import Bootstrap
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MetricKey, of_clean
from pipeline.evaluation.metrics import (
    calibration,
    classes_with_intervals,
    mean_with_interval,
    precision_recall_points,
    resamples,
    roc_points,
)
from pipeline.evaluation.protocols import Protocol, Task, TestSet
from pipeline.evaluation.seen_images import SeenImages, clean_images
from pipeline.evaluation.store import load_arrays, why_missing
from pipeline.storage.index import read_studies
from pipeline.study import Study, truth_of

Found = dict[str, Any]
FORMS = ("metrics", "removed", "classes", "curves", "precision_recall", "calibration")


@dataclass(frozen=True)
class Images:
    """The test images of a data set: embeddings [N, D], local scores [N, P] where the model has them, what resamples
    draw (uint16 [B, N]) and which images are clean (bool [N])."""

    studies: Sequence[Study]
    embeddings: np.ndarray
    local: np.ndarray | None
    weights: np.ndarray
    clean: np.ndarray


@dataclass(frozen=True)
class PromptTable:
    """``rows``: prompt -> its row of ``embeddings`` [P, D] and column of local scores; ``scale``: the model's."""

    rows: dict[str, int]
    embeddings: np.ndarray
    scale: float


def class_cosines(images: Images, texts: Sequence[str], prompts: PromptTable, rule: TestSet) -> np.ndarray:
    """One value of each image for one class, float64 [N]: its cosines with the class's prompts, aggregated.

    A ``z_score`` is over all images of the test set; where they all have one value, it is 0.
    """
    chosen = [prompts.rows[text] for text in texts]
    x, p = images.embeddings.astype(np.float64), prompts.embeddings[chosen].astype(np.float64)
    if rule.aggregate == "embedding":
        mean = p.mean(axis=0)
        values = x @ (mean / max(float(np.linalg.norm(mean)), 1e-12))
    else:
        cosines = x @ p.T
        if rule.local and images.local is not None:
            cosines = (cosines + images.local[:, chosen]) / 2
        values = cosines.mean(axis=1) if rule.aggregate == "mean" else cosines.max(axis=1)
    if rule.z_score:
        deviation = float(values.std())
        values = (values - values.mean()) / deviation if deviation > 0 else np.zeros(len(values))
    return values


def class_scores(
    task: Task, images: Images, prompts: PromptTable
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every class's score of each image, float64 [N], the larger the likelier; and, where there are negative prompts,
    how far the positive cosine is above the negative one."""
    found = {name: class_cosines(images, texts, prompts, task.rule) for name, texts in task.positive.items()}
    margins = {
        name: found[name] - class_cosines(images, texts, prompts, task.rule) for name, texts in task.negative.items()
    }
    if task.rule.score == "difference":
        found = margins
    elif task.rule.score == "softmax":
        found = {name: sigmoid(margin) for name, margin in margins.items()}
    return found, margins


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), what a softmax over two values gives the first where x is their difference."""
    return (1 + np.tanh(x / 2)) / 2


def evaluate_zero_shot(
    embeddings: Path,
    index: Path,
    sources: Sequence[str],
    protocols: Sequence[Protocol],
    options: Bootstrap,
    seed: int,
    seen: SeenImages,
    trained_on: Iterable[str],
) -> Found:
    """All zero-shot metrics of one row under every protocol (form of the answer: docs/results.md).

    Args:
        embeddings: folder of the row's embeddings; one that holds missing.json gives an answer without metrics.
        index: folder of <dataset>.parquet.
        protocols: the first one's test sets keep their names, another's are named <protocol>/<test set>.
        seen: what training sets have shown of test images (``seen_images.load_seen``).
        trained_on: the data sets that the row was trained on.

    Raises:
        ValueError: embeddings that are broken, or of other test images or prompts; labels that do not fit the metric.
    """
    result: Found = {**{name: {} for name in FORMS}, "notes": []}
    if why := why_missing(embeddings):
        result["notes"].append(why)
        return result
    trained_on = list(trained_on)
    if unknown := [name for name in trained_on if name not in sources]:
        result["notes"].append(
            f"clean test images: {', '.join(unknown)} not among sources, so what it has shown is not removed"
        )
    prompts = load_prompts(embeddings / "prompts.npz")
    loaded: dict[str, Images | None] = {}
    for number, protocol in enumerate(protocols):
        for task in (t for t in protocol.tasks.values() if t.rule.dataset in sources):
            dataset = task.rule.dataset
            key = MetricKey(task.name, "zero_shot", task.rule.metric, protocol.name if number else "")
            if dataset not in loaded:
                loaded[dataset] = _images(embeddings, index, dataset, options, seed, seen, trained_on)
            images = loaded[dataset]
            if images is None:
                result["notes"].append(f"{key.where}: no test study")
                continue
            try:
                _measure(result, key, task, images, prompts, options)
            except ValueError as error:
                raise ValueError(f"{embeddings}: {key.where}: {error}") from None
    return result


def load_prompts(path: Path) -> PromptTable:
    """Read the prompts.npz that stage ``embed`` wrote.

    Raises:
        ValueError: it is not there, or of another form.
    """
    stored = load_arrays(path, "dvc repro embed")
    if not {"texts", "embeddings", "scale"} <= stored.keys():
        raise ValueError(f"{path}: of an older form; run: dvc repro embed")
    rows = {str(text): i for i, text in enumerate(stored["texts"])}
    return PromptTable(rows, stored["embeddings"], float(stored["scale"]))


def _images(
    embeddings: Path,
    index: Path,
    dataset: str,
    options: Bootstrap,
    seed: int,
    seen: SeenImages,
    trained_on: Sequence[str],
) -> Images | None:
    """The test images of a data set; None where it has no test study."""
    studies = read_studies(index / f"{dataset}.parquet", ("test",))
    if not studies:
        return None
    path = embeddings / f"{dataset}.npz"
    stored = load_arrays(path, "dvc repro embed")
    images, local = stored["images"], stored.get("local")
    if len(images) != len(studies) or (local is not None and len(local) != len(studies)):
        raise ValueError(f"{path}: {len(images)} images for {len(studies)} test studies; embed again")
    weights = resamples([s.patient for s in studies], options, seed)
    return Images(studies, images, local, weights, clean_images(seen, dataset, studies, trained_on))


def _measure(
    result: Found, metric: MetricKey, task: Task, images: Images, prompts: PromptTable, options: Bootstrap
) -> None:
    """Add one test set's metric, on all images and on the clean ones, its curves and notes to ``result``."""
    where = metric.where
    texts = [text for side in (task.positive, task.negative) for some in side.values() for text in some]
    if absent := sum(text not in prompts.rows for text in dict.fromkeys(texts)):
        raise ValueError(f"{absent} of its prompts are not embedded; run: dvc repro embed")
    if images.embeddings.shape[1] != prompts.embeddings.shape[1]:
        raise ValueError("images and prompts have different dimensions; run: dvc repro -f embed")
    if images.local is not None and images.local.shape[1] != len(prompts.rows):
        raise ValueError("local scores and prompts differ in number; run: dvc repro -f embed")
    values, margins = class_scores(task, images, prompts)
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise ValueError(f"a score of {name} is not finite; the embeddings are broken")
    truth = {name: truth_of(images.studies, name) for name in values}
    removed = ~images.clean
    result["removed"][where] = int(removed.sum())
    if removed.all():
        result["notes"].append(f"{where}: no test image is clean")
    parts = [(metric, np.ones(len(removed), dtype=bool))]
    if removed.any() and not removed.all():
        parts.append((of_clean(metric), images.clean))
    for key, chosen in parts:
        weights, labels = images.weights[:, chosen], {name: t[chosen] for name, t in truth.items()}
        here = {name: value[chosen] for name, value in values.items()}
        if key.quantity == "accuracy":
            result["metrics"][key] = _accuracy(labels, here, weights, options)
            continue
        macro, classes, notes = classes_with_intervals(labels, here, weights, options)
        words = "clean test images: " if key.clean else ""
        result["notes"] += [f"{where}: {words}{note}" for note in notes]
        if not key.clean:
            result["classes"][where] = classes
        if macro is not None:
            result["metrics"][key] = macro
    for name in result["classes"].get(where, {}):
        known = truth[name] >= 0
        positive, scores = truth[name][known] == 1, values[name][known]
        _add(result, "curves", where, name, roc_points(positive, scores))
        _add(result, "precision_recall", where, name, precision_recall_points(positive, scores))
        if name in margins and not task.rule.z_score:
            bins = calibration(positive, sigmoid(prompts.scale * margins[name][known]))
            _add(result, "calibration", where, name, bins)


def _accuracy(
    truth: dict[str, np.ndarray], values: dict[str, np.ndarray], weights: np.ndarray, options: Bootstrap
) -> Measure:
    """How often the class with the largest score (the first of equal ones) is the image's own."""
    labels = np.stack(list(truth.values())) == 1
    if (labels.sum(axis=0) != 1).any():
        raise ValueError(f"accuracy: a test image has not exactly one of the classes {', '.join(truth)}")
    hits = np.stack(list(values.values())).argmax(axis=0) == labels.argmax(axis=0)
    return mean_with_interval(hits, weights, options)


def _add(result: Found, form: str, where: str, name: str, what: Found) -> None:
    result[form].setdefault(where, {})[name] = what
