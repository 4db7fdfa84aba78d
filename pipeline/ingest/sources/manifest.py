"""Your own archive: one CSV or Parquet file that lists its images, and no code."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.ingest.report_sections import clean_text, sections
from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.study import Reject, Study, View

SPLIT_WORDS = {"": "train", "train": "train", "valid": "valid", "validate": "valid", "val": "valid", "test": "test"}
VIEW_WORDS = {"": "", "PA": "PA", "AP": "AP", "LATERAL": "LATERAL", "LL": "LATERAL"}
LABEL = "label:"


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
    present = set(files.names)
    studies: dict[tuple[str, str], Study] = {}
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
            studies[patient, study] = known.with_views([*known.views, view])
            continue
        findings, impression = clean_text(row.get("findings", "")), clean_text(row.get("impression", ""))
        if findings is None and impression is None and row.get("report"):
            findings, impression = sections(row["report"])
        labels = {k: v for k, v in given.items() if v is not None}
        studies[patient, study] = Study(files.dataset, patient, study, split, (view,), findings, impression, labels)
    yield from studies.values()


def image_id(image: str) -> str:
    """The id of an image in the index and the audit: a digest of its path below the archive's root (blake2b-64, hex),
    because a file's name may be a person's."""
    return hashlib.blake2b(image.encode(errors="surrogateescape"), digest_size=8).hexdigest()


def _rows(files: Archive, name: str) -> Iterator[dict[str, str]]:
    if not name.endswith(".parquet"):
        yield from archive.table_rows(files, name, ["image"])
        return
    try:
        table = pq.read_table(io.BytesIO(archive.content(files, name)))
    except (OSError, pa.ArrowException) as error:
        raise archive.SourceError(
            f"{files.dataset}: {files.files.root}/{name}: missing or damaged ({type(error).__name__})"
        ) from None
    if "image" not in table.column_names:
        raise archive.SourceError(f"{files.dataset}: {files.files.root}/{name}: no column 'image'")
    for batch in table.to_batches(max_chunksize=4096):
        for row in batch.to_pylist():
            yield {key: "" if value is None else str(value).strip() for key, value in row.items()}
