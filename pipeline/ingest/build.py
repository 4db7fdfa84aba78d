"""Archive -> shards, index and an account of every image.

An archive's studies are listed first (the plan) and cut into shards of ``shard_size`` studies. Each shard is then one
piece of work, done by any process on any machine that sees the archive and the work folder: it decodes its studies'
images, writes its tar and, last, its part of the index. A piece whose part is there is done, so a run that was killed
anywhere goes on where it was, and its bytes are those of a run that was not.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from bisect import bisect_left
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import pyarrow as pa
from tqdm import tqdm

from pipeline import study
from pipeline.config.archive_params import Ingest, Source
from pipeline.ingest import account, images, jpeg, pieces, png, sources
from pipeline.ingest.account import Tally
from pipeline.ingest.dicom import display, jpeg2000, pixels, reader
from pipeline.ingest.pieces import Damaged, Job, forget_damaged, is_done, read_piece, write_piece
from pipeline.ingest.sources.archive import Archive
from pipeline.storage import index, parquet, pictures, shards
from pipeline.storage.atomic import say_damaged, write_text
from pipeline.storage.faults import fault_line
from pipeline.storage.files import IN_PACK, Gone
from pipeline.storage.index import join_studies, write_rejects, write_studies
from pipeline.storage.processes import end_with_parent
from pipeline.storage.shards import key
from pipeline.storage.untrusted import FILE_MISSING
from pipeline.study import Reject, Study

UNLISTED = "an image that no list of the archive names, or another copy of one"
MOST_REJECTS = 100_000  # beside as many as there are studies: each is held until the end
AHEAD = 2  # pieces of work a process that are handed out: what bounds memory


class IngestError(RuntimeError):
    """An ingest whose result must not be used; one line."""


def ingest_archive(
    dataset: str, source: Source, options: Ingest, out_shards: Path, out_index: Path, work: Path, seed: int
) -> dict[str, Any]:
    """Read an archive and write its shards, index, rejects and summary.

    Writes ``out_shards/<dataset>-*.tar`` (or below ``options.target``, a URL), ``out_shards/rejects.parquet``,
    ``out_index`` (Parquet) and beside it the summary (.json), which is also returned. In it written_images +
    rejected_images == found_images, where found are the images of all listed studies. With ``options.labels_only`` no
    image is opened and nothing is found or written.

    Args:
        work: folder on the file system of ``out_shards``, for what a later run can go on from; removed at the end.

    Raises:
        SourceError: the archive cannot be read at all.
        IngestError: more than ``max_rejected`` of the images or rows were rejected, or a split, all texts or all
            positives of a class were (rejects.parquet is written by then); the archive vanished or the disk is full
            (the next run goes on); or a study is in two splits.
    """
    for old in (
        *out_shards.glob(f"{dataset}-*.tar*"),
        out_shards / "rejects.parquet",
        out_index,
        out_index.with_suffix(".json"),
    ):
        old.unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own keeps what it frees, more with each piece
    try:
        archive = sources.open_archive(dataset, source.path, work / "packs", source.follow_links)
        target = f"{options.target.rstrip('/')}/{dataset}" if options.target else out_shards.as_posix()
        job = Job(
            dataset=dataset,
            files=archive.files.absolute(),
            witness=min(archive.names, key=lambda name: (IN_PACK in name, name), default=""),
            work=str(work.resolve()),
            target=target,
            short_side=options.short_side,
            jpeg_quality=options.jpeg_quality,
        )
        plan = _plan(job, archive, source, options.shard_size, seed)
        count = 0 if options.labels_only else plan.pieces
        _forget_unless_same(job, archive.fingerprint)
        forget_damaged(job, count)
        _run(job, count, plan.listed.studies.total(), options)
    except Gone as error:
        raise IngestError(f"{dataset}: {error}; run again once it is in place, it goes on where it was") from None
    except OSError as error:
        why = fault_line(error) or f"{error.strerror or type(error).__name__}; run again when that is mended"
        raise IngestError(f"{dataset}: a shard could not be written: {why}; it goes on where it was") from None
    try:
        summary = _finish(job, count, plan, source, archive, options, out_shards, out_index)
    except Damaged as error:
        raise IngestError(f"{dataset}: {error}: damaged since it was written; run again for this piece") from None
    shutil.rmtree(work)
    return summary


@dataclass(frozen=True)
class Plan:
    """What the archive's lists hold: studies to be written (in files, one a piece) and rejects."""

    pieces: int
    listed: Tally
    absent: int  # listed images that a partial archive does not have
    rejects: list[Reject]


def _plan(job: Job, archive: Archive, source: Source, size: int, seed: int) -> Plan:
    """Write the plan of every piece of ``size`` studies, holding one at a time."""
    split_of: dict[str, str] = {}
    on_disk = archive.images
    used = bytearray(len(on_disk))  # a byte an image; a set of names would take a hundred
    listed, absent = Tally(), 0
    rejects = [Reject(archive.dataset, name, "file", reason) for name, reason in archive.problems]
    count = 0
    shutil.rmtree(job.plan(0).parent, ignore_errors=True)

    def studies() -> Iterator[Study]:
        nonlocal absent
        for item in sources.read_archive(archive, source, seed):
            if isinstance(item, Reject):
                rejects.append(item)
                if len(rejects) > MOST_REJECTS and len(rejects) > len(split_of):
                    raise IngestError(
                        f"{archive.dataset}: most of its rows are rejected, {len(rejects):,} so far; the last one "
                        f"({item.item}): {item.reason}"
                    )
                continue
            name = key(item)
            before = split_of.get(name)
            if before not in (None, item.split):
                raise IngestError(
                    f"{archive.dataset}: study {name} is in two splits, {before} and {item.split}; "
                    "mend the archive's lists"
                )
            if before:
                rejects.append(Reject(archive.dataset, name, "study", "a study of this id was listed before"))
                continue
            split_of[name] = item.split
            if source.present:
                here = [view for view in item.views if view.path]
                absent += len(item.views) - len(here)
                if not here:
                    continue
                item = item.with_views(here)
            listed.add(item)
            for view in item.views:
                place = bisect_left(on_disk, view.path)
                if place < len(on_disk) and on_disk[place] == view.path:
                    used[place] = 1
            yield item.with_views(replace(view, shard=view.path) for view in item.views)

    remaining = studies()
    while group := list(islice(remaining, size)):
        write_studies(job.plan(count), group)
        count += 1
    unused = (name for name, was in zip(on_disk, used, strict=True) if not was)
    rejects += [Reject(archive.dataset, name, "unlisted", UNLISTED) for name in unused]
    return Plan(count, listed, absent, rejects)


def _forget_unless_same(job: Job, fingerprint: str) -> None:
    """Drop the pieces of an earlier run that had other studies, files, settings or code."""
    work = Path(job.work)
    token = hashlib.sha256()
    for plan in sorted(job.plan(0).parent.glob("*.parquet")):
        token.update(plan.read_bytes())
    settings = {**asdict(job), "files": job.files.root, "fingerprint": fingerprint}
    token.update(json.dumps(settings, sort_keys=True).encode())
    decoders = (reader, display, pixels, jpeg2000, jpeg, png, pictures, images)
    for module in (*decoders, index, parquet, pieces, shards, study):
        token.update(Path(module.__file__ or "").read_bytes())
    state, now = work / "state.json", json.dumps(token.hexdigest())
    before = state.read_bytes() if state.is_file() else None
    if before != now.encode():
        if before is not None and len(before) != len(now):
            say_damaged(state)
        for folder in ("parts", "shards"):
            shutil.rmtree(work / folder, ignore_errors=True)
        write_text(state, now)
    for folder in ("parts", "shards"):
        (work / folder).mkdir(exist_ok=True)
        for stray in (work / folder).glob("*.partial"):
            stray.unlink()


def _run(job: Job, count: int, studies: int, options: Ingest) -> None:
    """Do every piece that is not done, a bounded number at a time. One that kills its process is done again alone."""
    todo = iter([n for n in range(count) if not is_done(job, n)])
    crashed: list[int] = []
    with tqdm(total=count, desc=f"ingest {job.dataset} ({studies} studies)", unit="shard", mininterval=1.0) as bar:
        bar.update(sum(is_done(job, n) for n in range(count)))
        while True:
            with _executor(options) as (executor, workers):
                pending: dict[Future[None], int] = {}
                broken = False
                while not broken:
                    while len(pending) < workers * AHEAD and (number := next(todo, None)) is not None:
                        pending[executor.submit(write_piece, job, number)] = number
                    if not pending:
                        break
                    for future in wait(pending, return_when=FIRST_COMPLETED).done:
                        number = pending.pop(future)
                        try:
                            future.result()
                            bar.update()
                        except Exception as error:
                            if not _is_crash(error):
                                raise
                            crashed.append(number)
                            broken = isinstance(error, BrokenExecutor)
                crashed += (
                    pending.values()
                )  # of a broken pool: some were only waiting, and doing them alone is harmless
            if not broken:
                break
        for number in sorted(crashed):
            if not is_done(job, number):
                write_piece(job, number, alone=True)
            bar.update()


def _is_crash(error: Exception) -> bool:
    return isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker"  # the latter is dask's


@contextmanager
def _executor(options: Ingest) -> Iterator[tuple[Executor, int]]:
    """Local processes, or the workers of the dask scheduler at ``options.scheduler``; and how many there are."""
    if options.scheduler:
        from distributed import Client

        with Client(options.scheduler) as client:
            workers = len(client.scheduler_info()["workers"]) or 1
            yield client.get_executor(pure=False, retries=0), workers
        return
    workers = options.workers or joblib.cpu_count()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=end_with_parent)
    try:
        yield pool, workers
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finish(
    job: Job,
    count: int,
    plan: Plan,
    source: Source,
    archive: Archive,
    options: Ingest,
    out_shards: Path,
    out_index: Path,
) -> dict[str, Any]:
    """Gather the parts, settle the account, and put everything in its place."""
    out_shards.mkdir(parents=True, exist_ok=True)
    rejects = list(plan.rejects)
    written, lossy = Tally(), []
    for number in range(count):
        studies, rejected_here = read_piece(job, number)
        rejects += rejected_here
        lossy += [job.part(number)] if rejected_here else []
        for item in studies:
            written.add(item)
    rows = archive.rows.total()
    summary: dict[str, Any] = {
        "dataset": job.dataset,
        "reader": source.reader,
        "labels_only": options.labels_only,
        "phantom": job.files.has("PHANTOM.json"),
        **account.summary_of(plan.listed, written, rows, rejects, options.labels_only),
        "notes": [*sources.archive_notes(archive, source), *archive.notes],
    }
    if source.present:
        here = plan.listed.images.total()
        summary["notes"].append(
            f"partial archive: {here:,} of the {here + plan.absent:,} images that its lists name are here"
        )
    write_rejects(out_shards / "rejects.parquet", rejects)
    print(account.as_text(summary))
    if not plan.listed.studies:
        raise IngestError(
            f"{job.dataset}: the archive at {source.path} lists no usable study; see {out_shards}/rejects.parquet"
        )
    left = plan.listed if options.labels_only else written
    if lost := account.losses(plan.listed, left, rows, rejects, options.max_rejected):
        for done in lossy:  # what was rejected may be mended without a file changing: permissions, say
            done.unlink()
        missing = sum(r.kind == "image" and r.reason == FILE_MISSING for r in rejects)
        part = f"; of a partial download say so: sources.{job.dataset}.present: true" if missing else ""
        raise IngestError(
            f"{job.dataset}: {'; '.join(lost)}; see {out_shards}/rejects.parquet (images are looked for anywhere under "
            f"{source.path}{part})"
        )
    join_studies(out_index, map(job.part, range(count)))
    write_text(out_index.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")
    for tar in sorted((Path(job.work) / "shards").glob("*.tar")):
        tar.replace(out_shards / tar.name)
    return summary
