"""Keyed dropout as one operation: it reads, hashes and writes, and nothing is kept for the backward pass.

The kernel is ours, because the mask must be the same on any device and number of processes; by torch's own operations
it takes 30 launches and ten times the memory traffic of the values. On the CPU those operations are used.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pipeline.models.keyed_random import keyed_bits, position_hash, threshold

BLOCK = 1024  # values of a Triton program
DIMENSIONS = 4  # of a row at most


@torch.library.custom_op("cxr::keyed_dropout", mutates_args=(), device_types="cpu")
def keyed_dropout(x: Tensor, seeds: Tensor, rate: float, whole_rows: bool) -> Tensor:
    """``x`` with values (or rows) left out with probability ``rate`` and the others divided by 1 - ``rate``.

    Args:
        x: [B * parts, ...], the ``parts`` of a row following one another.
        seeds: int32 [B, 2], of each row (see ``keyed_random.stream_seeds``).
        whole_rows: drop whole rows, as stochastic depth does, rather than values.

    Returns:
        The same shape and type. The mask depends on seeds and position in the row alone: it has the same bits on every
        device, and in the backward pass.
    """
    rows = x.unflatten(0, (len(seeds), -1))
    if whole_rows:
        numbers = keyed_bits(seeds, torch.zeros((), dtype=torch.int32))
        mask = (numbers < threshold(rate)).view(-1, *[1] * (rows.dim() - 1))
    else:
        mask = keyed_bits(seeds, _position(rows.shape[1:])) < threshold(rate)
    out = torch.empty_like(x)  # no view: torch forbids a change in place of one that comes from here
    torch.mul(rows.masked_fill(mask, 0), 1 / (1 - rate), out=out.unflatten(0, (len(seeds), -1)))
    return out


@lru_cache(32)  # a tower's layers have few shapes
def _position(shape: tuple[int, ...]) -> Tensor:
    return position_hash(shape, torch.device("cpu"))


@keyed_dropout.register_fake
def _(x: Tensor, seeds: Tensor, rate: float, whole_rows: bool) -> Tensor:
    return torch.empty_like(x)


@keyed_dropout.register_kernel("cuda")
def _(x: Tensor, seeds: Tensor, rate: float, whole_rows: bool) -> Tensor:
    return by_triton(x, seeds, rate, whole_rows)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seeds, ctx.rate, ctx.whole_rows = inputs
    ctx.save_for_backward(seeds)


def _back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return keyed_dropout(grad, *ctx.saved_tensors, ctx.rate, ctx.whole_rows), None, None, None


keyed_dropout.register_autograd(_back, setup_context=_keep)


def by_triton(x: Tensor, seeds: Tensor, rate: float, whole_rows: bool) -> Tensor:
    """``keyed_dropout`` in one launch. Arguments as there, on a CUDA device (or anywhere in Triton's interpreter).

    Raises:
        ValueError: rows have more than ``DIMENSIONS`` dimensions.
    """
    import triton  # type: ignore[import-untyped]

    from pipeline.models.dropout_triton import kernel

    dense = x
    if not (whole_rows and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        dense = x.contiguous()  # a row is one piece of memory in either case
    shape = () if whole_rows else (x.shape[0] // len(seeds), *x.shape[1:])
    if len(shape) > DIMENSIONS:
        raise ValueError(f"keyed dropout of rows with {len(shape)} dimensions; there are {DIMENSIONS} at most")
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    strides += [1] * (DIMENSIONS - len(strides))
    out = torch.empty_like(dense)
    count = x.numel()
    kernel[(triton.cdiv(count, BLOCK),)](
        *(dense, out, seeds.contiguous(), count, count // len(seeds), threshold(rate), 1 / (1 - rate), *strides),
        DIMENSIONS=len(shape),
        BLOCK=BLOCK,
    )
    return out if dense is x else torch.empty_like(x).copy_(out)  # torch expects the strides of ``x``
