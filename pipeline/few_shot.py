"""Linear probe on a frozen image encoder with a share of the training set (paper Table 2, 10 % and 100 %)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from pipeline.augment import augment_image, evaluation_image
from pipeline.embed import encode_views
from pipeline.metrics import classes_with_intervals, resamples
from pipeline.model import CxrClip
from pipeline.params import BINARY_DATASETS, Augment, Bootstrap, FewShot
from pipeline.protocols import Protocol, classes
from pipeline.schedule import warmup_cosine
from pipeline.study import read_studies
from pipeline.zero_shot import positives


def subset(count: int, share: float, seed: int) -> np.ndarray:
    """The positions of a seeded, unstratified draw of a share of ``count`` items, sorted; at least one."""
    take = max(1, round(count * share))
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:take])


def linear_probe(
    train: np.ndarray,
    train_labels: np.ndarray,
    valid: np.ndarray,
    valid_labels: np.ndarray,
    epochs: int,
    options: FewShot,
    seed: int,
) -> nn.Linear:
    """Fit one linear layer with BCE, AdamW, 10 % warm-up and cosine; the epoch of lowest validation loss is kept.

    Args:
        train: features float32 [draws, N, D]; epoch e sees draw e mod draws.
        train_labels: bool [N, C]; ``valid``: [V, D]; ``valid_labels``: bool [V, C].
    """
    torch.manual_seed(seed)
    layer = nn.Linear(train.shape[2], train_labels.shape[1])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    total = epochs * math.ceil(train.shape[1] / options.batch_size)
    warmup = max(1, round(0.1 * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    draws, target = torch.from_numpy(train), torch.from_numpy(train_labels).float()
    x_valid, y_valid = torch.from_numpy(valid), torch.from_numpy(valid_labels).float()
    best, best_loss = layer.state_dict(), math.inf
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        features = draws[epoch % len(draws)]
        for part in torch.randperm(len(target), generator=order).split(options.batch_size):
            loss = F.binary_cross_entropy_with_logits(layer(features[part]), target[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            valid_loss = F.binary_cross_entropy_with_logits(layer(x_valid), y_valid).item()
        if valid_loss < best_loss:
            best_loss, best = valid_loss, {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(best)
    return layer


def evaluate(
    model: CxrClip,
    image_size: int,
    augment: Augment,
    index: Path,
    protocol: Protocol,
    sources: list[str],
    options: FewShot,
    bootstrap: Bootstrap,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> dict[str, Any]:
    """Probe VinDr-CXR, RSNA and SIIM at every share; metrics "<dataset>.<share>" (form: docs/results.md).

    The frozen encoder sees each training image ``options.draws`` times, each under its own augmentation draw, and every
    validation and test image once; with ``draws`` equal to the epochs this is the release's recipe (docs/fidelity.md).
    """
    result: dict[str, Any] = {"metrics": {}, "classes": {}, "notes": []}
    for dataset in (d for d in BINARY_DATASETS if d in sources):
        names = classes(protocol, dataset)
        splits = {s: read_studies(index / f"{dataset}.parquet", (s,)) for s in ("train", "valid", "test")}
        if not all(splits.values()):
            result["notes"].append(f"{dataset}: a split has no study")
            continue
        labels = {s: np.stack([positives(studies, c) for c in names], axis=1) for s, studies in splits.items()}

        def features(split: str, prepare: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
            views = [s.first_frontal for s in splits[split]]  # noqa: B023 (used within this turn of the loop)
            return encode_views(views, model.image_tower, prepare, batch_size, device, dataset)  # noqa: B023

        def plain(image: np.ndarray, _: int) -> np.ndarray:
            return evaluation_image(image, image_size)

        def augmented(image: np.ndarray, i: int, draw: int) -> np.ndarray:
            return augment_image(image, image_size, augment, np.random.default_rng([seed, draw, i]))

        train = np.empty((options.draws, len(splits["train"]), model.image_tower.width), dtype=np.float32)
        for draw in range(options.draws):
            train[draw] = features("train", partial(augmented, draw=draw))
        valid, test = features("valid", plain), features("test", plain)
        for name, share in options.shares.items():
            chosen = subset(train.shape[1], share, seed)
            layer = linear_probe(
                train[:, chosen], labels["train"][chosen], valid, labels["valid"], options.epochs[name], options, seed
            )
            with torch.no_grad():
                logits = layer(torch.from_numpy(test)).double().numpy()
            truth = {c: labels["test"][:, i] for i, c in enumerate(names)}
            scores = {c: logits[:, i] for i, c in enumerate(names)}
            weights = resamples([s.patient for s in splits["test"]], bootstrap, seed)
            macro, _, per_class, notes = classes_with_intervals(truth, scores, weights, bootstrap)
            if macro:
                result["metrics"][f"{dataset}.{name}"] = macro
            result["classes"].setdefault(dataset, {})[name] = per_class
            result["notes"] += [f"{dataset} {name}: {note}" for note in notes]
    return result
