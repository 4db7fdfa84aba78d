"""Which test images are clean for a row: no copy of theirs and no other image of their patient was trained on.

What training sets have shown comes from the leakage audit (``data/audit/seen.parquet``, see docs/leakage.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from pipeline.storage.parquet import read_table
from pipeline.study import Study

SeenImages = dict[
    tuple[str, str], set[tuple[str, str, str]]
]  # (test set, training set) -> (patient, study, view) of images


def load_seen_images(audit: Path) -> SeenImages:
    """Read what stage ``audit`` wrote; an image counts as seen whether train or valid has shown it.

    Raises:
        ValueError: the file is missing.
    """
    path = audit / "seen.parquet"
    if not path.is_file():
        raise ValueError(f"{path}: not found; run: dvc repro audit")
    names = ("dataset", "training_set", "patient", "study", "view")
    table = read_table(path, names).to_pydict()
    seen: SeenImages = {}
    for dataset, training, *image in zip(*(table[name] for name in names), strict=True):
        seen.setdefault((dataset, training), set()).add((image[0], image[1], image[2]))
    return seen


def clean_images(seen: SeenImages, dataset: str, studies: Sequence[Study], trained_on: Iterable[str]) -> np.ndarray:
    """Whether the evaluation view of each test study is clean with respect to these training sets, bool [N]."""
    shown = set().union(*(seen.get((dataset, training), set()) for training in trained_on))
    return np.array([(s.patient, s.study, s.first_frontal.id) not in shown for s in studies], dtype=bool)
