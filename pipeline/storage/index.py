"""The index: studies in a Parquet file, its schema, written and read.

``Studies`` is ours, because one study at a time takes pyarrow's rows 4 times as long, in 2.3 times the memory.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa

from pipeline.storage.parquet import open_file, read_table, write_table, writing
from pipeline.study import SPLITS, Reject, Study, View

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
INDEX_SCHEMA = pa.schema(
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
# Columns of few values. In the file and in memory they are codes; all others hardly repeat.
CODED = ["dataset", "split", "views.list.element.position", "views.list.element.shard", "labels.key_value.key"]
GROUP = 4096  # studies a row group: what writing holds in memory, and reading besides the result
Record = TypeVar("Record", View, Study)
REJECT_SCHEMA = pa.schema([(name, pa.string()) for name in ("dataset", "item", "kind", "reason")])


class Studies(Sequence[Study]):
    """The studies of an index file, in file order: a read-only list that makes each ``Study`` when it is asked for.

    What it holds are a text and packed numbers for each row group, about 550 bytes a study with two views and a report.
    Forked processes share them; a pickle is the path, and reads the file again. Slices and ``select`` share them, too.
    Equal to any list of equal studies.
    """

    def __init__(self, path: Path, splits: tuple[str, ...]) -> None:
        """Read ``path``; see ``read_studies``."""
        self._source = (path, splits, _stamp(path))
        self._groups: list[Callable[[int], Study]] = []
        self._starts: list[int] = []
        self._values: dict[str, list[str]] = {"dataset": [], "split": list(SPLITS)}
        codes: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int16)] for name in self._values}
        count = 0
        for batch in _batches(path, splits):
            self._groups.append(_reader(batch))
            self._starts.append(count)
            count += batch.num_rows
            for name, known in self._values.items():
                column = batch.column(name)
                here = column.dictionary.to_pylist()
                known += [value for value in here if value not in known]
                codes[name].append(np.array([known.index(v) for v in here], np.int16)[column.indices.to_numpy()])
        self._codes = {name: np.concatenate(parts) for name, parts in codes.items()}
        self._rows: Sequence[int] | np.ndarray = range(count)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Study: ...

    @overload
    def __getitem__(self, index: slice) -> Studies: ...

    def __getitem__(self, index: int | slice) -> Study | Studies:
        """The study at a place, or those of a slice, which cost next to nothing."""
        if isinstance(index, slice):
            return self._of(self._rows[index])
        row = self._rows[index]
        group = bisect_right(self._starts, row) - 1
        return self._groups[group](row - self._starts[group])

    def __iter__(self) -> Iterator[Study]:
        for index in range(len(self)):
            yield self[index]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (*self._source, self._rows)

    def select(self, dataset: str | None = None, split: str | None = None) -> Studies:
        """The studies of one data set, one split, or both, without making any of them."""
        rows = np.asarray(self._rows, dtype=np.int64)
        for name, wanted in (("dataset", dataset), ("split", split)):
            if wanted is not None:
                known = self._values[name]
                rows = rows[self._codes[name][rows] == (known.index(wanted) if wanted in known else -1)]
        return self._of(rows)

    def _of(self, rows: Sequence[int] | np.ndarray) -> Studies:
        part = Studies.__new__(Studies)
        part.__dict__.update(self.__dict__, _rows=rows)
        return part


def _reopen(path: Path, splits: tuple[str, ...], stamp: tuple[int, int], rows: Sequence[int] | np.ndarray) -> Studies:
    """Unpickle ``Studies``: read the file again, unless it is another one by now."""
    if _stamp(path) != stamp:
        raise ValueError(f"{path}: the index has changed since it was read")
    return Studies(path, splits)._of(rows)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _batches(path: Path, splits: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """The rows of some splits, one row group after the other, so that no column ever exists twice in whole."""
    try:
        file = open_file(path, read_dictionary=CODED)
    except KeyError as error:
        raise ValueError(f"{path}: no index, it lacks the column {error}; ingest again") from None
    with file:
        if file.schema_arrow.names != INDEX_SCHEMA.names:
            raise ValueError(f"{path}: no index, its columns are {file.schema_arrow.names}; ingest again")
        for group in range(file.num_row_groups):
            split = file.read_row_group(group, columns=["split"]).column("split").combine_chunks()
            kept = np.isin(split.indices, [i for i, s in enumerate(split.dictionary.to_pylist()) if s in splits])
            if kept.any():
                table = file.read_row_group(group)
                for batch in (table if kept.all() else table.filter(pa.array(kept))).to_batches():
                    if batch.num_rows:
                        yield batch


def _reader(batch: pa.RecordBatch) -> Callable[[int], Study]:
    """A function that makes the study of a row. The numbers of a row, or of a view, are packed side by side and read
    by one call; Arrow's own scalars take 30 times as long."""
    datasets, dataset = _codes(batch.column("dataset"))
    splits, split = _codes(batch.column("split"))
    if not set(splits) <= set(SPLITS):
        raise ValueError(f"{datasets[0]}: split {splits} of studies, not of {SPLITS}")
    patients, patient = _strings(batch.column("patient"))
    names, name = _strings(batch.column("study"))
    findings, finding = _strings(batch.column("findings"))
    impressions, impression = _strings(batch.column("impression"))
    first_view, views = _lists(batch.column("views"))
    first_label, labels = _lists(batch.column("labels"))
    ids, identity = _strings(views.field("id"))
    digests, digest = _strings(views.field("digest"))
    positions, position = _codes(views.field("position"))
    shards, shard = _codes(views.field("shard"))
    offset, length, width, height = (views.field(n).to_numpy() for n in ("offset", "length", "width", "height"))
    classes, label = _codes(labels.field(0))
    row_pair, rows, row_size = _packed(dataset, split, patient, name, finding, impression, first_view, first_label)
    view_pair, packed_views, view_size = _packed(offset, length, width, height, position, shard, identity, digest)
    said_by, packed_labels, label_size = _packed(label, labels.field(1).to_numpy())

    def read(row: int) -> Study:
        d, s, p, n, f, i, v, m, _, _, p1, n1, f1, i1, v1, m1 = row_pair(rows, row * row_size)
        seen = []
        for at in range(v * view_size, v1 * view_size, view_size):
            place, size, w, h, z, k, t, g, _, _, _, _, _, _, t1, g1 = view_pair(packed_views, at)
            seen.append(_made(View, (ids[t:t1], positions[z], "", shards[k], place, size, w, h, digests[g:g1])))
        said = {}
        for at in range(m * label_size, m1 * label_size, label_size):
            c, value, _, _ = said_by(packed_labels, at)
            said[classes[c]] = value
        texts = findings[f:f1] or None, impressions[i:i1] or None
        return _made(Study, (datasets[d], patients[p:p1], names[n:n1], splits[s], tuple(seen), *texts, said))

    return read


_put = {kind: [getattr(kind, name).__set__ for name in kind.__slots__] for kind in (View, Study)}


def _made(kind: type[Record], values: tuple[Any, ...]) -> Record:
    """A record in half the time that the constructor of a frozen dataclass takes, which looks up every field."""
    made = object.__new__(kind)
    for put, value in zip(_put[kind], values):  # noqa: B905 (strict costs)
        put(made, value)
    return made


def _packed(*columns: np.ndarray) -> tuple[Callable[[bytes, int], tuple[int, ...]], bytes, int]:
    """Integer columns side by side, each in as few bytes a number as it needs: a function of the bytes and a place in
    them to the numbers of a row and those of the next one, the bytes, and how many a row takes.

    Columns with N + 1 elements hold the places where N rows begin and the last one ends; the others are filled up.
    """
    count = max(len(c) for c in columns) + 1
    small = [_small(c) for c in columns]
    table = np.zeros(count, [(str(i), c.dtype) for i, c in enumerate(small)])
    for i, c in enumerate(small):
        table[str(i)][: len(c)] = c
    codes = "".join(_LETTERS[c.dtype.type] for c in small)
    return struct.Struct(f"={codes}{codes}").unpack_from, table.tobytes(), table.itemsize


def _small(values: np.ndarray) -> np.ndarray:
    low, high = (values.min(), values.max()) if len(values) else (0, 0)
    held = (t for t in _LETTERS if np.iinfo(t).min <= low and high <= np.iinfo(t).max)
    return values.astype(next(held), copy=False)


# As ``struct`` calls them.
_LETTERS: dict[Any, str] = {np.int8: "b", np.uint8: "B", np.uint16: "H", np.int32: "i", np.int64: "q"}


def _offsets(array: pa.Array) -> np.ndarray:
    """The offsets of a string or list column, int32, one more than it has rows."""
    if not len(array):
        return np.zeros(1, np.int32)
    return np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]


def _strings(array: pa.Array) -> tuple[str, np.ndarray]:
    """A string column as one long text, and the place in it where each row begins, with the end of the last one; null
    and "" are the same. A piece of a str is made without decoding."""
    if array.null_count:
        array = array.fill_null("")  # the value behind a null is undefined
    ends = _offsets(array)
    buffer = array.buffers()[2]
    data = memoryview(buffer)[ends[0] : ends[-1]] if buffer is not None else b""
    text, places = str(data, "utf-8"), ends - ends[0]
    if len(text) < len(data):  # places in bytes are places in letters only where every letter is a byte
        begins = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
        places = np.concatenate([[0], np.cumsum(begins)])[places]
    return text, places


def _codes(array: pa.Array) -> tuple[list[str], np.ndarray]:
    """A column of few values: these, and which of them each row has. Equal ones are one object."""
    return array.dictionary.to_pylist(), array.indices.to_numpy()


def _lists(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """A list or map column: the places where each row begins and ends in the second, the elements of all rows."""
    elements = array.values if isinstance(array, pa.ListArray) else None
    if elements is None or isinstance(array, pa.MapArray):
        elements = pa.StructArray.from_arrays([array.keys, array.items], ["key", "value"])
    return _offsets(array), elements


def read_studies(path: Path, splits: Iterable[str] = SPLITS) -> Studies:
    """The studies of the given splits, in file order; a million take seconds and half a gigabyte.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged, or its columns are not those of ``INDEX_SCHEMA``.
    """
    return Studies(Path(path).absolute(), tuple(splits))


def label_classes(path: Path) -> set[str]:
    """Names of all classes that any study of an index has a label for.

    Raises:
        ValueError: there is no such file.
    """
    if not path.exists():
        raise ValueError(f"{path}: not found; the ingest stage writes it (dvc repro ingest)")
    labels = read_table(path, ["labels"])["labels"]
    return {name for chunk in labels.chunks for name in chunk.keys.unique().to_pylist()}


def write_studies(path: Path, studies: Iterable[Study]) -> None:
    """Write studies to one Parquet file, in the order given, holding ``GROUP`` of them at a time.

    The file appears when it is whole. Nothing time-dependent goes in: same studies, same bytes. Views lose their
    ``path``: the columns of ``INDEX_SCHEMA`` are the whitelist of what leaves ingest.
    """
    remaining = iter(studies)
    with writing(path, INDEX_SCHEMA, use_dictionary=CODED) as writer:
        while group := list(islice(remaining, GROUP)):
            writer.write_table(_table(group), row_group_size=GROUP)


def join_studies(path: Path, parts: Iterable[Path]) -> None:
    """One index of several, in their order: the bytes that ``write_studies`` gives for all their studies."""
    with writing(path, INDEX_SCHEMA, use_dictionary=CODED) as writer:
        held = INDEX_SCHEMA.empty_table()
        for part in parts:
            held = pa.concat_tables([held, read_table(part)])
            while held.num_rows >= GROUP:
                writer.write_table(held.slice(0, GROUP).combine_chunks(), row_group_size=GROUP)
                held = held.slice(GROUP)
        if held.num_rows:
            writer.write_table(held.combine_chunks(), row_group_size=GROUP)


def _table(studies: list[Study]) -> pa.Table:
    views = [view for study in studies for view in study.views]
    labels = [label for study in studies for label in study.labels.items()]
    view_columns = [pa.array([getattr(v, f.name) for v in views], f.type) for f in VIEW_TYPE]
    columns: dict[str, pa.Array] = {
        "views": pa.ListArray.from_arrays(
            _ends([len(s.views) for s in studies]), pa.StructArray.from_arrays(view_columns, fields=list(VIEW_TYPE))
        ),
        "labels": pa.MapArray.from_arrays(
            _ends([len(s.labels) for s in studies]),
            pa.array([name for name, _ in labels], pa.string()),
            pa.array([value for _, value in labels], pa.int8()),
        ),
    }
    for name in ("dataset", "patient", "study", "split", "findings", "impression"):
        columns[name] = pa.array([getattr(s, name) for s in studies], pa.string())
    return pa.table([columns[name] for name in INDEX_SCHEMA.names], schema=INDEX_SCHEMA)


def _ends(counts: list[int]) -> pa.Array:
    """Offsets of a list column, int32 [N + 1], from the length of each row."""
    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def write_rejects(path: Path, rejects: Iterable[Reject]) -> None:
    """Write the account of what was not used, one row a thing. The file appears when it is whole."""
    rows = [{n: getattr(r, n) for n in REJECT_SCHEMA.names} for r in rejects]
    write_table(path, pa.Table.from_pylist(rows, schema=REJECT_SCHEMA))
