"""Which of many thumbnails may be copies of one another, without comparing all with all.

Vectors of the thumbnails are in a space fitted on them. An inverted file (k-means lists, of which a question searches
the nearest few; Sivic and Zisserman 2003) finds the neighbours of each, and of each of 16 crops of each. Nothing knows
a vector from its negative, so that inverted pictures are found with the same questions.

No figure needs it to be ours: faiss-cpu's inverted file finds the same copies in 1.2 times the CPU time.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

SIDE = 64  # pixels of a thumbnail's side
SCALE = 32  # thumbnail bytes to one local deviation
GRID = 32  # pixels of the side of what the fitted space is made from
DIMENSIONS = 256
MAX_CROP = 0.05  # of a side, that the search looks for
SAMPLE = 2000  # pictures the space is fitted on
NEIGHBOURS = 6  # candidates a picture has at most
MIN_COSINE = 0.65  # of a candidate
MIN_LIST = 64  # pictures in one list of the inverted file, on average, at least
MAX_LIST = 4096  # a longer list is split: no part of the search is quadratic
PROBES = 8  # lists a question is put to
BLOCK = 4096  # pictures whose questions are asked at once


class CandidatePairs(NamedTuple):
    """Pairs to look at: ``outer`` and ``inner`` int64 [m], positions of two images; ``frame`` float32 [m, 4], where the
    inner one is in the outer one (left, top, width, height as shares of the outer's sides); ``sign`` int8 [m], -1
    where one is inverted."""

    outer: Ints
    inner: Ints
    frame: Floats
    sign: NDArray[np.int8]


NONE = CandidatePairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.int8))


# ---- the space


def window(low: float, high: float) -> Floats:
    """The matrix [GRID, SIDE] that averages the part [low, high] (shares of the side) of SIDE pixels to GRID."""
    edges = SIDE * np.linspace(low, high, GRID + 1)
    pixel = np.arange(SIDE)
    over = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    over = np.clip(over, 0, None)
    return np.asarray(over / over.sum(1, keepdims=True), np.float32)


def frames() -> Floats:
    """float32 [17, 4]: the whole picture, then crops of which one is within MAX_CROP / 4 of any crop looked for."""
    near, far = MAX_CROP / 4, MAX_CROP * 3 / 4
    cuts = [(0.0, 0.0, 0.0, 0.0), *product((near, far), repeat=4)]
    return np.array([(left, top, 1 - left - right, 1 - top - bottom) for left, top, right, bottom in cuts], np.float32)


def look(thumbs: NDArray[Any], frame: Floats) -> Floats:
    """float32 [n, GRID²]: thumbnails [n, SIDE, SIDE] seen through a frame (4)."""
    left, top, width, height = frame.tolist()
    across, down = window(left, left + width), window(top, top + height)
    seen = down @ (thumbs.astype(np.float32) / np.float32(SCALE)) @ across.T
    return np.asarray(seen.reshape(len(thumbs), -1), np.float32)


def fit_space(thumbs: NDArray[np.int8]) -> Floats:
    """The linear map [GRID², d] to directions that differ between pictures and hold still when a frame is a little off.

    Linear discriminant analysis without centring (so that an inverted picture's vector is the negative): second moments
    of the pictures, against those of the differences that a quarter of MAX_CROP makes. The directions kept have unit
    second moment, so that vectors of pictures which are no copies are about orthogonal.
    """
    some = thumbs[np.unique(np.linspace(0, len(thumbs) - 1, min(SAMPLE, len(thumbs))).astype(int))]
    few = some[:: -(-len(some) // 256)]
    rng = np.random.default_rng(0)
    whole = look(some, frames()[0]).astype(np.float64)
    spread = whole.T @ whole / len(some)
    within = np.zeros_like(spread)
    for frame in frames()[1:]:
        cut = rng.uniform(-1, 1, 4) * MAX_CROP / 4
        off = np.clip(frame + np.array([cut[0], cut[1], cut[2] - cut[0], cut[3] - cut[1]], np.float32), 0, 1)
        difference = (look(few, off) - look(few, frame)).astype(np.float64)
        within += difference.T @ difference / len(few) / 16
    mean = np.eye(len(spread)) * np.trace(spread) / len(spread)
    within += 0.1 * mean  # noise, and changes of grey levels
    prior = 200 / (200 + len(some))  # few pictures show less variety than there is
    spread = (1 - prior) * spread + prior * mean
    root = np.linalg.inv(np.linalg.cholesky(within))
    kept = root.T @ np.linalg.eigh(root @ spread @ root.T)[1][:, ::-1][:, :DIMENSIONS]
    return np.asarray(kept / np.sqrt(np.sum(kept * (spread @ kept), axis=0)), np.float32)


def unit_rows(vectors: Floats) -> Floats:
    """Rows of length one; a row of zeros stays."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-6), np.float32)


# ---- neighbours: an inverted file whose lists do not know a vector from its negative


def cluster(vectors: Floats, lists: int, rounds: int = 4) -> Floats:
    """Centres [lists, d] of unit vectors [n, d] up to sign: k-means by |cosine|, from evenly spaced first centres."""
    some = vectors[np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), 32 * lists)).astype(int))]
    centres = some[np.linspace(0, len(some) - 1, lists).astype(int)].copy()
    for _ in range(rounds):
        owner, sign = nearest(some, centres, 1)
        total = np.zeros_like(centres)
        np.add.at(total, owner[:, 0], some * sign)
        centres = np.where(np.abs(total).max(1, keepdims=True) > 0, unit_rows(total), centres)
    return centres


def nearest(vectors: Floats, centres: Floats, count: int) -> tuple[Ints, Floats]:
    """The ``count`` centres of largest |cosine| to each vector, int64 [n, count], and the signs, float32 [n, count]."""
    owners = np.empty((len(vectors), count), np.int64)
    signs = np.empty((len(vectors), count), np.float32)
    for at in range(0, len(vectors), BLOCK):
        cosine = vectors[at : at + BLOCK] @ centres.T
        best = np.argpartition(-np.abs(cosine), count - 1, axis=1)[:, :count]
        owners[at : at + BLOCK] = best
        signs[at : at + BLOCK] = np.where(np.take_along_axis(cosine, best, 1) < 0, -1, 1)
    return owners, signs


def candidate_pairs(thumbs: NDArray[np.int8]) -> tuple[CandidatePairs, int]:
    """Pairs of thumbnails int8 [n, SIDE, SIDE] that may be copies, at most ``NEIGHBOURS`` a picture that asks.

    Returns also how many pictures are in lists so long that they were split, so that some were not compared.
    """
    n, whole = len(thumbs), frames()[0]
    space = fit_space(thumbs)
    known = np.concatenate([unit_rows(look(thumbs[a : a + BLOCK], whole) @ space) for a in range(0, n, BLOCK)])
    centres = cluster(known, max(1, round(n / max(MIN_LIST, n**0.5 / 4))))
    owner = nearest(known, centres, 1)[0][:, 0]
    order = np.argsort(owner, kind="stable")
    members = np.split(order, np.searchsorted(owner[order], np.arange(1, len(centres))))
    parts = [[list_[p :: -(-len(list_) // MAX_LIST)] for p in range(-(-len(list_) // MAX_LIST))] for list_ in members]
    crowded = sum(len(list_) for list_ in members if len(list_) > MAX_LIST)
    hits = [_ask(thumbs[at : at + BLOCK], at, space, centres, known, parts) for at in range(0, n, BLOCK)]
    asker, member, number, cosine = (np.concatenate(column) for column in zip(*hits, strict=True))
    # A pair is found from both sides; the better finding stays.
    best = _first_of(np.minimum(asker, member) * n + np.maximum(asker, member), np.abs(cosine))
    best = best[np.lexsort((np.maximum(asker, member)[best], np.minimum(asker, member)[best]))]
    sign = np.where(cosine[best] < 0, -1, 1).astype(np.int8)
    return CandidatePairs(asker[best], member[best], frames()[number[best]], sign), crowded


Hits = tuple[Ints, Ints, Ints, Floats]  # who asked, whom it found, as which frame, cosine


def _ask(
    thumbs: NDArray[np.int8], start: int, space: Floats, centres: Floats, known: Floats, parts: list[list[Ints]]
) -> Hits:
    """The nearest of all ``known`` vectors to some pictures, numbered from ``start``, each seen through every frame."""
    m, views = len(thumbs), len(frames())
    asks = np.concatenate([unit_rows(look(thumbs, frame) @ space) for frame in frames()])
    owners = nearest(asks, centres, min(PROBES, len(centres)))[0]
    row = np.repeat(np.arange(m * views), owners.shape[1])
    order = np.argsort(owners.ravel(), kind="stable")
    rows = np.split(row[order], np.searchsorted(owners.ravel()[order], np.arange(1, len(centres))))
    hits: list[Hits] = []
    for of_list, members in zip(rows, parts, strict=True):
        for part, several in enumerate(members):
            mine = of_list[of_list % m % len(members) == part]
            for at in range(0, len(mine), BLOCK):
                some = mine[at : at + BLOCK]
                cosine = asks[some] @ known[several].T
                cosine[(some % m + start)[:, None] == several] = 0  # not itself
                i, j = _above(np.abs(cosine))
                hits.append((some[i] % m + start, several[j], some[i] // m, cosine[i, j]))
    asker, member, number, cosine = (np.concatenate(column) for column in zip(*hits, strict=True))
    best = _first_of(asker * len(known) + member, np.abs(cosine))
    best = best[np.lexsort((member[best], -np.abs(cosine[best]), asker[best]))]
    asked = asker[best]
    best = best[np.arange(len(best)) - np.searchsorted(asked, asked) < NEIGHBOURS]
    return asker[best], member[best], number[best], cosine[best]


def _above(cosine: Floats) -> tuple[Ints, Ints]:
    """Rows and columns above ``MIN_COSINE``; where there are many, no more than ``NEIGHBOURS`` of a row."""
    rows, columns = np.nonzero(cosine > MIN_COSINE)
    if len(rows) > NEIGHBOURS * len(cosine):
        columns = np.argpartition(-cosine, NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS].ravel()
        rows = np.repeat(np.arange(len(cosine)), NEIGHBOURS)
        close = cosine[rows, columns] > MIN_COSINE
        rows, columns = rows[close], columns[close]
    return rows, columns


def _first_of(key: Ints, score: Floats) -> Ints:
    """Positions of the highest score of every key, in the order of the keys; of equal scores the first."""
    order = np.lexsort((np.arange(len(key)), -score, key))
    return order[np.unique(key[order], return_index=True)[1]]
