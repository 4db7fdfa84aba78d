"""Attention with keyed dropout as one operation on a GPU: neither scores nor masks reach memory.

It is ours, because fused attention of libraries draws its masks by a generator of its own. On the CPU, and for heads
that the kernels have no room for, ``pipeline.models.keyed_dropout`` does the same by torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.models.keyed_random import threshold

BLOCK = 32  # queries, or keys, of a Triton program
WIDTHS = (16, 32, 64)  # of a head; with 64 a program needs 58 kB of shared memory at most, which all cards have


def is_fused(query: Tensor, bias: Tensor | None) -> bool:
    """Whether ``keyed_attention`` computes it: on CUDA, of heads of ``WIDTHS``, with a bias of keys alone."""
    fits = query.is_cuda and query.shape[-1] in WIDTHS
    return fits and bias is not None and bias.shape == (len(query), 1, 1, query.shape[2])


@torch.library.custom_op("cxr::keyed_attention", mutates_args=(), device_types="cuda")
def keyed_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor, rate: float, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale * query @ key + bias), weights dropped by key (``dropout_kernel.keyed_dropout``), times value.

    Args:
        query, key, value: [B, heads, L, width], of one type.
        bias: [B, 1, 1, L], added to scores; it gets no gradient.
        seeds: int32 [B, 2], of each row.
        rate: share of the weights that is dropped; the others are divided by 1 - ``rate``.

    Returns:
        [B, L, heads, width], and float32 [B, heads, L] for the backward pass: of each query the logarithm of the sum
        of exponentials.
    """
    return forward_by_triton(query, key, value, bias, seeds, rate, scale)


@torch.library.custom_op("cxr::keyed_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    seeds: Tensor,
    out: Tensor,
    logs: Tensor,
    grad: Tensor,
    rate: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return backward_by_triton(query, key, value, bias, seeds, out, logs, grad, rate, scale)


def _empty(like: Tensor) -> Tensor:
    """[B, L, heads, width] for [B, heads, L, width]."""
    rows, heads, length, width = like.shape
    return like.new_empty(rows, length, heads, width)


@keyed_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor, rate: float, scale: float
) -> tuple[Tensor, Tensor]:
    return _empty(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@_backward.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    seeds: Tensor,
    out: Tensor,
    logs: Tensor,
    grad: Tensor,
    rate: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.rate, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _back(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(*ctx.saved_tensors, grad, ctx.rate, ctx.scale)
    return *(x.transpose(1, 2) for x in found), None, None, None, None


keyed_attention.register_autograd(_back, setup_context=_keep)


def forward_by_triton(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor, rate: float, scale: float
) -> tuple[Tensor, Tensor]:
    """``keyed_attention``, on a CUDA device (or anywhere in Triton's interpreter)."""
    from pipeline.models import attention_triton

    rows, heads, length, width = query.shape
    out, logs = _empty(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    given, sizes = _arguments(query, key, value, bias, seeds, rate, scale)
    grid = (rows * heads, (length + BLOCK - 1) // BLOCK)  # the second may be 65,535 at most
    attention_triton.forward[grid](*given, out, logs, *sizes, WIDTH=width, BLOCK=BLOCK)
    return out, logs


def backward_by_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    seeds: Tensor,
    out: Tensor,
    logs: Tensor,
    grad: Tensor,
    rate: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, [B, L, heads, width] each, from that of ``out``."""
    from pipeline.models import attention_triton

    rows, heads, length, width = query.shape
    grad_q, grad_k, grad_v = _empty(query), _empty(key), _empty(value)
    given, sizes = _arguments(query, key, value, bias, seeds, rate, scale)
    read = (*given, out, logs, grad.contiguous())
    grid = (rows * heads, (length + BLOCK - 1) // BLOCK)  # the second may be 65,535 at most
    attention_triton.backward_queries[grid](*read, grad_q, *sizes, WIDTH=width, BLOCK=BLOCK)
    attention_triton.backward_keys[grid](*read, grad_k, grad_v, *sizes, WIDTH=width, BLOCK=BLOCK)
    return grad_q, grad_k, grad_v


def _arguments(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, seeds: Tensor, rate: float, scale: float
) -> tuple[tuple[Tensor, ...], tuple[float, ...]]:
    """What all kernels are given: tensors, then sizes and strides."""
    three = tuple(x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    strides = [step for x in three for step in x.stride()[:3]]
    _, heads, length, _ = query.shape
    sizes = heads, length, scale, threshold(rate), 1 / (1 - rate), *strides
    return (*three, bias.contiguous(), seeds.contiguous()), sizes
