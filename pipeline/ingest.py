"""Archive -> shards, index and an account of every image: reader, decoding processes, writer.

Whatever the number of processes, studies are written in the reader's order, so the same archive gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline import images, sources
from pipeline.params import Ingest, Source
from pipeline.shards import Picture, ShardWriter
from pipeline.study import SPLITS, Reject, Study, write_rejects, write_studies

CHUNK = 8  # studies a task: large enough to hide the cost of handing it over
AHEAD = 4  # tasks a process may be ahead of the writer: what bounds memory
MISSING = "file missing"
CRASHED = "the decoder crashed on it"


class IngestError(RuntimeError):
    """An ingest whose result must not be used; one line."""


def ingest(
    dataset: str, source: Source, options: Ingest, out_shards: Path, out_index: Path, seed: int
) -> dict[str, Any]:
    """Read an archive and write its shards, index, rejects and summary.

    Writes ``out_shards/<dataset>-*.tar``, ``out_shards/rejects.parquet``, ``out_index`` (Parquet) and beside it the
    summary (.json), which is also returned. In it written_images + rejected_images == found_images, where found are the
    images of all listed studies. With ``options.labels_only`` no image is opened and nothing is found or written.

    Raises:
        SourceError: the archive cannot be read at all.
        IngestError: more than ``options.max_rejected`` of the images were rejected; rejects.parquet is written by then.
    """
    out_shards.mkdir(parents=True, exist_ok=True)
    for old in (
        *out_shards.glob(f"{dataset}-*.tar*"),
        out_shards / "rejects.parquet",
        out_index,
        out_index.with_suffix(".json"),
    ):
        old.unlink(missing_ok=True)
    items = list(sources.read(dataset, source, seed))
    studies = [item for item in items if isinstance(item, Study)]
    rejects = [item for item in items if isinstance(item, Reject)]
    written: list[Study] = []
    if not options.labels_only:
        written, more = _write(studies, Path(source.path), dataset, options, out_shards)
        rejects += more
    rejected = sum(r.kind == "image" for r in rejects)
    found = 0 if options.labels_only else sum(len(s.views) for s in studies)
    summary: dict[str, Any] = {
        "dataset": dataset,
        "labels_only": options.labels_only,
        "phantom": (Path(source.path) / "PHANTOM.json").is_file(),
        "listed": _count(studies),
        "written": _count(written),
        "found_images": found,
        "written_images": sum(len(s.views) for s in written),
        "rejected_images": rejected,
        "reasons": dict(sorted(Counter(r.reason for r in rejects).items())),
        "notes": sources.notes(dataset, source),
    }
    write_rejects(out_shards / "rejects.parquet", rejects)
    print(account(summary))
    if not studies:
        raise IngestError(
            f"{dataset}: the archive at {source.path} lists no usable study; see {out_shards}/rejects.parquet"
        )
    share = rejected / found if found else 0.0
    if share > options.max_rejected:
        reasons = Counter(r.reason for r in rejects if r.kind == "image").most_common(3)
        raise IngestError(
            f"{dataset}: {share:.1%} of {found} images rejected, more than ingest.max_rejected = "
            f"{options.max_rejected:.1%} ({'; '.join(f'{reason}: {n}' for reason, n in reasons)}); "
            f"see {out_shards}/rejects.parquet (images are looked for anywhere under {source.path})"
        )
    write_studies(out_index, written)
    out_index.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def account(summary: dict[str, Any]) -> str:
    """The summary as one screen of text: counts per split and per reason."""
    lines = [f"{summary['dataset']}{' (phantom)' if summary['phantom'] else ''}", ""]
    lines.append(f"  {'split':<8}{'studies':>10}{'images':>10}{'written':>10}{'images':>10}")
    for split in SPLITS:
        listed, written = summary["listed"][split], summary["written"][split]
        counts = (listed["studies"], listed["images"], written["studies"], written["images"])
        lines.append(f"  {split:<8}" + "".join(f"{n:>10,}" for n in counts))
    if summary["labels_only"]:
        lines.append("  label files only: no image was opened")
    else:
        lines.append(
            f"  images: {summary['found_images']:,} found = {summary['written_images']:,} written "
            f"+ {summary['rejected_images']:,} rejected"
        )
    top = sorted(summary["reasons"].items(), key=lambda item: -item[1])
    lines += [f"  {n:>8,} x {reason}" for reason, n in top[:12]]
    lines += [f"  note: {note}" for note in summary["notes"]]
    return "\n".join(lines)


def _count(studies: Iterable[Study]) -> dict[str, dict[str, int]]:
    counts = {split: {"studies": 0, "images": 0} for split in SPLITS}
    for study in studies:
        counts[study.split]["studies"] += 1
        counts[study.split]["images"] += len(study.views)
    return counts


def _write(
    studies: list[Study], root: Path, dataset: str, options: Ingest, out_shards: Path
) -> tuple[list[Study], list[Reject]]:
    """Decode and write; the studies written, with their places, and what was rejected."""
    written: list[Study] = []
    rejects: list[Reject] = []
    with (
        ShardWriter(out_shards, dataset, options.shard_size) as writer,
        tqdm(total=len(studies), desc=f"ingest {dataset}", unit="study", mininterval=1.0) as bar,
    ):
        for study, results in _decode_all(studies, root, options):
            good = []
            for view, result in zip(study.views, results, strict=True):
                if isinstance(result, Picture):
                    good.append((view, result))
                else:
                    rejects.append(Reject(dataset, view.path or view.id, "image", result))
            if good:
                views, pictures = zip(*good, strict=True)
                written.append(writer.write(study.with_views(views), pictures))
            else:
                rejects.append(Reject(dataset, f"{study.patient}/{study.study}", "study", "no readable image"))
            bar.update()
    return written, rejects


def _decode_all(studies: Iterable[Study], root: Path, options: Ingest) -> Iterator[tuple[Study, list[Picture | str]]]:
    """Each study with its views' pictures, or reasons; in order, at most ``AHEAD`` tasks a process under way."""
    workers = options.workers or _cores()
    remaining = iter(studies)
    pending: deque[tuple[list[Study], Future[list[list[Picture | str]]]]] = deque()
    pool = ProcessPoolExecutor(workers)
    try:
        while True:
            while len(pending) < workers * AHEAD and (chunk := list(islice(remaining, CHUNK))):
                try:
                    future = pool.submit(_decode_chunk, root, chunk, options)
                except BrokenProcessPool:
                    pool.shutdown(wait=False)
                    pool = ProcessPoolExecutor(workers)
                    future = pool.submit(_decode_chunk, root, chunk, options)
                pending.append((chunk, future))
            if not pending:
                return
            chunk, future = pending.popleft()
            try:
                results = future.result()
            except BrokenProcessPool:  # a codec crashed, in this task or in one beside it: find out which image it was
                results = [_decode_alone(root, study, options) for study in chunk]
            yield from zip(chunk, results, strict=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _cores() -> int:
    """Cores this process may use; a container or scheduler may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_alone(root: Path, study: Study, options: Ingest) -> list[Picture | str]:
    """Decode each view in a process of its own, so that a crash costs that view only."""
    results: list[Picture | str] = []
    for view in study.views:
        with ProcessPoolExecutor(1) as pool:
            try:
                results += pool.submit(_decode_chunk, root, [study.with_views([view])], options).result()[0]
            except BrokenProcessPool:
                results.append(CRASHED)
    return results


def _decode_chunk(root: Path, studies: list[Study], options: Ingest) -> list[list[Picture | str]]:
    return [[_decode_view(root, view.path, options) for view in study.views] for study in studies]


def _decode_view(root: Path, path: str, options: Ingest) -> Picture | str:
    """The encoded picture of one file, or the reason there is none."""
    if not path:
        return MISSING
    try:
        image, position = images.read_view(root / path)
        image = images.resize(image, options.short_side)
        height, width = image.shape
        return Picture(images.encode(image, options.jpeg_quality), width, height, position)
    except images.ImageError as error:
        return str(error)
    except Exception as error:  # one bad file never stops the archive; the type alone says nothing of its content
        return f"unexpected {type(error).__name__}"
