"""Pictures on their way to an image encoder: read and prepared by processes beside the one that encodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.storage.memory import AHEAD, allow_many_files, processes_that_fit
from pipeline.storage.shards import load_view
from pipeline.study import View

Prepare = Callable[[np.ndarray], np.ndarray]
Pictures = Dataset[tuple[np.ndarray, int]]  # an item is a model input and the position of its image


class PreparedViews(Pictures):
    """Images as evaluation sees them, addressed by their position."""

    def __init__(self, views: Sequence[View], prepare: Prepare) -> None:
        """``prepare``: decoded grey picture, uint8 [H, W] -> model input."""
        self.views, self.prepare = views, prepare

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """The model's input and the position of the image."""
        return self.prepare(load_view(self.views[position])), position


def cut(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Parts of ``size`` items, the last one of fewer."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def batches(
    data: Pictures, parts: Iterable[list[Any]], workers: int, most: int, pin: bool = False
) -> Iterable[tuple[Tensor, Tensor]]:
    """Inputs [B, ...] and positions int64 [B] of the items in each part, in order. A batch is to be let go before the
    next but ``AHEAD``: it holds shared memory.

    Args:
        workers: processes that prepare them, fewer where shared memory has no room for their batches; 0: this one.
        most: items of a part at most.
        pin: in pinned memory, for a CUDA device.
    """
    if workers:
        allow_many_files()
        coming = iter(parts)
        first = next(coming, [])
        parts = chain([first], coming) if first else []
        workers = processes_that_fit(workers, most * data[first[0]][0].nbytes) if first else 0
    return DataLoader(
        data,
        batch_sampler=parts,
        num_workers=workers,
        collate_fn=_stack,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin,
    )


def _stack(items: Sequence[tuple[np.ndarray, int]]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.stack([x for x, _ in items])), torch.tensor([position for _, position in items])
