"""Retrieval (paper section 4.3): recall of an image's own report text among all distinct texts, and of a text's
images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.params import Bootstrap
from pipeline.evaluation.candidates import CandidateTexts, candidate_texts, text_digest
from pipeline.evaluation.exact_ranks import ranks, text_ranks
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import RSUM, Direction, MetricKey, of_clean
from pipeline.evaluation.metrics import interval, mean_with_interval, resamples
from pipeline.evaluation.protocols import RetrievalSet
from pipeline.evaluation.store import load_arrays, why_missing
from pipeline.storage.index import read_studies
from pipeline.study import Study

Clean = Callable[[str, Sequence[Study]], np.ndarray]  # data set, studies -> bool [N]


def evaluate_retrieval(
    embeddings: Path,
    index: Path,
    sources: Sequence[str],
    sets: Mapping[str, RetrievalSet],
    k: tuple[int, ...],
    options: Bootstrap,
    seed: int,
    is_clean: Clean | None = None,
    examples: int = 3,
) -> dict[str, Any]:
    """R@K of retrieval sets both ways, their sums, and a few examples to look at (form: docs/results.md).

    Args:
        embeddings: folder of <dataset>.npz; or of missing.json alone, whose line becomes a note.
        index: folder of <dataset>.parquet.
        sets: of the first protocol (``protocols.retrieval_sets``). Where one is not among ``sources``, there are no
            sums.
        is_clean: which studies' evaluation views the row's training sets have not shown; None: all.

    Raises:
        ValueError: embeddings are missing, do not fit the test set, or are not finite.
    """
    result: dict[str, Any] = {key: {} for key in ("metrics", "removed", "pools", "examples")}
    result["notes"] = []
    if why := why_missing(embeddings):
        result["notes"].append(why)
        return result
    for name, rule in ((n, r) for n, r in sets.items() if r.dataset in sources):
        dataset = rule.dataset
        studies = read_studies(index / f"{dataset}.parquet", ("test",))
        pool = candidate_texts(studies, rule)
        if not pool.texts:
            result["notes"].append(f"{name}: no test study with a text")
            continue
        images, texts = _stored(embeddings / f"{dataset}.npz", len(studies), len(pool.texts))
        images = images[pool.queries]
        queries = [studies[i] for i in pool.queries]
        fresh = is_clean(dataset, queries) if is_clean else np.ones(len(queries), dtype=bool)
        result["removed"][name] = int((~fresh).sum())
        weights = resamples([s.patient for s in queries], options, seed)
        rank = ranks(images, texts, pool.targets)
        _add_recalls(result, _recalls([name], k, "i2t"), rank, weights, fresh, options)
        # A text is one query. It comes with the patient who has it first, and is clean if all its images are.
        first = np.unique(pool.targets, return_index=True)[1]
        fresh_text = np.bincount(pool.targets[~fresh], minlength=len(texts)) == 0
        reverse = text_ranks(images, texts, pool.targets)
        _add_recalls(result, _recalls([name], k, "t2i"), reverse, weights[:, first], fresh_text, options)
        if not (fresh.any() and fresh_text.any()):
            result["notes"].append(f"{name}: no clean test image to query with")
        chance = {f"r{n}": min(1.0, n / len(texts)) for n in k}
        result["pools"][name] = {"queries": len(rank), "candidates": len(texts), "chance": chance}
        result["examples"][name] = [
            _example(queries[i], images[i], texts, pool, int(pool.targets[i]), int(rank[i]))
            for i in _typical(rank, examples)
        ]
    if sets and len(result["pools"]) == len(sets):
        _add_sums(result, k, options)
    return result


def _stored(path: Path, images: int, texts: int) -> tuple[np.ndarray, np.ndarray]:
    stored = load_arrays(path, "dvc repro embed")
    if "texts" not in stored:
        raise ValueError(f"{path}: without texts; run: dvc repro -f embed")
    found = stored["images"].astype(np.float32), stored["texts"].astype(np.float32)
    if (len(found[0]), len(found[1])) != (images, texts):
        raise ValueError(
            f"{path}: {len(found[0])} images and {len(found[1])} texts for {images} test studies and {texts} texts; "
            "embed again"
        )
    return found


def _recalls(names: Iterable[str], k: Sequence[int], direction: Direction) -> list[MetricKey]:
    """R@K of some sets one way."""
    return [MetricKey(name, "retrieval", "recall", direction=direction, k=n) for name in names for n in k]


def _add_recalls(
    result: dict[str, Any],
    keys: Sequence[MetricKey],
    rank: np.ndarray,
    weights: np.ndarray,
    fresh: np.ndarray,
    options: Bootstrap,
) -> None:
    """R@K of all queries, and of the clean ones where some are not."""
    for key in keys:
        result["metrics"][key] = mean_with_interval(rank <= key.k, weights, options)
        if fresh.any() and not fresh.all():
            result["metrics"][of_clean(key)] = mean_with_interval(rank[fresh] <= key.k, weights[:, fresh], options)


def _add_sums(result: dict[str, Any], k: tuple[int, ...], options: Bootstrap) -> None:
    """The sums of recalls both ways; clean ones where a set has queries that are not clean, and all have clean ones."""
    metrics = result["metrics"]
    for direction, total in RSUM.items():
        keys = _recalls(result["pools"], k, direction)
        metrics[total] = _sum([metrics[key] for key in keys], options)
        removed = [key for key in keys if result["removed"][key.where]]
        if removed and all(of_clean(key) in metrics for key in removed):
            metrics[of_clean(total)] = _sum([metrics.get(of_clean(key), metrics[key]) for key in keys], options)


def _sum(recalls: Sequence[Measure], options: Bootstrap) -> Measure:
    samples = np.sum([recall.samples for recall in recalls if recall.samples is not None], axis=0)
    return interval(sum(recall.value for recall in recalls), samples, options, None)


def _typical(rank: np.ndarray, count: int) -> list[int]:
    """The queries at evenly spaced quantiles of rank, from the best to the middle: not a choice of the prettiest."""
    order = np.argsort(rank, kind="stable")
    return [int(order[i]) for i in np.linspace(0, len(order) // 2, count).round().astype(int)]


def _example(
    study: Study, image: np.ndarray, texts: np.ndarray, pool: CandidateTexts, own: int, rank: int
) -> dict[str, Any]:
    cosines = texts @ image
    names = [text_digest(pool.texts[i]) for i in (own, *np.argsort(-cosines, kind="stable")[:5])]
    scores = np.sort(cosines)[::-1]
    return {
        "image": study.first_frontal.digest,
        "text": names[0],
        "rank": rank,
        "top": [{"text": name, "score": round(float(s), 4)} for name, s in zip(names[1:], scores, strict=False)],
    }
