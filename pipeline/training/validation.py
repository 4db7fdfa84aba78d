"""The validation loss: what epochs are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig
from pipeline.training.batches import ValidationSet, validation_parts
from pipeline.training.distributed import gather_rows
from pipeline.training.method import Method


@torch.no_grad()
def validation_loss(method: Method[Any], sets: Sequence[ValidationSet], config: RunConfig) -> float:
    """A method's validation loss on fixed draws: the mean over studies, each batch counting for as many as it holds,
    then the mean over the data sets that have any.

    Of w processes number r computes batches r, r + w, ..., and all get the same result. Each batch is computed by one
    process alone and sums are taken in the order of the batches, so with the same weights the number of processes
    changes nothing. The model is left in evaluation mode. All processes call it.

    Raises:
        ParamsError: no data set has two studies.
    """
    process, size = method.process, config.train.batch_size
    parts = [(data, part) for data in sets for part in validation_parts(len(data), size)]
    if not parts:
        raise ParamsError(f"runs.{config.name}.datasets: none has a validation split of two studies or more")
    method.learner.eval()
    losses = torch.zeros(math.ceil(len(parts) / process.world), dtype=torch.float64)
    for n, (data, part) in enumerate(parts[process.rank :: process.world]):
        losses[n] = method.validation_loss(method.collate([data[int(i)] for i in part])).item()
    found = gather_rows(losses, process.device).T.flatten().tolist()
    weighed: dict[int, list[tuple[int, float]]] = {}
    for (data, part), loss in zip(parts, found, strict=False):  # ranks with fewer batches fill up with zeros
        weighed.setdefault(id(data), []).append((len(part), loss))
    means = [sum(n * loss for n, loss in of) / sum(n for n, _ in of) for of in weighed.values()]
    return sum(means) / len(means)
