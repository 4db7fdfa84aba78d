"""Linear probe on a frozen image encoder, and fine-tuning of the whole, with a share of the training set (Table 2)."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from pipeline.clean import Seen, clean
from pipeline.embedder import Embedder
from pipeline.fine_tune import Tower, fine_tune, pictures, scores
from pipeline.labelled import AugmentedViews, Labelled, batches, read_labelled, subset
from pipeline.metrics import classes_with_intervals, interval, resamples
from pipeline.params import BINARY_DATASETS, Augment, Bootstrap, FewShot
from pipeline.protocols import Protocol
from pipeline.schedule import warmup_cosine

IN_MEMORY = 1 << 30  # bytes of cached features; more of them lie in a file


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


@torch.inference_mode()
def cache_features(
    embedder: Embedder,
    data: Labelled,
    uses: Iterable[tuple[np.ndarray, int]],
    augment: Augment,
    draws: int,
    seed: int,
    workers: int,
    work: Path,
) -> CachedFeatures:
    """Run the frozen encoder once over every augmentation draw of every training image that is needed.

    A crop is made at the embedder's ``size`` and goes through its own ``prepare``, as a whole picture does. With at
    least as many draws as epochs, every epoch finds a draw of its own: the recipe that encodes each epoch anew. More
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
    dataset = AugmentedViews(data.views("train"), items, embedder.size, augment, seed, embedder.prepare)
    count, numbers = embedder.batch_size, list(range(len(items)))
    parts = [numbers[i : i + count] for i in range(0, len(items), count)]
    features, done = np.empty((0, 0), dtype=np.float32), 0
    loader = batches(dataset, parts, workers)
    for inputs, _ in tqdm(loader, total=len(parts), desc=data.name, unit="batch", mininterval=1, leave=False):
        found = embedder.features(inputs.to(embedder.device)).float().cpu().numpy()
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
        labels: bool [N, C]; ``valid``: [V, W]; ``valid_labels``: bool [V, C].
    """
    torch.manual_seed(seed)
    layer = nn.Linear(valid.shape[1], labels.shape[1])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    total = epochs * math.ceil(len(labels) / options.batch_size)
    warmup = max(1, round(0.1 * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    target = torch.from_numpy(labels).float()
    x_valid, y_valid = torch.from_numpy(valid), torch.from_numpy(valid_labels).float()
    best, best_loss = layer.state_dict(), math.inf
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        x = torch.from_numpy(np.ascontiguousarray(features(epoch)))
        for part in torch.randperm(len(target), generator=order).split(options.batch_size):
            loss = F.binary_cross_entropy_with_logits(layer(x[part]), target[part])
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


def probe(
    embedder: Embedder,
    data: Labelled,
    augment: Augment,
    options: FewShot,
    seed: int,
    workers: int,
    work: Path,
) -> dict[str, dict[int, np.ndarray]]:
    """Logits of the test images of every linear probe: share -> seed of ``options.seeds`` -> float64 [N, C].

    A repetition draws its own subset, first weights and order; augmentation draws are common to all.
    """
    train = data.labels["train"]
    plain = embedder.prepare_at
    valid, test = (embedder.over(embedder.features, data.views(split), plain, data.name) for split in ("valid", "test"))
    chosen = {
        (name, s): subset(train, share, seed + s, options.subset)
        for name, share in options.shares.items()
        for s in options.seeds
    }
    uses = [(positions, options.epochs[name]) for (name, _), positions in chosen.items()]
    cached = cache_features(embedder, data, uses, augment, options.draws, seed, workers, work)
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


def tuned(
    tower: Tower,
    data: Labelled,
    size: int,
    augment: Augment,
    options: FewShot,
    batch_size: int,
    seed: int,
    workers: int,
) -> dict[str, dict[int, np.ndarray]]:
    """As ``probe``, of the whole encoder fine-tuned."""
    recipe = options.fine_tune
    valid, test = (pictures(data, split, size) for split in ("valid", "test"))
    logits: dict[str, dict[int, np.ndarray]] = {name: {} for name in recipe.shares}
    for name, share in recipe.shares.items():
        for s in options.seeds:
            chosen = subset(data.labels["train"], share, seed + s, options.subset)
            model = fine_tune(
                *(tower, data, chosen, valid, size, augment, recipe.epochs[name], recipe, batch_size),
                *(seed + s, workers),
            )
            logits[name][s] = scores(model, test, batch_size).double().numpy()
    return logits


def nothing(*notes: str) -> dict[str, Any]:
    """The result of a model that nothing was computed for, with notes that say why."""
    return {**{form: {} for form in ("metrics", "clean", "removed", "classes", "samples")}, "notes": list(notes)}


def evaluate(
    embedder: Embedder,
    tower: Tower | None,
    trained_on: Iterable[str],
    augment: Augment,
    index: Path,
    protocol: Protocol,
    sources: list[str],
    seen: Seen,
    options: FewShot,
    bootstrap: Bootstrap,
    seed: int,
    workers: int,
    work: Path,
    datasets: Sequence[str] = BINARY_DATASETS,
) -> dict[str, Any]:
    """Probe data sets at every share; metrics "<dataset>.<share>" (form: docs/results.md).

    Args:
        tower: fine-tuned, too, at the shares of ``options.fine_tune``; None: not. It takes crops of the
            embedder's ``size`` as they are.
        protocol: whose classes are learned.
        trained_on: data sets that the model was pre-trained on. With them the probed data set itself counts, all of it,
            in what is not clean.
        workers: processes that prepare images; 0: this one.
        work: folder for features that are too many for memory.
    """
    result = nothing()
    for dataset in (d for d in datasets if d in sources):
        data = read_labelled(index, protocol, dataset)
        if data is None:
            result["notes"].append(f"{dataset}: a split has no study")
            continue
        logits = probe(embedder, data, augment, options, seed, workers, work)
        if tower is not None:
            logits |= tuned(tower, data, embedder.size, augment, options, embedder.batch_size, seed, workers)
        tests = data.studies["test"]
        weights = resamples([s.patient for s in tests], bootstrap, seed)
        unseen = clean(seen, dataset, tests, [*trained_on, dataset])
        result["removed"][dataset] = int((~unseen).sum())
        for name, by_seed in logits.items():
            key = f"{dataset}.{name}"
            measure, samples, classes, notes = _measured(data.classes, data.labels["test"], by_seed, weights, bootstrap)
            if measure is not None:
                result["metrics"][key], result["samples"][key] = measure, samples
            result["classes"].setdefault(dataset, {})[name] = classes
            result["notes"] += [f"{dataset}: {name}: {note}" for note in notes]
            if unseen.all() or not unseen.any():
                continue
            some = {s: rows[unseen] for s, rows in by_seed.items()}
            measure, samples, _, _ = _measured(
                data.classes, data.labels["test"][unseen], some, weights[:, unseen], bootstrap
            )
            if measure is not None:
                result["clean"][key], result["samples"][f"clean/{key}"] = measure, samples
        if not unseen.any():
            result["notes"].append(f"{dataset}: no test image is clean")
    return result


def with_shares(options: FewShot, names: Iterable[str]) -> FewShot:
    """The recipe with some of its shares alone, linear and fine-tuned ones."""
    chosen = set(names)
    tune = options.fine_tune
    return replace(
        options,
        shares={name: share for name, share in options.shares.items() if name in chosen},
        fine_tune=replace(tune, shares={name: share for name, share in tune.shares.items() if name in chosen}),
    )


def _measured(
    classes: tuple[str, ...],
    labels: np.ndarray,
    logits: Mapping[int, np.ndarray],
    weights: np.ndarray,
    options: Bootstrap,
) -> tuple[dict[str, Any] | None, np.ndarray | None, dict[str, Any], list[str]]:
    """The macro AUC of one share, mean over seeds with each seed's own beside it; its values over the resamples, which
    are means over seeds, too; each class's mean AUC, whose interval's ends are means of the seeds'; notes."""
    truth = {c: labels[:, i] for i, c in enumerate(classes)}
    found = {
        s: classes_with_intervals(truth, {c: rows[:, i] for i, c in enumerate(classes)}, weights, options)
        for s, rows in logits.items()
    }
    per_class: dict[str, Any] = {}
    _, _, first, notes = next(iter(found.values()))
    for c, measure in first.items():
        ends = {part: float(np.mean([f[2][c][part] for f in found.values()])) for part in ("value", "low", "high")}
        per_class[c] = {**measure, **ends}
    macros = {s: macro["value"] for s, (macro, _, _, _) in found.items() if macro is not None}
    if not macros:
        return None, None, per_class, notes
    samples = np.mean([f[1] for f in found.values() if f[1] is not None], axis=0)
    measure = interval(float(np.mean(list(macros.values()))), samples, options, len(labels))
    return {**measure, "seeds": {str(s): value for s, value in macros.items()}}, samples, per_class, notes
