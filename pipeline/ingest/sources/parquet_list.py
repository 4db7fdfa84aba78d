"""A list of images in a Parquet file of somebody else, read row by row as text."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive, SourceError
from pipeline.ingest.sources.tables import MAX_RATIO, MAX_ROWS, MAX_UNPACKED, MOST_ROWS, Row, column_names

MAX_PARQUET = 1 << 30  # bytes
MAX_PARTS = 50_000  # row groups, or columns of one: memory for as many as are said is taken before the first is read


def parquet_rows(files: Archive, name: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows with their cells as text, nulls blank; names of columns as ``tables.read_table`` gives them.

    Args:
        columns: the first of them must be there.

    Raises:
        SourceError: the file is missing or damaged, has no such column, or unpacks to more than any list does.
    """
    path = f"{files.dataset}: {files.files.root}/{name}"
    data = archive.content(files, name, MAX_PARQUET)
    try:
        about = pq.ParquetFile(io.BytesIO(data), thrift_container_size_limit=MAX_PARTS).metadata
        table = pq.ParquetFile(io.BytesIO(data), metadata=about, read_dictionary=_texts(about.schema.to_arrow_schema()))
        unpacked = sum(about.row_group(n).total_byte_size for n in range(about.num_row_groups))
        if unpacked > MAX_UNPACKED + MAX_RATIO * len(data) or about.num_rows > min(MOST_ROWS, MAX_ROWS + len(data)):
            raise SourceError(f"{path}: it unpacks to more than any list of images does")
        named = column_names(table.schema_arrow.names, columns[:1], columns, path)
        for column, field in zip(named, table.schema_arrow, strict=True):
            if column in columns and (pa.types.is_nested(field.type) or pa.types.is_binary(field.type)):
                raise SourceError(f"{path}: column {column!r} holds {field.type}; write it as text")
        number = 0
        for batch in table.iter_batches(4096):
            of_column = [_cells(column) for column in batch.columns]
            for cells in zip(*of_column, strict=True):
                number += 1
                found = dict(zip(named, cells, strict=True))
                found.pop("", None)
                yield Row(f"row {number}", found)
    except SourceError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"{path}: missing or damaged ({type(error).__name__})") from None


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
