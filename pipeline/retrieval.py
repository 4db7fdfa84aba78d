"""Image-to-text retrieval (paper section 4.3): recall of an image's own report text among all distinct texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.metrics import interval, mean_with_interval, resamples
from pipeline.params import Bootstrap
from pipeline.study import Study, read_studies

RETRIEVAL_SETS = ("chexpert", "mimic_cxr", "openi")
NAMES = {"chexpert": "chexpert5x200"}  # CheXpert's test split is CheXpert5x200
BLOCK = 1024


@dataclass(frozen=True)
class Candidates:
    """Distinct texts in order of first appearance; ``queries`` are the studies (by position) that take part and
    ``targets`` the text of each."""

    texts: list[str]
    queries: list[int]
    targets: np.ndarray


def report_text(study: Study) -> str | None:
    """CheXpert5x200: the impression. MIMIC-CXR and Open-I: the longer of findings and impression, as the authors
    said when asked; findings where both are equally long."""
    if study.dataset == "chexpert":
        return study.impression
    return max(study.findings or "", study.impression or "", key=len) or None


def candidates(studies: Sequence[Study]) -> Candidates:
    """Deduplicate the texts of test studies. A study without a text, or with lateral views only, takes no part."""
    texts: dict[str, int] = {}
    queries, targets = [], []
    for i, study in enumerate(studies):
        text = report_text(study)
        if text is None or all(v.position == "LATERAL" for v in study.views):
            continue
        queries.append(i)
        targets.append(texts.setdefault(text, len(texts)))
    return Candidates(list(texts), queries, np.array(targets, dtype=np.int64))


def ranks(images: np.ndarray, texts: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank (from 1) of each image's own text among all texts by cosine.

    Ties count against the model: texts as near as the own one come before it, so a collapsed encoder scores 0.
    Memory is one block of queries times all texts, never all queries.

    Args:
        images: unit-norm float32 [N, D]; ``texts``: unit-norm [M, D]; ``targets``: int64 [N] into texts.

    Returns:
        int64 [N] in 1..M.
    """
    out = np.empty(len(images), dtype=np.int64)
    for start in range(0, len(images), BLOCK):
        part = slice(start, start + BLOCK)
        cosines = images[part] @ texts.T
        own = np.take_along_axis(cosines, targets[part, None], axis=1)
        out[part] = (cosines >= own).sum(axis=1)
    return out


def evaluate(
    embeddings: Path,
    index: Path,
    sources: list[str],
    k: tuple[int, ...],
    options: Bootstrap,
    seed: int,
    examples: int = 3,
) -> dict[str, Any]:
    """R@K on the three retrieval sets, their sum, and a few examples to look at (form: docs/results.md)."""
    result: dict[str, Any] = {"metrics": {}, "pools": {}, "examples": {}, "notes": []}
    total, total_samples = 0.0, np.zeros(options.samples)
    sets = [d for d in RETRIEVAL_SETS if d in sources]
    for dataset in sets:
        name = NAMES.get(dataset, dataset)
        studies = read_studies(index / f"{dataset}.parquet", ("test",))
        pool = candidates(studies)
        if not pool.texts:
            result["notes"].append(f"{name}: no test study with a text")
            continue
        stored = np.load(embeddings / f"{dataset}.npz", allow_pickle=False)
        images, texts = stored["images"][pool.queries], stored["texts"]
        rank = ranks(images, texts, pool.targets)
        weights = resamples([studies[i].patient for i in pool.queries], options, seed)
        for n in k:
            metric, samples = mean_with_interval(rank <= n, weights, options)
            result["metrics"][f"{name}.r{n}"] = metric
            total, total_samples = total + metric["value"], total_samples + samples
        chance = {f"r{n}": min(1.0, n / len(pool.texts)) for n in k}
        result["pools"][name] = {"queries": len(rank), "candidates": len(pool.texts), "chance": chance}
        result["examples"][name] = [
            _example(studies[pool.queries[i]], images[i], texts, pool, int(pool.targets[i]), int(rank[i]))
            for i in _typical(rank, examples)
        ]
    if len(result["pools"]) == len(RETRIEVAL_SETS):
        result["metrics"]["total.rsum"] = interval(total, total_samples, options, 0)
    return result


def _typical(rank: np.ndarray, count: int) -> list[int]:
    """The queries at evenly spaced quantiles of rank, from the best to the middle: not a choice of the prettiest."""
    order = np.argsort(rank, kind="stable")
    return [int(order[i]) for i in np.linspace(0, len(order) // 2, count).round().astype(int)]


def _example(
    study: Study, image: np.ndarray, texts: np.ndarray, pool: Candidates, own: int, rank: int
) -> dict[str, Any]:
    cosines = texts @ image
    view = study.first_frontal
    best = np.argsort(-cosines, kind="stable")[:5]
    return {
        "shard": view.shard,
        "offset": view.offset,
        "length": view.length,
        "text": pool.texts[own],
        "rank": rank,
        "top": [{"text": pool.texts[i], "score": round(float(cosines[i]), 4), "correct": int(i) == own} for i in best],
    }
