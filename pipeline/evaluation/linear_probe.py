"""Linear probe: one linear layer on the frozen image encoder's features (paper section 4.3)."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.config.params import Augment, FewShot
from pipeline.evaluation.augmented import AugmentedViews
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.labelled import Labelled, label_loss, subset
from pipeline.evaluation.pictures import cut
from pipeline.training.schedule import warmup_cosine

IN_MEMORY = 1 << 30  # bytes of cached features; more of them are kept in a file


class CachedFeatures:
    """Features of training images under several augmentation draws, each computed once.

    Draw d of image i is there if some subset that holds i is probed for more than d epochs.
    """

    def __init__(self, rows: np.ndarray, features: np.ndarray) -> None:
        """``rows``: int64 [draws, N], the row of ``features`` (float32 [M, W]) of a draw of an image, or -1."""
        self.rows, self.features = rows, features

    def epoch(self, number: int, chosen: np.ndarray) -> np.ndarray:
        """Features of some images as an epoch sees them (draw ``number`` mod draws), float32 [n, W]."""
        found: np.ndarray = self.features[self.rows[number % len(self.rows), chosen]]
        return found


def cache_features(
    embedder: Embedder,
    data: Labelled,
    uses: Iterable[tuple[np.ndarray, int]],
    augment: Augment,
    draws: int,
    seed: int,
    work: Path,
) -> CachedFeatures:
    """Run the frozen encoder once over every augmentation draw of every training image that is needed.

    A crop is made at the embedder's ``size`` and goes through its own ``prepare``, as a whole picture does. With at
    least as many draws as epochs, every epoch finds a draw of its own: the recipe that encodes every epoch. More
    than ``IN_MEMORY`` bytes are kept in a file without a name below ``work``, which goes with the process.

    Args:
        uses: (positions of a subset, epochs it is probed for).

    Raises:
        ValueError: the disk has no room for the file.
    """
    needed = np.zeros((draws, len(data.labels["train"])), dtype=bool)
    for chosen, epochs in uses:
        needed[: min(draws, epochs), chosen] = True
    rows = np.where(needed, needed.cumsum().reshape(needed.shape) - 1, -1)
    items = [(int(draw), int(position)) for draw, position in np.argwhere(needed)]
    dataset = AugmentedViews(data.views("train"), embedder.size, augment, seed, embedder.prepare)
    parts = cut(items, embedder.batch_size)
    features, done = np.empty((0, 0), dtype=np.float32), 0
    for found in embedder.encoded(embedder.features, dataset, parts, data.name):
        if not done:
            features = _room((len(items), found.shape[1]), work)
        features[done : done + len(found)] = found
        done += len(found)
    return CachedFeatures(rows, features)


def _room(shape: tuple[int, int], work: Path) -> np.ndarray:
    """float32 of this shape, in memory or in a nameless file."""
    size = shape[0] * shape[1] * 4
    if size <= IN_MEMORY:
        return np.empty(shape, dtype=np.float32)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=work) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows here, not as a crash on writing
        except OSError:
            raise ValueError(
                f"{work}: no room for {size / 1e9:.1f} GB of features; free some or lower evaluate.few_shot.draws"
            ) from None
        return np.memmap(file, dtype=np.float32, mode="r+", shape=shape)  # holds the file open


def linear_probe(
    features: Callable[[int], np.ndarray],
    labels: np.ndarray,
    valid: np.ndarray,
    valid_labels: np.ndarray,
    epochs: int,
    options: FewShot,
    seed: int,
) -> nn.Linear:
    """Fit one linear layer with BCE, AdamW, 10 % warm-up and cosine; the epoch of lowest validation loss is kept.

    Args:
        features: epoch -> float32 [N, W], the training images as that epoch sees them.
        labels: [N, C] as of ``Labelled``; ``valid``: [V, W]; ``valid_labels``: [V, C].
    """
    torch.manual_seed(seed)
    layer = nn.Linear(valid.shape[1], labels.shape[1])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    total = epochs * math.ceil(len(labels) / options.batch_size)
    warmup = max(1, round(0.1 * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    target, x_valid, y_valid = torch.from_numpy(labels), torch.from_numpy(valid), torch.from_numpy(valid_labels)
    best, best_loss = layer.state_dict(), math.inf
    judged = bool((y_valid >= 0).any())  # else nothing tells one epoch from another: the last is kept
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        x = torch.from_numpy(np.ascontiguousarray(features(epoch)))
        for part in torch.randperm(len(target), generator=order).split(options.batch_size):
            loss = label_loss(layer(x[part]), target[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            valid_loss = label_loss(layer(x_valid), y_valid).item()
        if valid_loss < best_loss or not judged:
            best_loss, best = valid_loss, {k: v.clone() for k, v in layer.state_dict().items()}
    layer.load_state_dict(best)
    return layer


def probe(
    embedder: Embedder,
    data: Labelled,
    augment: Augment,
    options: FewShot,
    seed: int,
    work: Path,
) -> dict[str, dict[int, np.ndarray]]:
    """Logits of the test images of every linear probe: share -> seed of ``options.seeds`` -> float64 [N, C].

    A repetition draws its own subset, first weights and order; augmentation draws are common to all.
    """
    train = data.labels["train"]
    valid, test = (embedder.over(embedder.features, data.views(split), data.name) for split in ("valid", "test"))
    chosen = {
        (name, s): subset(train, share, seed + s, options.subset)
        for name, share in options.shares.items()
        for s in options.seeds
    }
    uses = [(positions, options.epochs[name]) for (name, _), positions in chosen.items()]
    cached = cache_features(embedder, data, uses, augment, options.draws, seed, work)
    logits: dict[str, dict[int, np.ndarray]] = {name: {} for name in options.shares}
    for (name, s), positions in chosen.items():

        def epoch(number: int, positions: np.ndarray = positions) -> np.ndarray:
            return cached.epoch(number, positions)

        layer = linear_probe(
            epoch, train[positions], valid, data.labels["valid"], options.epochs[name], options, seed + s
        )
        with torch.no_grad():
            logits[name][s] = layer(torch.from_numpy(test)).double().numpy()
    return logits
