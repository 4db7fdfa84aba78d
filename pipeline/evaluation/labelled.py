"""A labelled data set for linear probe and fine-tuning: its splits and subsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.protocols import Protocol, classes_of
from pipeline.storage.index import read_studies
from pipeline.study import Study, View, truth_of


@dataclass(frozen=True)
class Labelled:
    """One data set with a label per class.

    Attributes:
        studies: split (train, valid, test) -> studies in index order, none of them empty.
        labels: split -> int8 [N, C], 1 positive, 0 negative, -1 neither (``pipeline.study.truth_of``).
    """

    name: str
    classes: tuple[str, ...]
    studies: Mapping[str, Sequence[Study]]
    labels: dict[str, np.ndarray]

    def views(self, split: str) -> list[View]:
        """The frontal view of each study."""
        return [s.first_frontal for s in self.studies[split]]


def read_labelled(index: Path, protocol: Protocol, dataset: str) -> Labelled | None:
    """The classes whose zero-shot AUC the protocol measures, with labels; None where a split has no study."""
    classes = tuple(classes_of(protocol, dataset))
    studies = {s: read_studies(index / f"{dataset}.parquet", (s,)) for s in ("train", "valid", "test")}
    if not all(studies.values()):
        return None
    labels = {s: np.stack([truth_of(rows, c) for c in classes], axis=1) for s, rows in studies.items()}
    return Labelled(dataset, classes, studies, labels)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross-entropy over the labels that are 1 or 0; 0 where there are none.

    Args:
        logits: float [B, C] on any device; ``labels``: int8 [B, C] on the CPU, as of ``Labelled``.
    """
    known = labels >= 0
    whole, target = bool(known.all()), labels.float().clamp_min(0).to(logits.device, non_blocking=True)
    if whole:
        return F.binary_cross_entropy_with_logits(logits, target)
    losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (losses * known.to(logits.device, non_blocking=True)).sum() / max(1, int(known.sum()))


def subset(labels: np.ndarray, share: float, seed: int, how: Literal["stratified", "random"]) -> np.ndarray:
    """The positions of a seeded share of the training set, sorted; round(share * N) of them, at least one.

    ``random`` is one draw that looks at no label. ``stratified`` takes, as long as places last:

    1. of a class with n positives round(share * n), the rarest class first; an image counts for all its classes;
    2. one positive of each class that has none yet, the most frequent class first: at 1 % not every rare class finds
       a place, and common ones must not go without for their sake;
    3. images without any of the classes, then any; of both those last of which no label is known.

    Args:
        labels: as of ``Labelled``.
    """
    known = np.any(labels >= 0, axis=1)
    labels = labels == 1
    count = len(labels)
    take = max(1, round(count * share))
    order = np.random.default_rng([seed, count]).permutation(count)
    if how == "random" or take == count:
        return np.sort(order[:take])
    chosen = np.zeros(count, dtype=bool)

    def fill(candidates: np.ndarray, places: int) -> None:
        """Choose up to so many of the candidates (bool [N]) that are not yet chosen, in the drawn order."""
        free = order[(candidates & ~chosen)[order]]
        chosen[free[: max(0, min(places, take - int(chosen.sum())))]] = True

    totals = labels.sum(axis=0)
    for c in np.argsort(totals, kind="stable"):
        fill(labels[:, c], round(share * int(totals[c])) - int(labels[chosen, c].sum()))
    for c in np.argsort(-totals, kind="stable"):
        fill(labels[:, c], 1 - int(labels[chosen, c].sum()))
    fill(known & ~np.any(labels, axis=1), take)
    fill(known, take)
    fill(np.ones(count, dtype=bool), take)
    return np.flatnonzero(chosen)
