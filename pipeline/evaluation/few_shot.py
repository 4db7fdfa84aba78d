"""Linear probe on a frozen image encoder, and fine-tuning of the whole, with a share of the training set (Table 2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.params import Augment, Bootstrap, FewShot
from pipeline.config.settings import FewShotSettings
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.fine_tune import Tower, classifier_logits, evaluation_pictures, fine_tune
from pipeline.evaluation.labelled import Labelled, read_labelled, subset
from pipeline.evaluation.linear_probe import probe
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import of_clean, share_key
from pipeline.evaluation.metrics import classes_with_intervals, interval, resamples
from pipeline.evaluation.protocols import Protocol
from pipeline.evaluation.seen_images import SeenImages, clean_images


def tuned(
    tower: Tower, data: Labelled, embedder: Embedder, augment: Augment, options: FewShot, seed: int
) -> dict[str, dict[int, np.ndarray]]:
    """As ``probe``, of the whole encoder fine-tuned."""
    recipe, size, batch_size, workers = options.fine_tune, embedder.size, embedder.batch_size, embedder.workers
    pictures = (evaluation_pictures(data, split, size, workers) for split in ("valid", "test"))
    valid, test = (each.to(tower.mean.device) for each in pictures)
    logits: dict[str, dict[int, np.ndarray]] = {name: {} for name in recipe.shares}
    for name, share in recipe.shares.items():
        for s in options.seeds:
            chosen = subset(data.labels["train"], share, seed + s, options.subset)
            model = fine_tune(
                *(tower, data, chosen, valid, size, augment, recipe.epochs[name], recipe, batch_size),
                *(seed + s, workers),
            )
            logits[name][s] = classifier_logits(model, test, batch_size).double().numpy()
    return logits


def nothing(*notes: str) -> dict[str, Any]:
    """The result of a model that nothing was computed for, with notes that say why."""
    return {**{form: {} for form in ("metrics", "removed", "classes")}, "notes": list(notes)}


def evaluate_few_shot(
    embedder: Embedder,
    tower: Tower | None,
    protocol: Protocol,
    settings: FewShotSettings,
    index: Path,
    seen: SeenImages,
    work: Path,
) -> dict[str, Any]:
    """Probe the test sets of ``settings`` at every share (form of the answer: docs/results.md).

    Args:
        tower: fine-tuned, too, at the shares of ``settings.options.fine_tune``; None: not. It takes crops of the
            embedder's ``size`` as they are.
        protocol: whose classes are learned.
        settings: with the data sets that the model was pre-trained on the probed data set itself counts, all of it, in
            what is not clean.
        work: folder for features that are too many for memory.

    Raises:
        ValueError: a share whose name is not p or ft and its percent.
    """
    result = nothing()
    options, bootstrap, augment, seed = settings.options, settings.bootstrap, settings.augment, settings.seed
    shares = [*options.shares, *(options.fine_tune.shares if tower is not None else ())]
    for dataset in (d for d in settings.test_sets if d in settings.sources):
        keys = {name: share_key(dataset, name) for name in shares}  # before any work
        data = read_labelled(index, protocol, dataset)
        if data is None:
            result["notes"].append(f"{dataset}: a split has no study")
            continue
        unlearned = [c for c, of in zip(data.classes, data.labels["train"].T, strict=True) if (of < 0).all()]
        result["notes"] += [f"{dataset}: {c}: no training label is known" for c in unlearned]
        logits = probe(embedder, data, augment, options, seed, work)
        if tower is not None:
            logits |= tuned(tower, data, embedder, augment, options, seed)
        tests = data.studies["test"]
        weights = resamples([s.patient for s in tests], bootstrap, seed)
        unseen = clean_images(seen, dataset, tests, [*settings.trained_on, dataset])
        result["removed"][dataset] = int((~unseen).sum())
        for name, by_seed in logits.items():
            test = data.labels["test"]
            measure, classes, notes = _measured(data.classes, test, by_seed, weights, bootstrap)
            if measure is not None:
                result["metrics"][keys[name]] = measure
            result["classes"].setdefault(dataset, {})[name] = classes
            result["notes"] += [f"{dataset}: {note}" for note in notes]  # of the test images, whatever the share
            if unseen.all() or not unseen.any():
                continue
            some = {s: rows[unseen] for s, rows in by_seed.items()}
            measure, _, _ = _measured(data.classes, test[unseen], some, weights[:, unseen], bootstrap)
            if measure is not None:
                result["metrics"][of_clean(keys[name])] = measure
        if not unseen.any():
            result["notes"].append(f"{dataset}: no test image is clean")
    return result


def _measured(
    classes: tuple[str, ...],
    labels: np.ndarray,
    logits: Mapping[int, np.ndarray],
    weights: np.ndarray,
    options: Bootstrap,
) -> tuple[Measure | None, dict[str, Measure], list[str]]:
    """The macro AUC of one share, mean over seeds with each seed's own beside it (its samples are means over seeds);
    each class's mean AUC, whose interval's ends are means of the seeds'; notes."""
    truth = {c: labels[:, i] for i, c in enumerate(classes)}
    found = {
        s: classes_with_intervals(truth, {c: rows[:, i] for i, c in enumerate(classes)}, weights, options)
        for s, rows in logits.items()
    }
    _, first, notes = next(iter(found.values()))
    per_class = {}
    for c, measure in first.items():
        value, low, high = (
            float(np.mean([getattr(classes[c], part) for _, classes, _ in found.values()]))
            for part in ("value", "low", "high")
        )
        per_class[c] = replace(measure, value=value, low=low, high=high, samples=None)
    macros = {s: macro for s, (macro, _, _) in found.items() if macro is not None}
    if not macros:
        return None, per_class, notes
    samples = np.mean([macro.samples for macro in macros.values() if macro.samples is not None], axis=0)
    known = int((labels >= 0).any(axis=1).sum())
    measure = interval(float(np.mean([m.value for m in macros.values()])), samples, options, known)
    return replace(measure, seeds={str(s): macro.value for s, macro in macros.items()}), per_class, notes
