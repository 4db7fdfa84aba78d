"""A card of a list of images: what it holds and what that is enough for, before any picture is decoded.

Of texts the card shows the form alone: letters as x, digits as 9.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from pipeline.config.archive_params import Headings, Source
from pipeline.datasets import MANIFEST
from pipeline.ingest.account import Tally
from pipeline.ingest.report_headings import Translation
from pipeline.ingest.report_sections import outline
from pipeline.ingest.sources import open_archive, read_archive
from pipeline.ingest.sources.manifest import TEXTS, manifest_rows
from pipeline.ingest.sources.tables import Row
from pipeline.study import NEGATIVE, POSITIVE, SPLITS, Reject, Study

SHAPES = 3  # texts whose form is shown
SHOWN = 60  # characters of a part of it
NAME = "my_hospital"


def card(path: Path, root: Path, cache: Path, headings: Headings) -> str:
    """What a list of images says, as lines of text.

    Args:
        path: the CSV or Parquet file; ``root``: the folder that its images are named from, which holds it.
        cache: a folder for the places inside compressed packs.

    Raises:
        SourceError: the list cannot be read. ValueError: it is not below ``root``.
    """
    manifest = path.absolute().relative_to(root.absolute()).as_posix()
    source = Source(MANIFEST, str(root), "", manifest=manifest, headings=headings)
    archive = open_archive(NAME, source.path, cache)
    studies: list[Study] = []
    rejects: list[Reject] = []
    for item in read_archive(archive, source, 0):
        studies.append(item) if isinstance(item, Study) else rejects.append(item)
    tally, tests = Tally(), Tally()
    for study in studies:
        tally.add(study)
        if study.split == "test":
            tests.add(study)
    shapes = list(islice(_shapes(texts_of(manifest_rows(archive, manifest)), Translation(headings)), SHAPES))
    lines = [
        *_counts(studies, rejects, tally, archive.rows.total()),
        *(f"  note: {note}" for note in dict.fromkeys(archive.notes)),
        *_labels(tally),
        *(["texts, letters as x:", *(f"  {shape}" for shape in shapes)] if shapes else []),
        *_enough(studies, tally, tests),
    ]
    return "\n".join(lines)


def texts_of(rows: Iterator[Row]) -> Iterator[str]:
    """The text of each row that has one, its sections under their names."""
    for row in rows:
        found = {key: row.cells[key] for key in TEXTS if row.cells.get(key)}
        if found:
            yield found.get("report") or "\n".join(f"{key.upper()}: {text}" for key, text in found.items())


def _shapes(texts: Iterator[str], headings: Translation) -> Iterator[str]:
    """The forms of texts, each once."""
    seen: set[str] = set()
    for text in texts:
        parts = [f"{kind}: {_masked(part)}" for kind, part in outline(headings.english(text))]
        shape = " | ".join(parts) or "no words"
        if shape not in seen:
            seen.add(shape)
            yield shape


def _masked(text: str) -> str:
    form = re.sub(r"\d", "9", re.sub(r"[^\W\d_]", "x", text))
    return form if len(form) <= SHOWN else f"{form[:SHOWN]} … ({len(text.split())} words)"


def _counts(studies: Sequence[Study], rejects: Sequence[Reject], tally: Tally, rows: int) -> Iterator[str]:
    lost = Counter(reject.kind for reject in rejects)
    views = [view for study in studies for view in study.views]
    missing = sum(not view.path for view in views)
    patients = len({study.patient for study in studies})
    yield f"rows: {rows:,}, of which {lost['row']:,} are rejected"
    yield f"studies: {len(studies):,} of {patients:,} patients"
    yield f"images: {len(views):,}, of which {missing:,} are not there"
    yield f"rows that list an image again: {max(0, rows - lost['row'] - len(views)):,}"
    of = {(study.patient, study.split) for study in studies}
    shared = sum(n > 1 for n in Counter(patient for patient, _ in of).values())
    yield (
        "splits: "
        + ", ".join(f"{split} {tally.studies[split]:,}" for split in SPLITS)
        + (f"; {shared:,} patients are in two of them or more" if shared else "")
    )
    yield "views: " + ", ".join(f"{name or 'not said'} {n:,}" for name, n in sorted(tally.views.items()))
    yield f"texts: {tally.texts:,} studies with one, {lost['text']:,} with one of which nothing is used"
    both = Counter((s.findings is not None, s.impression is not None) for s in studies)
    alone = f"findings alone {both[True, False]:,}, impression alone {both[False, True]:,}"
    yield f"sections: both {both[True, True]:,}, {alone}"
    for reason, n in Counter(reject.reason for reject in rejects).most_common(12):
        yield f"  {n:,} x {reason}"


def _labels(tally: Tally) -> Iterator[str]:
    for cls, values in tally.classes().items():
        yield f"label {cls}: " + ", ".join(f"{name} {n:,}" for name, n in values.items())


def _enough(studies: Sequence[Study], tally: Tally, tests: Tally) -> Iterator[str]:
    """What the list is enough for, and the lines of params.yaml that ask for it."""
    training = [study for study in studies if study.split == "train"]
    reports = sum(study.findings is not None or study.impression is not None for study in training)
    labels = sum(bool(study.labels) for study in training)
    classes = [c for c, values in tests.labels.items() if values[POSITIVE] and values[NEGATIVE]]
    probe = all(tally.studies[split] for split in SPLITS)
    yield f"enough for: training on {reports:,} reports, or on the labels of {labels:,} studies"
    yield f"  zero-shot classification of {len(classes)} of {len(tally.labels)} classes" + (
        "" if not classes else ", and a linear probe" if probe else "; a probe needs all three splits"
    )
    yield f"  retrieval of {tests.texts:,} test studies' reports"
    if not tally.studies["test"]:
        yield "  no test study: a column split names train, valid and test, with no patient in two of them"
    uses = [*(["classification"] if classes else []), *(["retrieval"] if tests.texts > 1 else [])]
    people = len({s.patient for s in studies}) < len(studies)
    about = [
        f"captions: {'reports' if reports >= labels else 'labels'}",
        f"classes: {json.dumps(classes, ensure_ascii=False)}",  # in quotes: a class may be called No
        f"patients: {str(people).lower()}",
        f"tests: [{', '.join(uses)}]",
    ]
    yield "params.yaml (patients: whether the ids in that column are persons):"
    yield f"  about: {{{', '.join(about)}}}"
