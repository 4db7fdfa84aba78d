"""Study and View: the one record every stage handles, and its Parquet schema.

A study flows one way: archive file -> ``Study`` -> shard -> batch -> embedding -> metric -> table cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "valid", "test")
POSITIONS = ("PA", "AP", "LATERAL", "")  # "" = the archive does not say
FRONTAL = ("PA", "AP")
POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1  # a class that is not mentioned is absent from ``labels``


@dataclass(frozen=True)
class View:
    """One image of a study.

    ``path`` (relative to the archive root) exists only between reader and ingest; shards and index never hold it.
    ``shard``/``offset``/``length`` address the encoded image inside an uncompressed tar; ``digest`` is the
    blake2b-64 of those bytes in hex, so that an index changes whenever a pixel does. ``width``/``height`` in pixels.
    """

    id: str
    position: str = ""
    path: str = ""
    shard: str = ""
    offset: int = -1
    length: int = 0
    width: int = 0
    height: int = 0
    digest: str = ""

    @property
    def frontal(self) -> bool:
        """Whether the archive says this is a PA or AP view."""
        return self.position in FRONTAL


@dataclass(frozen=True)
class Study:
    """One examination: its views, and either report sections or labels (or both).

    ``patient`` and ``study`` are the archive's own pseudonymous ids. ``findings``/``impression`` are cleaned text or
    ``None``, never an empty string. ``labels`` maps class name -> 1 positive, 0 negative, -1 uncertain.
    """

    dataset: str
    patient: str
    study: str
    split: str
    views: tuple[View, ...]
    findings: str | None = None
    impression: str | None = None
    labels: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"{self.dataset}: split {self.split!r} of a study is none of {SPLITS}")
        if self.findings == "" or self.impression == "":
            raise ValueError(f"{self.dataset}: an absent section is None, not an empty string")

    @property
    def first_frontal(self) -> View:
        """The view evaluation uses: the first frontal one, else the first (paper section 4.1: one frontal image)."""
        return next((v for v in self.views if v.frontal), self.views[0])

    def with_views(self, views: Iterable[View]) -> Study:
        """The same study with other views."""
        return replace(self, views=tuple(views))


@dataclass(frozen=True)
class Reject:
    """One thing of an archive that could not be used: ``item`` is a path inside the archive or a row's id,
    ``kind`` says what was lost (``image``: counts against the images found; ``study``; ``row``), and ``reason`` is
    one line without any content of the file.
    """

    dataset: str
    item: str
    kind: str
    reason: str


VIEW_TYPE = pa.struct(
    [
        ("id", pa.string()),
        ("position", pa.string()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("digest", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("patient", pa.string()),
        ("study", pa.string()),
        ("split", pa.string()),
        ("views", pa.list_(VIEW_TYPE)),
        ("findings", pa.string()),
        ("impression", pa.string()),
        ("labels", pa.map_(pa.string(), pa.int8())),
    ]
)
REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("dataset", "item", "kind", "reason")])


def to_row(study: Study) -> dict[str, Any]:
    """The study as a row of ``SCHEMA``: the whitelist of what leaves ingest (a view's path does not)."""
    return {
        "dataset": study.dataset,
        "patient": study.patient,
        "study": study.study,
        "split": study.split,
        "views": [{f.name: getattr(v, f.name) for f in VIEW_TYPE} for v in study.views],
        "findings": study.findings,
        "impression": study.impression,
        "labels": list(study.labels.items()),
    }


def from_row(row: dict[str, Any]) -> Study:
    """Inverse of ``to_row``."""
    return Study(**{**row, "views": tuple(View(**v) for v in row["views"]), "labels": dict(row["labels"] or [])})


def write_studies(path: Path, studies: Iterable[Study]) -> None:
    """Write studies to one Parquet file, in the order given. Nothing time-dependent goes in: same rows, same bytes."""
    table = pa.Table.from_pylist([to_row(s) for s in studies], schema=SCHEMA)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, compression="zstd")


def read_studies(path: Path, splits: Iterable[str] = SPLITS) -> list[Study]:
    """Read the studies of the given splits, in file order."""
    table = pq.read_table(path, filters=[("split", "in", list(splits))])
    return [from_row(row) for row in table.to_pylist()]


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write the account of what was not used, one row a thing."""
    rows = [{n: getattr(r, n) for n in REJECT_SCHEMA.names} for r in rejects]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=REJECT_SCHEMA), path, compression="zstd")
