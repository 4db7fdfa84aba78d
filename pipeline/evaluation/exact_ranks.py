"""Ranks by cosine that are exact, while no matrix of all images times all texts is ever held.

A quick product of rounded embeddings settles every pair whose cosine is further from the own one than the rounding can
explain; the few others are computed again in double precision, all by the same operation, so that a tie is a tie
(``at_least``).

Ours, because 10 times the usual recipe's speed (docs/performance.md) needs a bfloat16 product, and this keeps it exact.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)  # a beta feature of torch, it says
QUERIES, ITEMS = 256, 4096  # of one block: its cosines and what is compared of them stay in the cache


def ranks(images: np.ndarray, texts: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank (from 1) of each image's own text among all texts by cosine.

    Ties count against the model: texts as near as the own one come before it, so a collapsed encoder scores 0.

    Args:
        images: unit-norm float32 [N, D]; ``texts``: unit-norm [M, D]; ``targets``: int64 [N] into texts.

    Returns:
        int64 [N] in 1..M.
    """
    return at_least(images, texts, targets)


def text_ranks(images: np.ndarray, texts: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank (from 1) of each text's best own image among all images by cosine; other own images do not push it down.

    Ties count against the model: other texts' images as near as the best own one come before it.

    Args:
        images: unit-norm float32 [N, D]; ``texts``: unit-norm [M, D]; ``targets``: int64 [N] into texts, each text at
            least once.

    Returns:
        int64 [M] in 1..N.
    """
    own = pair_products(images, texts, np.arange(len(images)), targets)
    order = np.lexsort((-own, targets))
    first = np.flatnonzero(np.r_[True, np.diff(targets[order]) > 0])
    if len(first) != len(texts):
        raise ValueError(f"retrieval: {len(texts) - len(first)} of {len(texts)} texts belong to no image")
    best = order[first]
    ties = np.bincount(targets[own == own[best][targets]], minlength=len(texts))  # own images as near as the best
    return at_least(texts, images, best) - ties + 1


def at_least(queries: np.ndarray, items: np.ndarray, own: np.ndarray) -> np.ndarray:
    """How many items are as near to each query as its own item, or nearer, by inner product in double precision.

    Items are centred, which changes no order, and both sides rounded to ``_rough_dtype``. With x = x' + e and
    y = y' + f (x', y' rounded), x.y = x'.y' + e.y' + x.f, so by Cauchy and Schwarz the product of the rounded is off by
    at most |e||y'| + |x||f|, and by D 2^-23 |x'||y'| where sums are kept in single precision, in any order. Rounding
    both the product and the bounds to the same format keeps their order. What is between the bounds is computed in
    single precision, whose bound is the last of these, and what is still between goes to ``pair_products``, which
    also gives the own product: equal rows give equal products to the last bit.

    Args:
        queries: float32 [N, D]; ``items``: float32 [M, D]; ``own``: int64 [N] into items.

    Returns:
        int64 [N] in 1..M.

    Raises:
        ValueError: an embedding is not finite, or shapes do not fit.
    """
    if queries.shape[1:] != items.shape[1:] or len(own) != len(queries):
        raise ValueError(f"retrieval: embeddings {queries.shape} and {items.shape}, {len(own)} targets, do not fit")
    for rows_of in (queries, items):
        if not all(np.isfinite(rows_of[part]).all() for part in _parts(len(rows_of), ITEMS)):
            raise ValueError("retrieval: an embedding is not finite; the embeddings of this run are broken")
    items, times, place = _distinct(items)
    own = place[own]
    wanted = pair_products(queries, items, np.arange(len(queries)), own)
    centre = torch.from_numpy(items.mean(axis=0, dtype=np.float64))
    dtype, dim = _rough_dtype(len(queries), len(items)), items.shape[1]
    length, error = np.empty(len(queries)), np.empty(len(queries))
    middle = np.empty(len(queries))  # the own product with the centred item
    for part in _parts(len(queries), QUERIES):
        x = torch.from_numpy(queries[part]).double()
        length[part], error[part] = x.norm(dim=1), (x - x.to(dtype).double()).norm(dim=1)
        middle[part] = wanted[part] - (x @ centre).numpy()
    out = np.zeros(len(queries), dtype=np.int64)
    for columns in _parts(len(items), ITEMS):
        y = torch.from_numpy(items[columns]).double()
        centred, furthest = y - centre, float(y.norm(dim=1).max())
        rough = centred.to(dtype)
        off = float((centred - rough.double()).norm(dim=1).max())
        longest = float(rough.double().norm(dim=1).max())
        del y, centred
        band = error * longest + length * off + dim * 2.0**-23 * (length + error) * longest
        # Double precision's own rounding, of the centre and of the products with it, and numbers too small for float32.
        band += dim * 2.0**-50 * length * (longest + off + float(centre.norm())) + 2.0**-100
        low, high = (torch.from_numpy(edge[:, None]).to(dtype) for edge in (middle - band, middle + band))
        single = dim * 2.0**-23 * length * furthest + 2.0**-100
        weight = None if times is None else times[columns]
        jobs = (
            partial(
                _count, queries[rows], items[columns], rough, low[rows], high[rows], wanted[rows], single[rows], weight
            )
            for rows in _parts(len(queries), QUERIES)
        )
        out += np.concatenate(_side_by_side(list(jobs)))
    return out


def _count(
    queries: np.ndarray,
    items: np.ndarray,
    rough: Tensor,
    low: Tensor,
    high: Tensor,
    wanted: np.ndarray,
    single: np.ndarray,
    weight: np.ndarray | None,
) -> np.ndarray:
    """``at_least`` of one block, int64 [n]: what is above ``high`` counts, what is between is looked at again."""
    x = torch.from_numpy(queries)
    product = x.to(rough.dtype) @ rough.T
    least, most = _sortable(low.clone()), _sortable(high.clone())
    below = torch.from_numpy(least[:, 0] <= 0)  # else bits are in order as they are
    if product.dtype == torch.bfloat16 and below.any():
        product[below] = torch.from_numpy(_sortable(product[below])).view(torch.bfloat16)
    about = product.view(torch.int16).numpy() if product.dtype == torch.bfloat16 else product.numpy()
    above = about > most
    out = np.count_nonzero(above, axis=1) if weight is None else above @ weight
    near = np.flatnonzero((about >= least) ^ above)
    if len(near):
        query, item = np.divmod(near, len(items))
        start = np.r_[0, np.cumsum(np.bincount(query, minlength=len(x)))]
        ahead = _products(x, torch.from_numpy(items), start, item) - wanted[query]
        found = ahead > 0
        open_ = np.flatnonzero(np.abs(ahead) <= single[query])
        found[open_] = pair_products(queries, items, query[open_], item[open_]) >= wanted[query[open_]]
        out += np.bincount(query, found if weight is None else found * weight[item], len(x)).astype(np.int64)
    return out


def _side_by_side(jobs: Sequence[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    """What the jobs return, each run by one thread: threads that never wait for each other lose least to other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda job: job(), jobs))
    finally:
        torch.set_num_threads(threads)


def pair_products(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Inner products of a[rows[i]] with b[columns[i]] in double precision, float64 [P] (a, b float32)."""
    out = np.empty(len(rows))
    for part in _parts(len(rows), QUERIES):
        x, y = torch.from_numpy(a[rows[part]]).double(), torch.from_numpy(b[columns[part]]).double()
        out[part] = _products(x, y, np.arange(len(x) + 1), np.arange(len(x)))
    return out


def _products(x: Tensor, y: Tensor, start: np.ndarray, column: np.ndarray) -> np.ndarray:
    """x[i] . y[column[k]] for k in start[i] : start[i + 1], in their dtype; no pair's arithmetic depends on others."""
    wanted = torch.sparse_csr_tensor(
        torch.from_numpy(start.astype(np.int32)),
        torch.from_numpy(column.astype(np.int32)),
        torch.zeros(len(column), dtype=x.dtype),
        (len(x), len(y)),
        check_invariants=False,
    )
    return torch.sparse.sampled_addmm(wanted, x, y.T, beta=0).values().numpy()


def _rough_dtype(queries: int, items: int) -> torch.dtype:
    """bfloat16 for large products where the processor multiplies it (with sums in float32), else float32."""
    quick = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    large = queries >= QUERIES and items >= ITEMS
    return torch.bfloat16 if quick and large and torch.backends.mkldnn.is_available() else torch.float32


def _sortable(values: Tensor) -> np.ndarray:
    """Numbers in the order of ``values``: float32 as they are, bfloat16 as int16 (in place)."""
    if values.dtype != torch.bfloat16:
        return values.numpy()
    bits = values.view(torch.int16).numpy()
    negative = bits >> 15  # -1 or 0
    bits &= 0x7FFF
    bits ^= negative
    bits -= negative  # sign and magnitude to two's complement: both zeros become 0
    return bits


def _distinct(items: np.ndarray) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Distinct rows, how often each comes (None where all come once) and the place of every row among them.

    Without it, a collapsed encoder would leave all pairs to double precision.
    """
    seen: dict[bytes, int] = {}
    place = np.empty(len(items), dtype=np.int64)
    for i, row in enumerate(items):
        place[i] = seen.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), len(seen))
    if len(seen) == len(items):
        return items, None, place
    _, first = np.unique(place, return_index=True)
    return items[first], np.bincount(place), place


def _parts(count: int, size: int) -> list[slice]:
    """``count`` things in parts of at most ``size``, all about as large."""
    edges = np.linspace(0, count, -(-count // size) + 1).astype(int).tolist()
    return [slice(a, b) for a, b in pairwise(edges)]
