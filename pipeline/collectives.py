"""Sums and gathers over all processes that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mine = torch.empty_like(grad[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(mine, grad.contiguous().flatten(0, 1))
        return mine


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


def gathered(x: Tensor) -> Tensor:
    """[b, ...] of each process -> [world, b, ...] in order of rank, on every process.

    The gradient of ``x`` is the sum of what all processes send back to it.
    """
    return _Gather.apply(x)


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, on every process; the gradient is the sum of all processes' gradients."""
    return _Sum.apply(x)
