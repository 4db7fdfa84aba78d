"""Zero-shot classification (paper section 4.3): AUC on VinDr-CXR, RSNA and SIIM, accuracy on CheXpert5x200."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.metrics import classes_with_intervals, mean_with_interval, resamples, roc_points
from pipeline.params import BINARY_DATASETS, Bootstrap
from pipeline.study import POSITIVE, Study, read_studies


def pair_scores(images: np.ndarray, pair: np.ndarray) -> np.ndarray:
    """How much nearer images are to the positive than to the negative prompt.

    The softmax over the two cosines is monotone in their difference, so the difference gives the same AUC.

    Args:
        images: unit-norm float32 [N, D]; ``pair``: unit-norm [2, D], positive then negative.

    Returns:
        float64 [N].
    """
    return images.astype(np.float64) @ (pair[0].astype(np.float64) - pair[1].astype(np.float64))


def grid_scores(images: np.ndarray, grid: dict[str, np.ndarray]) -> np.ndarray:
    """Mean cosine of each image with all prompts of each class, float64 [N, classes] in the grid's order."""
    means = np.stack([g.astype(np.float64).mean(axis=0) for g in grid.values()])
    return images.astype(np.float64) @ means.T


def evaluate(embeddings: Path, index: Path, sources: list[str], options: Bootstrap, seed: int) -> dict[str, Any]:
    """All zero-shot metrics of one run (see docs/results.md for the form of the answer).

    Args:
        embeddings: folder that ``pipeline.embed`` wrote.
        index: folder of <dataset>.parquet.
    """
    prompts = np.load(embeddings / "prompts.npz", allow_pickle=False)
    result: dict[str, Any] = {"metrics": {}, "classes": {}, "curves": {}, "notes": []}
    for dataset in (d for d in BINARY_DATASETS if d in sources):
        studies, images = _test_set(embeddings, index, dataset)
        if not studies:
            result["notes"].append(f"{dataset}: no test study")
            continue
        scores, labels = {}, {}
        for key in (k for k in prompts.files if k.startswith(f"{dataset}/")):
            cls = key.split("/", 1)[1]
            scores[cls] = pair_scores(images, prompts[key])
            labels[cls] = positives(studies, cls)
        weights = resamples([s.patient for s in studies], options, seed)
        macro, _, classes, notes = classes_with_intervals(labels, scores, weights, options)
        if macro:
            result["metrics"][f"{dataset}.auc"] = macro
        result["classes"][dataset] = classes
        result["curves"][dataset] = {c: roc_points(labels[c], scores[c]) for c in classes}
        result["notes"] += [f"{dataset}: {note}" for note in notes]
    if "chexpert" in sources:
        studies, images = _test_set(embeddings, index, "chexpert")
        grid = {k.split("/", 1)[1]: prompts[k] for k in prompts.files if k.startswith("chexpert/")}
        if studies:
            truth = np.stack([positives(studies, cls) for cls in grid])
            if (truth.sum(axis=0) != 1).any():
                raise ValueError(
                    f"{index / 'chexpert.parquet'}: a CheXpert5x200 image has not exactly one of the five classes"
                )
            hits = grid_scores(images, grid).argmax(axis=1) == truth.argmax(axis=0)
            weights = resamples([s.patient for s in studies], options, seed)
            result["metrics"]["chexpert5x200.accuracy"] = mean_with_interval(hits, weights, options)[0]
    return result


def positives(studies: Sequence[Study], cls: str) -> np.ndarray:
    """Whether each study is labelled positive for a class, bool [N]."""
    return np.array([s.labels.get(cls) == POSITIVE for s in studies])


def _test_set(embeddings: Path, index: Path, dataset: str) -> tuple[Sequence[Study], np.ndarray]:
    studies = read_studies(index / f"{dataset}.parquet", ("test",))
    if not studies:
        return [], np.empty((0, 0))
    images = np.load(embeddings / f"{dataset}.npz", allow_pickle=False)["images"]
    if len(images) != len(studies):
        raise ValueError(
            f"{embeddings / dataset}.npz: {len(images)} images for {len(studies)} test studies; embed again"
        )
    return studies, images
