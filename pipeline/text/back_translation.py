"""Back-translation of the training reports (paper section 4.2): which texts, in what order, and never one twice.

Parts of ``PART`` texts are written as they are done, so that a kill costs the part at hand. They stay in the work
folder under a fingerprint of seed, settings and weights, hold hashes and translations and no source text, and whoever
comes again translates only what none of them holds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from pipeline.config.params import BackTranslation
from pipeline.storage.atomic import say_damaged, write_text
from pipeline.storage.index import read_studies
from pipeline.storage.parquet import read_table, write_table
from pipeline.storage.processes import end_with_parent
from pipeline.text.translations import TRANSLATION_SCHEMA, TRANSLATIONS_FILE, Translations, report_sections, text_hash

if TYPE_CHECKING:
    from pipeline.text.marian import RoundTrip

PART = 64  # texts
PART_SCHEMA = pa.schema([*TRANSLATION_SCHEMA, ("reason", pa.string())])  # reason: "", or why ``translation`` is null
NEEDS = (
    "back_translation names no models, so texts are augmented by sentence swap alone; it needs two MarianMT models, "
    "e.g. forward: Helsinki-NLP/opus-mt-en-it, back: Helsinki-NLP/opus-mt-it-en, or local folders of them"
)

Text = tuple[int, str]


def back_translate(
    options: BackTranslation,
    seed: int,
    indexes: Sequence[Path],
    out: Path,
    work: Path,
    captioned: Collection[str] = (),
) -> dict[str, Any]:
    """Write ``out``/translations.parquet (hash of a section, its translation) and ``out``/summary.json.

    Args:
        options: the models and how they sample; without names the table is empty and the summary says what it needs.
        indexes: <dataset>.parquet files; the report sections of their training studies are translated, each distinct
            text once.
        work: folder that keeps what was translated from one run to the next.
        captioned: data sets whose labels become captions, so that the reports of labelled studies are not drawn.

    Returns:
        The summary: ``texts`` (distinct), ``translated``, the number of texts without a translation by reason, and
        ``note`` where nothing was translated.

    Raises:
        ParamsError: models that cannot be loaded. ValueError: a text, part or worker that failed, in one line.
    """
    count = sum(1 for _ in distinct_texts(indexes, captioned))
    summary: dict[str, Any] = {"texts": count, "translated": 0}
    parts = TRANSLATION_SCHEMA.empty_table()
    if not options.forward:
        summary["note"] = NEEDS
    elif count:
        folder = _translate_all(options, seed, indexes, captioned, count, work)
        wanted = pa.array([number for number, _ in distinct_texts(indexes, captioned)], pa.uint64())
        rows = _read_parts(folder)
        rows = rows.filter(pc.is_in(rows["hash"], wanted))
        if pc.count_distinct(rows["hash"]).as_py() < count:
            raise ValueError(f"{folder}: a part was damaged since it was written; run again, for its texts alone")
        reasons = Counter(rows["reason"].to_pylist())
        parts = rows.filter(pc.is_valid(rows["translation"])).select(TRANSLATION_SCHEMA.names)
        summary |= {"translated": reasons.pop("", 0), **dict(sorted(reasons.items()))}
    Translations(parts).write(out / TRANSLATIONS_FILE)
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary


def distinct_texts(indexes: Iterable[Path], captioned: Collection[str]) -> Iterator[Text]:
    """(hash, text) of the report sections of all training studies with a picture, in the order of the indexes, each
    once."""
    seen: set[int] = set()
    for index in indexes:
        for study in read_studies(index, ("train",)):
            for text in report_sections(study, captioned) if study.views else ():
                number = text_hash(text)
                if number not in seen:
                    seen.add(number)
                    yield number, text


def _translate_all(
    options: BackTranslation,
    seed: int,
    indexes: Sequence[Path],
    captioned: Collection[str],
    count: int,
    work: Path,
) -> Path:
    """Translate what no part holds; the folder of the parts."""
    first = _load(options, seed)
    folder = work / first.fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.partial"):  # by a process that was killed
        left.unlink()
    known = set(_read_parts(folder)["hash"].to_pylist())
    missing = (text for text in distinct_texts(indexes, captioned) if text[0] not in known)
    groups = iter(lambda: list(islice(missing, PART)), [])
    with tqdm(total=count, initial=len(known), desc="back_translate", unit="text", mininterval=1) as bar:
        if options.workers == 1:
            for group in groups:
                bar.update(write_part(first, folder, group))
        else:
            del first
            for done in _shared(options, seed, folder, groups):
                bar.update(done)
    return folder


def _load(options: BackTranslation, seed: int, number: int = 0) -> RoundTrip:
    """The models of process ``number``."""
    import torch  # takes seconds, and the demo needs none of it

    from pipeline.text.marian import RoundTrip, choose_device

    torch.set_num_threads(1)  # with more, sums on the CPU come in another order
    return RoundTrip(options, seed, choose_device(options.device, number))


def write_part(translate: RoundTrip, folder: Path, texts: list[Text]) -> int:
    """Translate some texts and write them as one part; their number."""
    rows = [(number, *translate(text)) for number, text in texts]
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), PART_SCHEMA, strict=True)]
    write_table(folder / f"{texts[0][0]:016x}.parquet", pa.table(columns, schema=PART_SCHEMA))
    return len(texts)


def _read_parts(folder: Path) -> pa.Table:
    """What the parts hold; one that cannot be read is removed, so that its texts are missing again."""
    tables = [PART_SCHEMA.empty_table()]
    for path in sorted(folder.glob("*.parquet")):
        try:
            tables.append(read_table(path))
        except (OSError, ValueError):
            say_damaged(path)
            path.unlink(missing_ok=True)
    return pa.concat_tables(tables)


_trip: RoundTrip | None = None  # of a worker process


def _shared(options: BackTranslation, seed: int, folder: Path, groups: Iterator[list[Text]]) -> Iterator[int]:
    """The same in processes of their own, with few groups on their way at a time. Spawned: CUDA does not survive a
    fork."""
    context = get_context("spawn")
    begin = partial(_begin, options, seed, context.Value("i", 0))
    with ProcessPoolExecutor(options.workers, context, initializer=begin) as pool:
        waiting: list[Future[int]] = []
        try:
            for group in groups:
                waiting.append(pool.submit(_work, folder, group))
                if len(waiting) > 2 * options.workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        except BrokenExecutor:
            raise ValueError(
                "a translating process died, perhaps for want of memory: lower back_translation.workers or batch_size; "
                "what was translated is kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(options: BackTranslation, seed: int, turn: Any) -> None:
    """Load the models; and do not outlive a parent that was killed."""
    global _trip

    end_with_parent()
    with turn.get_lock():
        number = turn.value
        turn.value += 1
    _trip = _load(options, seed, number)


def _work(folder: Path, texts: list[Text]) -> int:
    assert _trip is not None
    return write_part(_trip, folder, texts)
