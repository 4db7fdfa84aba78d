"""Pictures that show the same exposure, found from pixels alone: shards -> pairs.

A copy may be encoded again, resized, windowed otherwise, inverted or cropped by up to ``MAX_CROP`` of each side. Three
steps, each far cheaper a picture than the next: (1) small locally normalised thumbnails; (2) their nearest neighbours
among all, in a space of 128 dimensions fitted on the pictures at hand, where each picture also asks as 272 crops of
itself would; (3) registration of the two pictures and the correlation of their detail.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import joblib  # type: ignore[import-untyped]
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from tqdm import tqdm

from pipeline.audit.compare import KEPT, alike, look_closely, may_be_cut, thumbnail
from pipeline.audit.neighbours import NONE, SIDE, WHOLE, CandidatePairs, Floats, Thumbs, candidate_pairs
from pipeline.datasets import Table, facts
from pipeline.storage.parquet import write_table
from pipeline.storage.processes import end_with_parent
from pipeline.storage.shards import load_view
from pipeline.study import Study, View

TASK_SIZE = 64  # pictures or pairs of a task
TASKS = 16  # that are worth a process: one takes a second to start
MIN_TEXTURE = 0.1  # share of a thumbnail that must not be flat


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


def thumbnails(images: Sequence[AuditImage], workers: int) -> tuple[Thumbs, Floats]:
    """Thumbnails int8 [n, 2, SIDE, SIDE] of all images, and their shares of texture float32 [n]."""
    thumbs = np.zeros((len(images), 2, SIDE, SIDE), np.int8)
    texture = np.zeros(len(images), np.float32)
    starts = range(0, len(images), TASK_SIZE)
    tasks = ([i.view for i in images[at : at + TASK_SIZE]] for at in starts)
    for number, (part, share) in enumerate(results_in_order(_thumb_task, tasks, len(starts), workers, "thumbnails")):
        thumbs[number * TASK_SIZE : number * TASK_SIZE + len(part)] = part
        texture[number * TASK_SIZE : number * TASK_SIZE + len(part)] = share
    return thumbs, texture


def _thumb_task(views: list[View]) -> tuple[Thumbs, Floats]:
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


# ---- pairs


Compare = tuple[list[View], list[View], Thumbs, NDArray[np.int8], Floats, NDArray[np.int8], NDArray[np.int64]]


def _task(images: Sequence[AuditImage], thumbs: Thumbs, looks: CandidatePairs, some: slice) -> Compare:
    outer, inner = looks.outer[some], looks.inner[some]
    views = [[images[n].view for n in side] for side in (outer, inner)]
    return views[0], views[1], thumbs[outer], thumbs[inner, 0], looks.frame[some], looks.sign[some], outer


def _compare(task: Compare) -> list[float]:
    """How far each of some views agrees with another; 0 where their thumbnails already differ or neither is a crop of
    the other."""
    outer, inner, a, b, guess, sign, whose = task
    frames, may_be = alike(a, b, guess, sign, whose)
    found = [0.0] * len(outer)
    for n in np.flatnonzero(may_be):
        if may_be_cut(frames[n]):
            value, frame = look_closely(load_view(outer[n]), load_view(inner[n]), frames[n], int(sign[n]))
            found[n] = round(value, 4) if may_be_cut(frame) else 0.0
    return found


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
        min_correlation: of a copy, in 0..1, as small pictures' counts (``agreement``).
        workers: processes; 0 = one a core.

    Returns:
        Counts: ``images``; ``flat``, too little texture to tell; ``identical``, whose bytes or thumbnail equal those of
        an image before, in the latter case compared with that one only; ``crowded``, in lists too long to compare all;
        ``candidates``; ``pairs``; ``full``, images with as many copies as are looked for of one, so that there may
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
    found, crowded = candidate_pairs(thumbs[kept], workers) if len(kept) > 1 else (NONE, 0)
    whole = np.broadcast_to(WHOLE, (len(again), 4))
    looks = CandidatePairs(
        np.concatenate([kept[found.outer], again[:, 1]]),
        np.concatenate([kept[found.inner], again[:, 0]]),
        np.concatenate([found.frame, whole]),
        np.concatenate([found.sign, np.ones(len(again), np.int8)]),
    )
    starts = range(0, len(looks.outer), TASK_SIZE)
    tasks = (_task(images, thumbs, looks, slice(at, at + TASK_SIZE)) for at in starts)
    results = results_in_order(_compare, tasks, len(starts), workers, "pairs")
    values = np.array([v for part in results for v in part])
    copies = np.flatnonzero(values >= min_correlation)
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
        "full": int((np.bincount(ends, minlength=1) >= KEPT).sum()),
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
