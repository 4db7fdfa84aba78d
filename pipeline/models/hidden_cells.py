"""Which cells of an image are hidden, in training and when hidden regions are evaluated."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.models.keyed_random import keyed_numbers, stream_seeds


def hidden_cells(keys: Tensor, grid: int, ratio: float) -> Tensor:
    """Cells to hide of images with these keys: int64 [B] -> bool [B, grid, grid].

    Of all cells the share ``ratio``, rounded, but at least one and not all. Which ones depends on the key alone, and
    those of a smaller ratio are among those of a larger one.
    """
    cells = grid**2
    count = min(max(round(ratio * cells), 1), cells - 1)
    order = keyed_numbers(stream_seeds(keys), (cells,)).argsort(dim=1, stable=True)
    hidden = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :count], True)
    return hidden.unflatten(1, (grid, grid))
