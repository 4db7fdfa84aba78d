"""The kernels of attention with keyed dropout in Triton, after Dao et al., FlashAttention (NeurIPS 2022): scores never
reach memory. Masks follow from the integer arithmetic of ``pipeline.models.keyed_random``."""

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from pipeline.models.dropout_triton import dropped, mixed


@triton.jit
def _weights_kept(seeds, row, head, query, key, threshold):  # type: ignore[no-untyped-def]
    """Which weights [Q, K] of a head are not dropped: by position (0, head, query, key) of the row."""
    position = mixed(head.to(tl.uint32) * 0x9E3779B1)  # the hash of the leading 0 is 0
    position = mixed(position + query.to(tl.uint32) * 0x9E3779B1)
    position = mixed(position[:, None] + key.to(tl.uint32)[None, :] * 0x9E3779B1)
    return dropped(position, tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1), threshold) == 0


@triton.jit
def _read(x, at, stride, length, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows ``at`` of a head's [L, WIDTH]; 0 beyond the end."""
    places = at[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(x + places, mask=at[:, None] < length, other=0.0)


@triton.jit
def _write(x, at, stride, length, values, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    places = at[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    tl.store(x + places, values.to(x.dtype.element_ty), mask=at[:, None] < length)


@triton.jit
def _scores(q, k, bias, key, length, scale):  # type: ignore[no-untyped-def]
    """[Q, K] in float32; ``bias``: of the row's keys, those beyond the end are not looked at."""
    added = tl.load(bias + key, mask=key < length, other=0.0).to(tl.float32)
    found = tl.dot(q, tl.trans(k), input_precision="ieee") * scale + added[None, :]
    return tl.where(key[None, :] < length, found, float("-inf"))


@triton.jit
def forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    bias,
    seeds,
    out,
    logs,
    heads,
    length,
    scale,
    threshold,
    factor,
    q_row,
    q_head,
    q_step,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of queries of a head: ``out`` [B, L, heads, WIDTH] and ``logs`` [B, heads, L], logarithms of the sums of
    exponentials. Inputs come with the strides of rows (texts), heads and tokens."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = _read(q + row * q_row + head * q_head, query, q_step, length, WIDTH)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    found = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, length, BLOCK):
        key = start + tl.arange(0, BLOCK)
        keys = _read(k + row * k_row + head * k_head, key, k_step, length, WIDTH)
        values = _read(v + row * v_row + head * v_head, key, v_step, length, WIDTH)
        scores = _scores(own, keys, bias + row * length, key, length, scale)
        now = tl.maximum(most, tl.max(scores, 1))
        weights, shrunk = tl.exp(scores - now[:, None]), tl.exp(most - now)
        total = total * shrunk + tl.sum(weights, 1)
        weights = tl.where(_weights_kept(seeds, row, head, query, key, threshold), weights * factor, 0.0)
        found = found * shrunk[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        most = now
    at = row * length * heads * WIDTH + head * WIDTH
    _write(out + at, query, heads * WIDTH, length, found / total[:, None], WIDTH)
    tl.store(logs + (row * heads + head) * length + query, most + tl.log(total), mask=query < length)


@triton.jit
def backward_queries(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    bias,
    seeds,
    out,
    logs,
    grad,
    grad_q,
    heads,
    length,
    scale,
    threshold,
    factor,
    q_row,
    q_head,
    q_step,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a block of queries, from all keys; ``out``, ``grad`` and ``grad_q`` are [B, L, heads, WIDTH]."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    query = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, step = row * length * heads * WIDTH + head * WIDTH, heads * WIDTH
    own = _read(q + row * q_row + head * q_head, query, q_step, length, WIDTH)
    asked = _read(grad + at, query, step, length, WIDTH)
    log = tl.load(logs + (row * heads + head) * length + query, mask=query < length, other=0.0)
    mean = tl.sum(asked.to(tl.float32) * _read(out + at, query, step, length, WIDTH).to(tl.float32), 1)
    found = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, length, BLOCK):
        key = start + tl.arange(0, BLOCK)
        keys = _read(k + row * k_row + head * k_head, key, k_step, length, WIDTH)
        values = _read(v + row * v_row + head * v_head, key, v_step, length, WIDTH)
        weights = tl.exp(_scores(own, keys, bias + row * length, key, length, scale) - log[:, None])
        kept = _weights_kept(seeds, row, head, query, key, threshold)
        wanted = tl.where(kept, tl.dot(asked, tl.trans(values), input_precision="ieee") * factor, 0.0)
        change = weights * (wanted - mean[:, None])
        found += tl.dot(change.to(keys.dtype), keys, input_precision="ieee")
    _write(grad_q + at, query, step, length, found * scale, WIDTH)


@triton.jit
def backward_keys(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    bias,
    seeds,
    out,
    logs,
    grad,
    grad_k,
    grad_v,
    heads,
    length,
    scale,
    threshold,
    factor,
    q_row,
    q_head,
    q_step,
    k_row,
    k_head,
    k_step,
    v_row,
    v_head,
    v_step,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of a block of keys and of their values, from all queries; as ``backward_queries``."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    key = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, step = row * length * heads * WIDTH + head * WIDTH, heads * WIDTH
    keys = _read(k + row * k_row + head * k_head, key, k_step, length, WIDTH)
    values = _read(v + row * v_row + head * v_head, key, v_step, length, WIDTH)
    found_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    found_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    for start in range(0, length, BLOCK):
        query = start + tl.arange(0, BLOCK)
        own = _read(q + row * q_row + head * q_head, query, q_step, length, WIDTH)
        asked = _read(grad + at, query, step, length, WIDTH)
        log = tl.load(logs + (row * heads + head) * length + query, mask=query < length, other=float("inf"))
        mean = tl.sum(asked.to(tl.float32) * _read(out + at, query, step, length, WIDTH).to(tl.float32), 1)
        weights = tl.exp(_scores(own, keys, bias + row * length, key, length, scale) - log[:, None])
        kept = _weights_kept(seeds, row, head, query, key, threshold)
        shown = tl.where(kept, weights * factor, 0.0)
        found_v += tl.dot(tl.trans(shown.to(asked.dtype)), asked, input_precision="ieee")
        wanted = tl.where(kept, tl.dot(asked, tl.trans(values), input_precision="ieee") * factor, 0.0)
        change = weights * (wanted - mean[:, None])
        found_k += tl.dot(tl.trans(change.to(own.dtype)), own, input_precision="ieee")
    _write(grad_k + at, key, step, length, found_k * scale, WIDTH)
    _write(grad_v + at, key, step, length, found_v, WIDTH)
