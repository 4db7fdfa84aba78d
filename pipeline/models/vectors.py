"""Rows of length 1, and the precision that sums over them are taken in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision made single; single and double as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in single precision where autocast left half."""
    return F.normalize(at_least_float32(x), dim=-1)
