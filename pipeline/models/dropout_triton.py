"""The kernel of keyed dropout in Triton, which compiles it for the GPU at its first launch; the same integer arithmetic
as ``pipeline.models.keyed_random``."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]


@triton.jit
def mixed(x):  # type: ignore[no-untyped-def]
    """``keyed_random.mix_bits`` of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def dropped(position, first, second, threshold):  # type: ignore[no-untyped-def]
    """``keyed_random.keyed_mask`` at positions whose hash is known, of rows with these two seeds."""
    number = (position ^ first.to(tl.uint32, bitcast=True)) * (second.to(tl.uint32, bitcast=True) | 1)
    number = (number ^ (number >> 16)) * 0x7FEB352D
    return number.to(tl.int32, bitcast=True) < threshold


@triton.jit
def kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    seeds,
    count,
    row_size,
    threshold,
    factor,
    stride0,
    stride1,
    stride2,
    stride3,
    DIMENSIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``count`` values, ``row_size`` a row; strides of a row's dimensions, the last of them 1."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // row_size
    place = at % row_size
    position = tl.zeros((BLOCK,), tl.uint32)
    if DIMENSIONS > 0:
        position = mixed(position + (place // stride0).to(tl.uint32) * 0x9E3779B1)
        place = place % stride0
    if DIMENSIONS > 1:
        position = mixed(position + (place // stride1).to(tl.uint32) * 0x9E3779B1)
        place = place % stride1
    if DIMENSIONS > 2:
        position = mixed(position + (place // stride2).to(tl.uint32) * 0x9E3779B1)
        place = place % stride2
    if DIMENSIONS > 3:
        position = mixed(position + (place // stride3).to(tl.uint32) * 0x9E3779B1)
    first = tl.load(seeds + 2 * row, mask=inside, other=0)
    second = tl.load(seeds + 2 * row + 1, mask=inside, other=0)
    value = tl.load(x + at, mask=inside, other=0.0)
    kept = tl.where(dropped(position, first, second, threshold), 0.0, value.to(tl.float32)) * factor
    tl.store(out + at, kept.to(value.dtype), mask=inside)
