"""Pictures that show the same exposure, found from pixels alone: shards -> pairs.

A copy may be encoded again, resized, windowed otherwise, inverted or cropped by up to ``MAX_CROP`` of each side. Three
steps, each far cheaper a picture than the next: (1) a small locally normalised thumbnail; (2) its nearest neighbours
among all thumbnails, in a space of 256 dimensions fitted on the pictures at hand, where the thumbnail also asks
as each of 16 crops of itself would; (3) registration of the two pictures and the correlation of their detail.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import joblib  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm

from pipeline.audit.neighbours import (
    MAX_CROP,
    NEIGHBOURS,
    NONE,
    SCALE,
    SIDE,
    CandidatePairs,
    Floats,
    candidate_pairs,
    frames,
)
from pipeline.datasets import Table, facts
from pipeline.storage.parquet import write_table
from pipeline.storage.pictures import Grey
from pipeline.storage.processes import end_with_parent
from pipeline.storage.shards import load_view
from pipeline.study import Study, View

TASK_SIZE = 16  # pictures or pairs of a task
TASKS = 16  # that are worth a process: one takes a second to start
DETAIL = 192  # pixels of the side on which two pictures are compared, or the smaller picture's
ENOUGH = 128  # pixels of that side from which on ``min_correlation`` is what a copy needs
MIN_COARSE = 0.82  # correlation of the finest detail of two thumbnails below which pictures are not opened
MIN_TEXTURE = 0.1  # share of a thumbnail that must not be flat

LINEAR = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
CUBIC = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP


class AuditImage(NamedTuple):
    """One view and whose it is."""

    dataset: str
    patient: str
    study: str
    split: str
    view: View


def images_of(studies: Sequence[Study]) -> list[AuditImage]:
    """Every view of the studies, in order."""
    return [AuditImage(s.dataset, s.patient, s.study, s.split, v) for s in studies for v in s.views]


# ---- thumbnails


def normalise_locally(image: Floats, smooth: float, wide: float, local: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Band-pass and divide by the local deviation: what gamma, window, contrast and CLAHE change least.

    Args:
        image: float32 [H, W], grey levels.
        smooth: deviation in pixels of the Gaussian that takes off noise (0: none); ``wide`` of that which is taken off
            as background; ``local`` of the window in which the deviation is measured.

    Returns:
        float32 [H, W] within ±4, and bool [H, W], false where the picture is flat. An inverted picture gives the
        negative.
    """
    fine = cv2.GaussianBlur(image, (0, 0), smooth) if smooth else image
    detail = fine - cv2.GaussianBlur(fine, (0, 0), wide)
    window = 2 * round(1.73 * local) + 1  # a box as wide as the Gaussian, and many times faster
    deviation = np.sqrt(np.maximum(cv2.blur(detail * detail, (window, window)), 0))  # sums that slide may end below 0
    floor = max(0.5, 0.2 * float(np.sqrt(np.mean(detail * detail))))  # else a clipped window leaves only noise
    return np.clip(detail / (deviation + floor), -4, 4), deviation > floor


def square(image: Grey, side: int) -> Floats:
    """uint8 [H, W] as float32 [side, side]; the aspect is dropped."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)


def thumbnail(image: Grey) -> tuple[NDArray[np.int8], float]:
    """int8 [SIDE, SIDE] of the normalised picture, and the share of it that is not flat."""
    values, textured = normalise_locally(square(image, SIDE), 0.7, 4.0, 4.0)
    return np.rint(values * (SCALE - 1)).astype(np.int8), float(textured.mean())


def thumbnails(images: Sequence[AuditImage], workers: int) -> tuple[NDArray[np.int8], Floats]:
    """Thumbnails int8 [n, SIDE, SIDE] of all images, and their shares of texture float32 [n]."""
    thumbs = np.zeros((len(images), SIDE, SIDE), np.int8)
    texture = np.zeros(len(images), np.float32)
    starts = range(0, len(images), TASK_SIZE)
    tasks = ([i.view for i in images[at : at + TASK_SIZE]] for at in starts)
    for number, (part, share) in enumerate(results_in_order(_thumb_task, tasks, len(starts), workers, "thumbnails")):
        thumbs[number * TASK_SIZE : number * TASK_SIZE + len(part)] = part
        texture[number * TASK_SIZE : number * TASK_SIZE + len(part)] = share
    return thumbs, texture


def _thumb_task(views: list[View]) -> tuple[NDArray[np.int8], Floats]:
    parts, shares = zip(*(thumbnail(load_view(v)) for v in views), strict=True)
    return np.stack(parts), np.array(shares, np.float32)


def results_in_order(
    job: Callable[[Any], Any], tasks: Iterable[Any], count: int, workers: int, name: str
) -> Iterator[Any]:
    """The job's results in the order of the ``count`` tasks, by ``workers`` processes (0: one a core)."""
    workers = min(workers or joblib.cpu_count(), count // TASKS)
    done = partial(tqdm, total=count, desc=f"audit: {name}", mininterval=1.0)
    if workers <= 1:
        with threadpool_limits(1):  # as in a pool: the number of threads may change the last bit of a sum
            yield from done(map(job, tasks))
        return
    # Spawned, as a fork beside library threads can hang.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin) as pool:
        yield from done(_bounded(pool, job, tasks, 4 * workers))


def _begin() -> None:
    """One thread a process; and none outlives a parent that was killed."""
    threadpool_limits(1)
    end_with_parent()


def _bounded(pool: ProcessPoolExecutor, job: Callable[[Any], Any], tasks: Iterable[Any], most: int) -> Iterator[Any]:
    """As ``pool.map``, with at most ``most`` tasks handed out."""
    pending: deque[Future[Any]] = deque()
    for task in tasks:
        pending.append(pool.submit(job, task))
        if len(pending) >= most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# ---- comparing two pictures


def register(outer: Floats, inner: Floats, frame: Floats, rounds: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Find which part of ``outer`` is ``inner`` by Gauss-Newton on four numbers (Lucas and Kanade 1981).

    Args:
        outer: normalised picture float32 [S, S]; ``inner`` likewise, its sign as that of ``outer``.
        frame: left, top, width and height of the first guess, as shares of the outer's sides.

    Returns:
        The frame, ``outer`` seen through it float32 [S, S], and where the frame is within it, bool [S, S]. A copy is
        a rectangle of the other picture: that it may not be turned tells copies from other exposures of a patient.
    """
    side = len(inner)
    at = (np.arange(side, dtype=np.float32) + 0.5) / side
    guess = frame.astype(np.float64)
    for step in range(rounds + 1):
        left, top, width, height = guess
        matrix = np.array(
            [
                [width, 0, (left + width / (2 * side)) * side - 0.5],
                [0, height, (top + height / (2 * side)) * side - 0.5],
            ]
        )
        seen = cv2.warpAffine(
            outer, matrix, (side, side), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
        )
        x, y = left + width * at, top + height * at
        inside = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))
        if step == rounds:
            break
        across = cv2.Sobel(seen, cv2.CV_32F, 1, 0, scale=side / 8 / width) * inside
        down = cv2.Sobel(seen, cv2.CV_32F, 0, 1, scale=side / 8 / height) * inside
        slopes = np.stack([across, down, across * at, down * at[:, None]]).reshape(4, -1)
        wrong = ((seen - inner) * inside).ravel()
        square = (slopes @ slopes.T).astype(np.float64)
        change = np.linalg.solve(square + 1e-3 * np.trace(square) / 4 * np.eye(4), (slopes @ wrong).astype(np.float64))
        guess = np.clip(guess - change, [-0.2, -0.2, 0.6, 0.6], [0.2, 0.2, 1.4, 1.4])
    return guess.astype(np.float32), seen, inside


def correlation(a: Floats, b: Floats, where: NDArray[np.bool_]) -> float:
    """Pearson's correlation of two pictures where ``where`` is true; 0 where that is under a quarter of them."""
    if where.mean() < 0.25:
        return 0.0
    x, y = a[where].astype(np.float64), b[where].astype(np.float64)
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / max(float(np.sqrt((x @ x) * (y @ y))), 1e-9))


def look_closely(outer: Grey, inner: Grey, frame: Floats, sign: int) -> tuple[float, Floats, int]:
    """The correlation of the finest detail that two pictures can show, where neither is black or white.

    Args:
        outer, inner: uint8 [H, W] of any sizes; ``frame`` a guess to about 1 % where ``inner`` is in ``outer``.
        sign: -1 where one of them is inverted.

    Returns:
        The correlation, the frame after registration, and the pixels of the side on which they were compared.
    """
    side = min(DETAIL, *outer.shape, *inner.shape)
    still = np.array([0, 0, 1, 1], np.float32)
    for pixels, rounds in ((side // 2, 3), (side, 2)):
        target = normalise_locally(square(inner, pixels), 0.7, 2.0, 4.0)[0] * np.float32(sign)
        move = register(normalise_locally(_part(outer, frame, pixels), 0.7, 2.0, 4.0)[0], target, still, rounds)[0]
        frame = np.concatenate([frame[:2] + move[:2] * frame[2:], frame[2:] * move[2:]])
    a, b = _part(outer, frame, side), square(inner, side)
    seen, here = normalise_locally(a, 0.0, 1.0, 8.0)
    own, there = normalise_locally(b, 0.0, 1.0, 8.0)
    clipped = (np.minimum(a, b) <= 3) | (np.maximum(a, b) >= 252)  # a window may have cut off what was there
    where = here & there & (cv2.dilate(clipped.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0)
    edge = max(2, side // 32)
    where[:edge] = where[-edge:] = where[:, :edge] = where[:, -edge:] = False
    return correlation(seen, own * np.float32(sign), where), frame, side


def _part(image: Grey, frame: Floats, side: int) -> Floats:
    """float32 [side, side]: the part of uint8 [H, W] within a frame, sampled once and about as finely as stored."""
    left, top, width, height = (float(v) for v in frame)
    columns, rows = round(side / width), round(side / height)
    small = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.float32)
    x, y = width * columns / side, height * rows / side
    matrix = np.array([[x, 0, left * columns + x / 2 - 0.5], [0, y, top * rows + y / 2 - 0.5]])
    return cv2.warpAffine(small, matrix, (side, side), flags=CUBIC, borderMode=cv2.BORDER_REPLICATE)


def _fine(image: Floats) -> Floats:
    """The finest detail: what is all that tells one chest from another of the same build."""
    return np.asarray(image - cv2.GaussianBlur(image, (0, 0), 1.0), np.float32)


Compare = tuple[View, View, NDArray[np.int8], NDArray[np.int8], Floats, int]


def _compare_task(task: list[Compare]) -> list[tuple[float, int]]:
    return [_compare(*pair) for pair in task]


def _compare(
    outer: View, inner: View, a: NDArray[np.int8], b: NDArray[np.int8], frame: Floats, sign: int
) -> tuple[float, int]:
    """The correlation of two views and the pixels of the side it was measured on.

    It is 0 where their thumbnails already differ or neither is a crop of the other.
    """
    thumb = b.astype(np.float32) * np.float32(sign)
    frame, seen, inside = register(a.astype(np.float32), thumb, frame, 6)
    inside[:2] = inside[-2:] = inside[:, :2] = inside[:, -2:] = False
    if correlation(_fine(seen), _fine(thumb), inside) < MIN_COARSE:
        return 0.0, SIDE
    value, frame, side = look_closely(load_view(outer), load_view(inner), frame, sign)
    cuts = np.concatenate([frame[:2], 1 - frame[:2] - frame[2:]])
    return (round(value, 4) if np.abs(cuts).max() < 2 * MAX_CROP else 0.0), side


def threshold(min_correlation: float, side: NDArray[Any]) -> NDArray[Any]:
    """The correlation that makes a copy: on less than ``ENOUGH`` pixels a side there is less to tell by, so more of it
    must agree, up to all of it where there is nothing."""
    return 1 - (1 - min_correlation) * np.minimum(1, side / ENOUGH)


# ---- all of it

IDS = ("dataset", "patient", "study", "view", "split")
PAIR_SCHEMA = pa.schema(
    [
        *((f"{name}_{side}", pa.string()) for side in "ab" for name in IDS),
        ("correlation", pa.float32()),
        ("inverted", pa.bool_()),
        ("same_patient", pa.bool_()),
    ]
)


def find_pairs(
    images: Sequence[AuditImage], out: Path, min_correlation: float, workers: int = 0, table: Table | None = None
) -> dict[str, int]:
    """Find the pairs of images that are copies of one exposure and write them as Parquet (``PAIR_SCHEMA``).

    Images of two data sets that are the same bytes (one archive read twice) are copies without a look; only the first
    is compared with others. Each unordered pair is there once, the image first whose (dataset, patient, study, view) is
    smaller, and the rows in that order. ``same_patient`` is null where the two data sets have no patient ids in common.
    The bytes depend on the images and their order, not on ``workers``.

    Args:
        images: views in shards, addressed relative to the working directory.
        min_correlation: of a copy, in 0..1; small pictures need more (``threshold``).
        workers: processes; 0 = one a core.

    Returns:
        Counts: ``images``; ``flat``, too little texture to tell; ``identical``, whose bytes or thumbnail equal those of
        an image before, in the latter case compared with that one only; ``crowded``, in lists too long to compare all;
        ``candidates``; ``pairs``; ``full``, images with as many copies as candidates are kept of one, so that there may
        be more.

    Raises:
        ShardError: a shard is missing or shorter than its index says.
    """
    total, by_digest = len(images), dict[str, int]()
    twins = [(by_digest.setdefault(image.view.digest or str(n), n), n) for n, image in enumerate(images)]
    row = partial(_row, table=table)
    rows = [row(images[f], images[n], 1.0, False) for f, n in twins if images[f].dataset != images[n].dataset]
    twinned = len(rows)
    images = [images[n] for f, n in twins if images[f].dataset == images[n].dataset]
    thumbs, texture = thumbnails(images, workers)
    usable = np.flatnonzero(texture >= MIN_TEXTURE)
    first: dict[bytes, int] = {}
    equal = [(first.setdefault(hashlib.blake2b(thumbs[i].tobytes()).digest(), int(i)), int(i)) for i in usable]
    kept = np.array([i for f, i in equal if f == i], np.int64)
    again = np.array([(f, i) for f, i in equal if f != i], np.int64).reshape(-1, 2)
    found, crowded = candidate_pairs(thumbs[kept]) if len(kept) > 1 else (NONE, 0)
    whole = np.broadcast_to(frames()[0], (len(again), 4))
    looks = CandidatePairs(
        np.concatenate([kept[found.outer], again[:, 0]]),
        np.concatenate([kept[found.inner], again[:, 1]]),
        np.concatenate([found.frame, whole]),
        np.concatenate([found.sign, np.ones(len(again), np.int8)]),
    )
    pairs = zip(*looks, strict=True)
    tasks = (
        [(images[o].view, images[i].view, thumbs[o], thumbs[i], frame, int(sign)) for o, i, frame, sign in part]
        for part in iter(lambda: list(islice(pairs, TASK_SIZE)), [])
    )
    results = results_in_order(_compare_task, tasks, -(-len(looks.outer) // TASK_SIZE), workers, "pairs")
    values, sides = np.array([v for part in results for v in part]).reshape(-1, 2).T
    copies = np.flatnonzero(values >= threshold(min_correlation, sides))
    rows += [
        row(images[looks.outer[c]], images[looks.inner[c]], float(values[c]), bool(looks.sign[c] < 0)) for c in copies
    ]
    rows.sort(key=lambda line: tuple(line.values())[:10])
    write_table(out, pa.Table.from_pylist(rows, schema=PAIR_SCHEMA))
    ends = np.concatenate([looks.outer[copies], looks.inner[copies]])
    return {
        "images": total,
        "flat": len(images) - len(usable),
        "identical": twinned + len(again),
        "crowded": crowded,
        "candidates": len(looks.outer),
        "pairs": len(rows),
        "full": int((np.bincount(ends, minlength=1) >= NEIGHBOURS).sum()),
    }


def _row(one: AuditImage, other: AuditImage, value: float, inverted: bool, table: Table | None) -> dict[str, Any]:
    """A row of ``PAIR_SCHEMA``."""
    pair = sorted((one, other), key=lambda i: (i.dataset, i.patient, i.study, i.view.id))
    known = one.dataset == other.dataset and facts(one.dataset, table).patient_ids
    row: dict[str, Any] = {}
    for side, i in zip("ab", pair, strict=True):
        ids = (i.dataset, i.patient, i.study, i.view.id, i.split)
        row.update({f"{name}_{side}": id_ for name, id_ in zip(IDS, ids, strict=True)})
    same = one.patient == other.patient if known else None
    return {**row, "correlation": value, "inverted": inverted, "same_patient": same}
