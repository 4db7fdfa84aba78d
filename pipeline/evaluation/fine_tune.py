"""Full fine-tuning: the image encoder and a linear layer on it learn the labels (the paper's supplement)."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.params import Augment, FineTune
from pipeline.evaluation.augmented import AugmentedViews
from pipeline.evaluation.device import evaluation_autocast
from pipeline.evaluation.labelled import Labelled, label_loss
from pipeline.evaluation.pictures import PreparedViews, batches, cut
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.training.schedule import warmup_cosine

READ = 64  # pictures that a process reads at a time


class Tower(Protocol):
    """The image encoder of a network, itself an ``nn.Module``."""

    width: int

    @property
    def mean(self) -> Tensor:
        """A tensor on the device that the encoder is on."""
        ...

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Grey uint8 [B, S, S] -> features [B, width]; ``keys`` as in ``ImageTower.forward``."""
        ...


class Classifier(nn.Module):
    """An image encoder with a linear layer on its pooled features."""

    def __init__(self, tower: Tower, classes: int) -> None:
        """The encoder is copied: the one given stays as it is."""
        super().__init__()
        self.tower = copy.deepcopy(tower)
        self.layer = nn.Linear(tower.width, classes)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Grey uint8 [B, S, S] -> logits [B, C]; ``keys`` as in ``ImageTower.forward``."""
        logits: Tensor = self.layer(self.tower(images, keys))
        return logits


def evaluation_pictures(data: Labelled, split: str, size: int, workers: int = 0) -> Tensor:
    """Every image of a split as evaluation sees it, uint8 [N, size, size]."""
    views = data.views(split)
    loader = batches(
        PreparedViews(views, partial(evaluation_crop, size=size)), cut(range(len(views)), READ), workers, READ
    )
    found = torch.empty(len(views), size, size, dtype=torch.uint8)
    for images, positions in loader:
        found[positions] = images
    return found


def fine_tune(
    tower: Tower,
    data: Labelled,
    chosen: np.ndarray,
    valid: Tensor,
    size: int,
    augment: Augment,
    epochs: int,
    options: FineTune,
    batch_size: int,
    seed: int,
    workers: int,
) -> Classifier:
    """Train a copy of the encoder and a new linear layer with BCE, AdamW, 10 % warm-up and cosine; of all epochs that
    of lowest validation loss is kept.

    The encoder is in training mode (BatchNorm's statistics move on). An image has another augmentation each epoch. An
    epoch is cut in batches of at most ``options.batch_size`` that differ by one image at most, so that BatchNorm never
    sees a few left over. Passes run under ``evaluation_autocast``.

    Args:
        chosen: positions of training images; ``valid``: ``pictures`` of the validation split.
        batch_size: images a validation pass.

    Returns:
        The classifier in evaluation mode, on the encoder's device.
    """
    device = tower.mean.device
    torch.manual_seed(seed)
    model = Classifier(tower, len(data.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=options.weight_decay)
    steps = math.ceil(len(chosen) / options.batch_size)
    warmup = max(1, round(0.1 * epochs * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, epochs * steps))
    target, truth = (torch.from_numpy(data.labels[split]) for split in ("train", "valid"))
    keys: deque[Tensor] = deque()  # of stochastic depth, of the steps that the loader prepares
    views = AugmentedViews(data.views("train"), size, augment, seed)
    parts = _parts(chosen, epochs, steps, seed, keys)
    loader = iter(batches(views, parts, workers, options.batch_size, device.type == "cuda"))  # one for all epochs
    best: dict[str, Any] = {}
    best_loss = math.inf
    judged = bool((truth >= 0).any())  # as in the probe
    for _ in range(epochs):
        model.train()
        for images, positions in islice(loader, steps):
            with evaluation_autocast(device):
                logits = model(images.to(device, non_blocking=True), keys.popleft().to(device, non_blocking=True))
            loss = label_loss(logits.float(), target[positions])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        valid_loss = label_loss(classifier_logits(model, valid, batch_size), truth).item()
        if not math.isfinite(valid_loss):
            raise ValueError(f"{data.name}: fine-tuning diverged; lower evaluate.few_shot.fine_tune.lr")
        if valid_loss < best_loss or not judged:
            best_loss, best = valid_loss, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best)
    return model.eval()


def _parts(
    chosen: np.ndarray, epochs: int, steps: int, seed: int, keys: deque[Tensor]
) -> Iterator[list[tuple[int, int]]]:
    """(epoch, position) of the images of each step, and in ``keys`` a number for each: every epoch a fresh order of the
    chosen ones, cut evenly."""
    draws = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for part in torch.randperm(len(chosen), generator=draws).tensor_split(steps):
            keys.append(torch.randint(1 << 62, (len(part),), generator=draws))
            yield [(epoch, int(chosen[i])) for i in part.tolist()]


@torch.inference_mode()
def classifier_logits(model: Classifier, images: Tensor, batch_size: int) -> Tensor:
    """Logits of ``pictures`` in evaluation mode, float32 [N, C] on the CPU."""
    model.eval()
    device = model.layer.weight.device
    with evaluation_autocast(device):
        return torch.cat([model(part.to(device)).float().cpu() for part in images.split(batch_size)])
