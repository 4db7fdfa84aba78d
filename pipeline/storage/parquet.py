"""Parquet files that show damage: each holds a digest of all its bytes, which is checked whenever it is read.

Ours, because Parquet's own checksums cover the pages alone: a bit of a page's header or of the footer changes what is
read in silence. The digest is in the file's own metadata; other tools read the file as any other.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.atomic import replacing

KEY = "cxr.blake2b"
BLANK = b"0" * 32  # what the digest's own place counts as
CHUNK = 1 << 20  # bytes read at a time
FOOTER_END = 8  # bytes: the footer's length and the closing magic (Parquet format, "File Format")


class DamagedFile(ValueError):
    """A Parquet file that is not as it was written; one line with its path."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: damaged, or not written by this pipeline; make it again (dvc repro -f)")


@contextmanager
def writing(path: Path, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """A writer of row groups for ``path``, which appears whole or not at all. Same tables, same bytes.

    Args:
        options: of ``pyarrow.parquet.ParquetWriter``.
    """
    with replacing(path) as partial:
        with pq.ParquetWriter(partial, schema.remove_metadata(), compression="zstd", **options) as writer:
            yield writer
            writer.add_key_value_metadata({KEY: BLANK.decode()})
        with partial.open("r+b") as file:
            start = _place(file)
            digest = _digest(file, start)
            file.seek(start)
            file.write(digest)


def write_table(path: Path, table: pa.Table) -> None:
    """Write one table to ``path``, whole or not at all."""
    with writing(path, table.schema) as writer:
        writer.write_table(table)


def open_file(path: Path, **options: Any) -> pq.ParquetFile:
    """A file that ``writing`` wrote, its digest checked.

    Args:
        options: of ``pyarrow.parquet.ParquetFile``.

    Raises:
        OSError: there is no such file. DamagedFile: it is not as it was written.
    """
    data = path.read_bytes()  # not mapped: where a mapped file is cut, the process ends
    file = io.BytesIO(data)
    start = _place(file)
    if start < 0 or data[start : start + len(BLANK)] != _digest(file, start):
        raise DamagedFile(path)
    return pq.ParquetFile(pa.BufferReader(data), **options)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A table of ``write_table``, all columns or those named. Raises as ``open_file`` does."""
    with open_file(path) as file:
        return file.read(columns=None if columns is None else list(columns)).replace_schema_metadata(None)


def _place(file: BinaryIO) -> int:
    """Where the digest is in a file; -1 where there is none."""
    size = file.seek(0, 2)
    file.seek(max(0, size - FOOTER_END))
    footer = max(0, size - FOOTER_END - int.from_bytes(file.read(FOOTER_END // 2), "little"))
    file.seek(footer)
    # A text in Thrift's compact protocol is its length, then its bytes; before a field's there is a byte for the field.
    mark = bytes([len(KEY)]) + KEY.encode() + bytes([0x18, len(BLANK)])
    found = file.read().rfind(mark)  # the last one: what comes before may be a value of a column
    return footer + found + len(mark) if found >= 0 else -1


def _digest(file: BinaryIO, start: int) -> bytes:
    """blake2b-128 in hex of all bytes, those at the digest's place counted as ``BLANK``."""
    digest = hashlib.blake2b(digest_size=len(BLANK) // 2)
    file.seek(0)
    while piece := file.read(min(CHUNK, start - file.tell())):
        digest.update(piece)
    digest.update(BLANK)
    file.seek(start + len(BLANK))
    while piece := file.read(CHUNK):
        digest.update(piece)
    return digest.hexdigest().encode()
