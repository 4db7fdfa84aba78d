"""Your own archive: one CSV or Parquet file that lists its images, and no code."""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Iterator
from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.report_sections import clean_text, sections
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.study import Reject, Study, View

SPLIT_WORDS = {"": "train", "train": "train", "valid": "valid", "validate": "valid", "val": "valid", "test": "test"}
VIEW_WORDS = {"": "", "PA": "PA", "AP": "AP", "LATERAL": "LATERAL", "LL": "LATERAL"}
LABEL = "label:"
TEXTS = ("findings", "impression", "report")
MAX_PARQUET = 1 << 30  # bytes
MAX_PARTS = 50_000  # row groups, or columns of one: memory for as many as are said is taken before the first is read
MAX_ROWS = 1_000_000  # and as many again as the file has bytes: no row, which names a file, takes less than one


def read_manifest(files: Archive, name: str) -> Iterator[Study | Reject]:
    """Studies of a manifest, in order of their first row.

    One row an image. Columns, of which all but ``image`` may be absent:

    * ``image``: the file below the archive's root, in a pack as ``pack.zip!/path``;
    * ``study``, ``patient``: ids, else ``image_id`` and the study's id; ``view``: PA, AP or LATERAL;
    * ``findings`` and ``impression``, or ``report``, whose sections are taken as MIMIC-CXR's are;
    * ``label:<class>``: 1, 0, -1 or blank; ``split``: train, valid or test, else train.

    Texts, labels and split are those of a study's first row.

    Args:
        name: of the manifest, below the archive's root.

    Raises:
        SourceError: the manifest is missing, damaged or without a column ``image``; or a study is in two splits.
            (A patient may: public splits do that.)
    """
    if why := dict(files.problems).get(posixpath.normpath(name)):
        raise archive.SourceError(f"{files.dataset}: {files.files.root}/{name}: {why}")
    present = set(files.names)
    studies: dict[tuple[str, str], Study] = {}
    views: dict[tuple[str, str], list[View]] = {}
    clean, cut = lru_cache(4096)(clean_text), lru_cache(4096)(sections)  # a small file may say a long text often
    for number, row in enumerate(_rows(files, name), 1):
        item = f"row {number}"
        image = row["image"]
        split = SPLIT_WORDS.get(row.get("split", "").lower())
        position = VIEW_WORDS.get(row.get("view", "").upper())
        try:
            given = {k.removeprefix(LABEL): archive.parse_label(v) for k, v in row.items() if k.startswith(LABEL)}
        except ValueError:
            yield Reject(files.dataset, item, "row", "a label is none of 1, 0, -1, blank")
            continue
        if any(len(row.get(key, "")) > archive.MAX_REPORT for key in TEXTS):
            yield Reject(files.dataset, item, "row", "a text is too large to be a report")
            continue
        if not image or split is None or position is None:
            reason = "no image is named" if not image else "split is none of train, valid, test, blank"
            if image and split is not None:
                reason = "view is none of PA, AP, LATERAL, blank"
            yield Reject(files.dataset, item, "row", reason)
            continue
        identity = image_id(image)
        study = row.get("study") or identity
        patient = row.get("patient") or study
        view = View(id=identity, position=position, path=image if image in present else "")
        known = studies.get((patient, study))
        if known is not None:
            if known.split != split:
                raise archive.SourceError(
                    f"{files.dataset}: {files.files.root}/{name}: row {number}: its study is in two splits"
                )
            views[patient, study].append(view)
            continue
        findings, impression = clean(row.get("findings", "")), clean(row.get("impression", ""))
        if findings is None and impression is None and row.get("report"):
            findings, impression = cut(row["report"])
        labels = {k: v for k, v in given.items() if v is not None}
        views[patient, study] = [view]
        studies[patient, study] = Study(files.dataset, patient, study, split, (), findings, impression, labels)
    yield from (study.with_views(views[ids]) for ids, study in studies.items())


def image_id(image: str) -> str:
    """The id of an image in the index and the audit: a digest of its path below the archive's root (blake2b-64, hex),
    because a file's name may be a person's."""
    return hashlib.blake2b(image.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _rows(files: Archive, name: str) -> Iterator[dict[str, str]]:
    if not name.endswith(".parquet"):
        yield from archive.table_rows(files, name, ["image"])
        return
    path = f"{files.files.root}/{name}"
    data = archive.content(files, name, MAX_PARQUET)
    try:
        about = pq.ParquetFile(io.BytesIO(data), thrift_container_size_limit=MAX_PARTS).metadata
        table = pq.ParquetFile(io.BytesIO(data), metadata=about, read_dictionary=_texts(about.schema.to_arrow_schema()))
        unpacked = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
        if unpacked > archive.MAX_UNPACKED + archive.MAX_RATIO * len(data) or about.num_rows > MAX_ROWS + len(data):
            raise archive.SourceError(f"{files.dataset}: {path}: it unpacks to more than any list of images does")
        if "image" not in table.schema_arrow.names:
            raise archive.SourceError(f"{files.dataset}: {path}: no column 'image'")
        for batch in table.iter_batches(4096):
            columns = [_cells(column) for column in batch.columns]
            for cells in zip(*columns, strict=True):
                yield dict(zip(batch.schema.names, cells, strict=True))
    except archive.SourceError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise archive.SourceError(f"{files.dataset}: {path}: missing or damaged ({type(error).__name__})") from None


def _texts(schema: pa.Schema) -> list[str]:
    """The columns of text: as codes, a text that a small file holds once is once in memory, however many rows say
    it."""
    return [field.name for field in schema if field.type in (pa.string(), pa.large_string())]


def _cells(column: pa.Array) -> list[str]:
    """As text, nulls blank."""
    if isinstance(column, pa.DictionaryArray):
        used = column.indices.unique().drop_null()
        values = dict(zip(used.to_pylist(), _cells(column.dictionary.take(used)), strict=True))
        return [values.get(code, "") for code in column.indices.to_pylist()]
    return ["" if value is None else str(value).strip() for value in column.to_pylist()]
