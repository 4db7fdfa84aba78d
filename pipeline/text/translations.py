"""Back-translated sections, found by the hash of the section they say again, which is not kept beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.storage.parquet import read_table, write_table
from pipeline.study import Study

TRANSLATION_SCHEMA = pa.schema([("hash", pa.uint64()), ("translation", pa.string())])
TRANSLATIONS_FILE = "translations.parquet"


def text_hash(text: str) -> int:
    """blake2b-64 of a text as a whole number. Among a million texts two share one with a chance of 3 in 10^8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def report_sections(study: Study, captioned: Collection[str]) -> list[str]:
    """The sections that training may draw of a study: none if captions are made from its labels instead, as they are of
    the data sets ``captioned``."""
    if study.labels and study.dataset in captioned:
        return []
    return [text for text in (study.findings, study.impression) if text]


class Translations:
    """A table from text to back-translation: a read-only mapping that holds two Arrow buffers and eight bytes a text,
    which forked processes share. A pickle carries the table along."""

    def __init__(self, table: pa.Table) -> None:
        """``table`` has the columns of ``SCHEMA``, in any order of rows."""
        table = table.sort_by("hash").combine_chunks()
        self._table = table
        self._hashes = table["hash"].to_numpy()

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, text: str) -> str | None:
        """The back-translation of a text, or None where there is none."""
        wanted = np.uint64(text_hash(text))
        row = int(np.searchsorted(self._hashes, wanted))
        if row == len(self._hashes) or self._hashes[row] != wanted:
            return None
        said: str = self._table["translation"][row].as_py()
        return said

    def of(self, texts: Iterable[str]) -> Translations:
        """The part that says these texts again."""
        wanted = np.fromiter({text_hash(text) for text in texts}, np.uint64)
        return Translations(self._table.filter(pa.array(np.isin(self._hashes, wanted))))

    def write(self, path: Path) -> None:
        """Write the table, ordered by hash; it appears when it is whole. Same translations, same bytes."""
        write_table(path, self._table)


def read_translations(path: Path) -> Translations:
    """Inverse of ``Translations.write``; a file that is not there holds none.

    Raises:
        ValueError: it is damaged, or no such table.
    """
    if not path.exists():
        return Translations(TRANSLATION_SCHEMA.empty_table())
    table = read_table(path)
    if table.schema != TRANSLATION_SCHEMA:
        raise ValueError(f"{path}: no table of translations; make it again: dvc repro -f back_translate")
    return Translations(table)
