"""Which of many thumbnails may be copies of one another, without comparing all with all.

Vectors of the thumbnails are in a space fitted on them. An inverted file (k-means lists, of which a question searches
the nearest few; Sivic and Zisserman 2003) finds the neighbours of each, and of each of 272 crops of each. Nothing knows
a vector from its negative, so that inverted pictures are found with the same questions.

No figure needs it to be ours: faiss-cpu's inverted file found the same copies in 1.2 times the CPU time, with 16 crops.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any, NamedTuple

import joblib  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Thumbs = NDArray[np.int8]  # [n, 2, SIDE, SIDE]: pictures as they are compared with, and as they show a crop's detail

SIDE = 64  # pixels of a thumbnail's side
SCALE = 32  # thumbnail bytes to one local deviation
GRID = 14  # pixels of the side of what the fitted space is made from
DIMENSIONS = 128
MAX_CROP = 0.25  # of a side, that the search looks for
CUTS = 4  # a side is asked for with so many parts of it cut off
SMALL_CROP = 0.05  # of a side: the usual crops,
SMALL_CUTS = 2  # each of which is nearer to one that is asked for,
SMALL_WEIGHT = 0.85  # so that its cosine has to be higher than that of the others
SAMPLE = 2000  # pictures the space is fitted on
NEIGHBOURS = 20  # candidates a picture has at most
MIN_COSINE = 0.56  # of a candidate
MIN_LIST = 32  # pictures in one list of the inverted file, on average, at least
MAX_LIST = 4096  # a longer list is split: no part of the search is quadratic
PROBES = 8  # lists a question is put to
BLOCK = 4096  # vectors compared at once
ASKED = 128  # pictures whose questions are asked at once


class CandidatePairs(NamedTuple):
    """Pairs to look at: ``outer`` and ``inner`` int64 [m], positions of two images; ``frame`` float32 [m, 4], where the
    inner one is in the outer one (left, top, width, height as shares of the outer's sides); ``sign`` int8 [m], -1
    where one is inverted."""

    outer: Ints
    inner: Ints
    frame: Floats
    sign: NDArray[np.int8]


WHOLE = np.array([0, 0, 1, 1], np.float32)  # the frame of all of a picture
NONE = CandidatePairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 4), np.float32), np.empty(0, np.int8))


# ---- the space


def window(low: float, high: float) -> Floats:
    """The matrix [GRID, SIDE] that averages the part [low, high] (shares of the side) of SIDE pixels to GRID."""
    edges = SIDE * np.linspace(low, high, GRID + 1)
    pixel = np.arange(SIDE)
    over = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
    over = np.clip(over, 0, None)
    return np.asarray(over / over.sum(1, keepdims=True), np.float32)


def _parts(most: float, cuts: int) -> list[tuple[float, float]]:
    """Of a side, parts (low, high) of which one is within most / cuts / 2 at either end of any that lacks up to
    ``most`` there."""
    ends = [(n + 0.5) / cuts * most for n in range(cuts)]
    return [(low, 1 - high) for low, high in product(ends, repeat=2)]


def _crops() -> list[tuple[int, list[tuple[float, float]]]]:
    """The parts of rows and columns that are asked for, and by which of a picture's thumbnails: small crops, which keep
    its detail, more closely than large ones."""
    return [(0, _parts(SMALL_CROP, SMALL_CUTS)), (1, _parts(MAX_CROP, CUTS))]


def frames() -> Floats:
    """float32 [1 + SMALL_CUTS⁴ + CUTS⁴, 4]: the whole picture, then crops, as ``questions`` sees them in order."""
    crops = [
        (left, top, right - left, bottom - top)
        for _, parts in _crops()
        for (top, bottom), (left, right) in product(parts, repeat=2)
    ]
    return np.array([WHOLE, *crops], np.float32)


def look(thumbs: NDArray[np.int8], frame: Floats) -> Floats:
    """float32 [n, GRID²]: thumbnails [n, SIDE, SIDE] seen through a frame (4)."""
    left, top, width, height = frame.tolist()
    across, down = window(left, left + width), window(top, top + height)
    seen = down @ (thumbs.astype(np.float32) / np.float32(SCALE)) @ across.T
    return np.asarray(seen.reshape(len(thumbs), -1), np.float32)


def questions(thumbs: Thumbs, space: Floats) -> Floats:
    """float32 [n, len(frames()), d]: vectors of each picture seen through each of ``frames``, of length one, those of
    small crops of ``SMALL_WEIGHT``."""
    seen = [look(thumbs[:, 0], WHOLE)[:, None]]
    for which, parts in _crops():
        values = thumbs[:, which].astype(np.float32) / np.float32(SCALE)
        windows = np.concatenate([window(*part) for part in parts])  # the same for rows and columns
        several = (windows @ values @ windows.T).reshape(len(thumbs), len(parts), GRID, len(parts), GRID)
        seen.append(several.transpose(0, 1, 3, 2, 4).reshape(len(thumbs), -1, GRID * GRID))
    vectors = unit_rows(np.concatenate(seen, axis=1) @ space)
    vectors[:, 1 : 1 + SMALL_CUTS**4] *= SMALL_WEIGHT
    return vectors


def fit_space(thumbs: Thumbs) -> Floats:
    """The linear map [GRID², d] to directions that differ between pictures and hold still when a frame is a little off.

    Linear discriminant analysis without centring (so that an inverted picture's vector is the negative): second moments
    of the pictures, against those of the differences that the distance to the nearest of ``frames`` makes. The
    directions kept have unit second moment, so that vectors of pictures which are no copies are about orthogonal.
    """
    n, tried, off = len(thumbs), 32, 0.6 * MAX_CROP / CUTS
    at = np.unique(np.linspace(0, n - 1, min(SAMPLE, n)).astype(int))
    few = thumbs[at[:: -(-len(at) // 256)], 1]
    rng = np.random.default_rng(0)
    whole = look(thumbs[at, 0], WHOLE).astype(np.float64)
    spread = whole.T @ whole / len(at)
    within = np.zeros_like(spread)
    for frame in frames()[-1 - rng.permutation(CUTS**4)[:tried]]:
        cut = rng.uniform(-off, off, 4)
        moved = np.clip(frame + np.array([cut[0], cut[1], cut[2] - cut[0], cut[3] - cut[1]], np.float32), 0, 1)
        difference = (look(few, moved) - look(few, frame)).astype(np.float64)
        within += difference.T @ difference / len(few) / tried
    mean = np.eye(len(spread)) * np.trace(spread) / len(spread)
    within += 0.1 * mean  # noise, and changes of grey levels
    prior = 200 / (200 + len(at))  # few pictures show less variety than there is
    spread = (1 - prior) * spread + prior * mean
    root = np.linalg.inv(np.linalg.cholesky(within))
    kept = root.T @ np.linalg.eigh(root @ spread @ root.T)[1][:, ::-1][:, :DIMENSIONS]
    return np.asarray(kept / np.sqrt(np.sum(kept * (spread @ kept), axis=0)), np.float32)


def unit_rows(vectors: Floats) -> Floats:
    """Vectors [..., d] at length one; one of zeros stays."""
    length = np.sqrt(np.einsum("...d,...d->...", vectors, vectors))[..., None]
    return np.asarray(vectors / np.maximum(length, 1e-6), np.float32)


# ---- neighbours: an inverted file whose lists do not know a vector from its negative


def cluster(vectors: Floats, lists: int, rounds: int = 4) -> Floats:
    """Centres [lists, d] of unit vectors [n, d] up to sign: k-means by |cosine|, from evenly spaced first centres."""
    some = vectors[np.unique(np.linspace(0, len(vectors) - 1, min(len(vectors), 32 * lists)).astype(int))]
    centres = some[np.linspace(0, len(some) - 1, lists).astype(int)].copy()
    for _ in range(rounds):
        owner = nearest(some, centres, 1)[:, 0]
        sign = np.sign(np.einsum("nd,nd->n", some, centres[owner]))
        total = np.zeros_like(centres)
        np.add.at(total, owner, some * sign[:, None])
        centres = np.where(np.abs(total).max(1, keepdims=True) > 0, unit_rows(total), centres)
    return centres


def nearest(vectors: Floats, centres: Floats, count: int) -> NDArray[np.uint16]:
    """The ``count`` centres of largest |cosine| to each vector, uint16 [n, count], the nearest first.

    A row's largest taken ``count`` times: for so few faster than a partial sort.
    """
    owners = np.empty((len(vectors), count), np.uint16)
    for at in range(0, len(vectors), BLOCK):
        cosine = np.abs(vectors[at : at + BLOCK] @ centres.T)
        rows = np.arange(len(cosine))
        for rank in range(count):
            best = owners[at : at + BLOCK, rank] = cosine.argmax(1)
            cosine[rows, best] = -1
    return owners


def candidate_pairs(thumbs: Thumbs, workers: int = 0) -> tuple[CandidatePairs, int]:
    """Pairs of pictures that may be copies, at most ``NEIGHBOURS`` a picture that asks, by ``workers`` threads (0: one
    a core), on whose number nothing depends.

    Returns also how many pictures are in lists so long that they were split, so that some were not compared.
    """
    with threadpool_limits(1):  # of a product each: more would wait for one another, and may change its last bit
        return _candidate_pairs(thumbs, workers or joblib.cpu_count())


def _candidate_pairs(thumbs: Thumbs, workers: int) -> tuple[CandidatePairs, int]:
    n = len(thumbs)
    space = fit_space(thumbs)
    known = np.concatenate([unit_rows(look(thumbs[a : a + BLOCK, 0], WHOLE) @ space) for a in range(0, n, BLOCK)])
    centres = cluster(known, min(np.iinfo(np.uint16).max, max(1, round(n / max(MIN_LIST, n**0.5 / 4)))))
    owner = nearest(known, centres, 1)[:, 0]
    order = np.argsort(owner, kind="stable")
    members = np.split(order, np.searchsorted(owner[order], np.arange(1, len(centres))))
    parts = [[list_[p :: -(-len(list_) // MAX_LIST)] for p in range(-(-len(list_) // MAX_LIST))] for list_ in members]
    crowded = sum(len(list_) for list_ in members if len(list_) > MAX_LIST)

    def ask(at: int) -> Hits:
        return _ask(questions(thumbs[at : at + ASKED], space), at, centres, known, parts)

    with ThreadPoolExecutor(workers) as pool:
        hits = list(pool.map(ask, range(0, n, ASKED)))
    asker, member, number, cosine = (np.concatenate(column) for column in zip(*hits, strict=True))
    # A pair is found from both sides; the better finding stays.
    best = _first_of(np.minimum(asker, member) * n + np.maximum(asker, member), np.abs(cosine))
    best = best[np.lexsort((member[best], asker[best]))]
    sign = np.where(cosine[best] < 0, -1, 1).astype(np.int8)
    return CandidatePairs(asker[best], member[best], frames()[number[best]], sign), crowded


Hits = tuple[Ints, Ints, Ints, Floats]  # who asked, whom it found, as which frame, cosine


def _ask(asks: Floats, start: int, centres: Floats, known: Floats, parts: list[list[Ints]]) -> Hits:
    """The nearest of all ``known`` vectors to some pictures' questions [m, frames, d], numbered from ``start``."""
    m, views = asks.shape[:2]
    asks = asks.reshape(m * views, -1)
    owners = nearest(asks, centres, min(PROBES, len(centres)))
    row = np.repeat(np.arange(m * views), owners.shape[1])
    order = np.argsort(owners.ravel(), kind="stable")  # of 16 bits: sorted by counting
    rows = np.split(row[order], np.searchsorted(owners.ravel()[order], np.arange(1, len(centres))))
    hits: list[Hits] = []
    for of_list, members in zip(rows, parts, strict=True):
        for part, several in enumerate(members):
            mine = of_list[of_list // views % len(members) == part] if len(members) > 1 else of_list
            for at in range(0, len(mine), BLOCK):
                some = mine[at : at + BLOCK]
                cosine = asks[some] @ known[several].T
                i, j = _above(np.abs(cosine))
                hits.append((some[i] // views + start, several[j], some[i] % views, cosine[i, j]))
    asker, member, number, cosine = (np.concatenate(column) for column in zip(*hits, strict=True))
    best = _first_of(asker * len(known) + member, np.abs(cosine))
    best = best[asker[best] != member[best]]
    best = best[rank_of_each(asker[best], np.abs(cosine[best])) < NEIGHBOURS]
    return asker[best], member[best], number[best], cosine[best]


def _above(cosine: Floats) -> tuple[Ints, Ints]:
    """Rows and columns above ``MIN_COSINE``; where there are many, no more of a row than its picture and
    ``NEIGHBOURS``."""
    rows, columns = np.nonzero(cosine > MIN_COSINE)
    most = NEIGHBOURS + 1
    if len(rows) > most * len(cosine):
        columns = np.argpartition(-cosine, most - 1, axis=1)[:, :most].ravel()
        rows = np.repeat(np.arange(len(cosine)), most)
        close = cosine[rows, columns] > MIN_COSINE
        rows, columns = rows[close], columns[close]
    return rows, columns


def rank_of_each(whose: Ints, score: NDArray[Any]) -> Ints:
    """How many of the same one's scores are before each, int64 [n]: the higher, and of equal ones the earlier."""
    order = np.lexsort((-score, whose))
    ordered = whose[order]
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return rank


def _first_of(key: Ints, score: Floats) -> Ints:
    """Positions of the highest score of every key, in the order of the keys; of equal scores the first."""
    order = np.lexsort((np.arange(len(key)), -score, key))
    return order[np.unique(key[order], return_index=True)[1]]
