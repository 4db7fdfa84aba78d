"""One piece of an ingest: the studies of one shard, decoded and written by any process on any machine."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from pipeline.ingest import images
from pipeline.storage.atomic import say_damaged
from pipeline.storage.files import Files, Gone, file_system
from pipeline.storage.index import Studies, read_studies, write_rejects, write_studies
from pipeline.storage.memory import keep_memory
from pipeline.storage.parquet import read_table
from pipeline.storage.pictures import ImageError, encode
from pipeline.storage.processes import end_with_parent
from pipeline.storage.shards import EncodedPicture, ShardWriter, publish
from pipeline.storage.untrusted import FILE_MISSING
from pipeline.study import Reject, Study

CRASHED = "the decoder crashed on it"
# Of processor time for one file, or for the directory of the pack that it is in. A process that needs more ends, and
# its piece is done again alone. A large radiograph in JPEG 2000 takes 4, a zip of 400,000 files 11.
MOST_SECONDS = 60.0


class Damaged(ValueError):
    """What a piece wrote cannot be read; the message is the path of its part."""


@dataclass(frozen=True)
class Job:
    """What a process needs to do any piece of an ingest. ``work`` is a folder that all processes see; ``address`` of a
    shard is ``<target>/<dataset>-<number>.tar``, where ``target`` is a folder or URL."""

    dataset: str
    files: Files
    witness: str  # a file that is there as long as the archive is
    work: str
    target: str
    short_side: int
    jpeg_quality: int

    def plan(self, number: int) -> Path:
        """The piece's studies as the archive lists them; a view's ``shard`` is there the file it is to be read from."""
        return Path(self.work) / "plan" / f"{number:06d}.parquet"

    def part(self, number: int) -> Path:
        """The piece's share of the index; its presence says that the piece is done."""
        return Path(self.work) / "parts" / f"{number:06d}.parquet"

    def tar(self, number: int) -> Path:
        """The piece's tar before it is published."""
        return Path(self.work) / "shards" / f"{self.dataset}-{number:06d}.tar"

    def address(self, number: int) -> str:
        """Where the index says the tar is."""
        return f"{self.target}/{self.dataset}-{number:06d}.tar"


def write_piece(job: Job, number: int, alone: bool = False) -> None:
    """Decode the studies of a piece, write and publish its tar, then its part of the index.

    Args:
        alone: decode in a process of its own, so that a codec that crashes or does not end costs that image only.
    """
    keep_memory()
    written: list[Study] = []
    rejects: list[Reject] = []
    with ShardWriter(job.tar(number), job.address(number)) as writer, _decoder(job, alone) as decode:
        for item in read_studies(job.plan(number)):
            good = []
            for view in item.views:
                result = decode(view.shard)
                if isinstance(result, EncodedPicture):
                    good.append((view, result))
                    rejects += [Reject(job.dataset, view.shard, "mended", said) for said in result.mended]
                else:
                    rejects.append(Reject(job.dataset, view.shard or view.id, "image", result))
            if good:
                views, pictures = zip(*good, strict=True)
                written.append(writer.write(item.with_views(views), pictures))
            else:
                rejects.append(Reject(job.dataset, f"{item.patient}/{item.study}", "study", "no readable image"))
    if written:
        publish(job.tar(number), job.address(number))
    write_rejects(job.part(number).with_suffix(".rejects"), rejects)
    write_studies(job.part(number), written)


@contextmanager
def _decoder(job: Job, alone: bool) -> Iterator[Any]:
    """A function from a file's name to its picture, or to the reason why there is none."""
    if not alone:
        yield lambda path: within(MOST_SECONDS, decode_file, job, path)
        return
    pools: list[ProcessPoolExecutor] = []

    def decode(path: str) -> EncodedPicture | str:
        for _ in range(2):  # a process may also be killed for want of memory: once is no verdict
            if not pools:
                pools.append(ProcessPoolExecutor(1, get_context("spawn"), initializer=end_with_parent))
            since = time.monotonic()
            try:
                return pools[0].submit(within, MOST_SECONDS, decode_file, job, path).result()
            except BrokenExecutor:
                pools.pop().shutdown(wait=False)
            if time.monotonic() - since >= MOST_SECONDS:
                return f"takes more than {MOST_SECONDS:g} s to decode"
        return CRASHED

    try:
        yield decode
    finally:
        for pool in pools:
            pool.shutdown(wait=True)


def within(seconds: float, decode: Callable[[Job, str], EncodedPicture | str], job: Job, path: str) -> Any:
    """``decode_file``; the system ends this process if that takes more processor time, for a codec written in C hears
    nothing else. Of several threads that decode, the last to begin is timed."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return decode(job, path)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def decode_file(job: Job, path: str) -> EncodedPicture | str:
    """The encoded picture of one file of the archive, or the reason there is none.

    Raises:
        Gone: the archive is no longer there.
    """
    if not path:
        return FILE_MISSING
    try:
        image, position, mended = images.read_view(job.files.read(path, images.MAX_FILE), job.short_side)
        height, width = image.shape
        return EncodedPicture(encode(image, job.jpeg_quality), width, height, position, mended)
    except ImageError as error:
        reason = str(error)
    except Gone:
        raise
    except Exception as error:  # one bad file never stops the archive; the type alone says nothing of its content
        reason = str(error) if isinstance(error, OSError) and not error.errno else f"unexpected {type(error).__name__}"
    if not job.files.has(job.witness):
        raise Gone(f"the archive at {job.files.root} is no longer there")
    return reason


def is_done(job: Job, number: int) -> bool:
    """Whether a piece is finished: its part is written last, and ``forget_damaged`` has seen those of earlier runs."""
    return job.part(number).is_file()


def read_piece(job: Job, number: int) -> tuple[Studies, list[Reject]]:
    """What a finished piece wrote.

    Raises:
        Damaged: it cannot be read; its part is removed, so that the piece is done again.
    """
    part = job.part(number)
    try:
        rejects = read_table(part.with_suffix(".rejects")).to_pylist()
        return read_studies(part), [Reject(**row) for row in rejects]
    except (OSError, ValueError):
        part.unlink(missing_ok=True)
        raise Damaged(str(part)) from None


def forget_damaged(job: Job, count: int) -> None:
    """Remove the parts of the pieces that have to be done again: they cannot be read, or their tar is gone or shorter
    than they say. A line for each."""
    parts = [number for number in range(count) if job.part(number).is_file()]
    sizes = _tar_sizes(job) if parts else {}
    for number in parts:
        try:
            ends = [view.offset + view.length for item in read_piece(job, number)[0] for view in item.views]
        except Damaged as error:
            say_damaged(str(error))
            continue
        tar = job.tar(number).name
        if ends and sizes.get(tar, 0) < max(ends):
            say_damaged(f"{job.target}/{tar}")
            job.part(number).unlink()


def _tar_sizes(job: Job) -> dict[str, int]:
    """Name -> bytes of every tar that is there."""
    if "://" not in job.target:
        return {tar.name: tar.stat().st_size for tar in job.tar(0).parent.glob("*.tar")}
    system, folder = file_system(job.target)
    system.invalidate_cache()
    try:
        found = system.find(folder, detail=True)
    except FileNotFoundError:
        return {}
    return {name.rpartition("/")[2]: int(info["size"]) for name, info in found.items()}
