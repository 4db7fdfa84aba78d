"""One row's evaluation as the evaluation stages write it, and what replaces embeddings of a model that is not there
(form: docs/results.md)."""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MetricKey
from pipeline.storage.atomic import emptied, replacing, write_text

EMBEDDINGS = Path("data/embeddings")
MISSING_FILE = "missing.json"


def embeddings_of(row: str, folder: Path = EMBEDDINGS) -> Path:
    """Where the embeddings of a row are: below runs/ those of our trainings (``<run>/<seed>``), else below others/."""
    return folder / ("runs" if "/" in row else "others") / row


def forget_other_runs(rows: Collection[str], folder: Path = EMBEDDINGS) -> None:
    """Remove the embeddings of our trainings that are not among ``rows``."""
    for path in (folder / "runs").glob("*/*"):
        if f"{path.parent.name}/{path.name}" not in rows:
            shutil.rmtree(path)


def write_missing(embeddings: Path, why: str) -> None:
    """The folder of a model whose weights are not there, or whose two modalities training never brought together:
    missing.json alone, {"missing": which file goes where, or what was not trained}."""
    write_text(emptied(embeddings) / MISSING_FILE, json.dumps({"missing": why}) + "\n")


def why_missing(embeddings: Path) -> str | None:
    """What ``write_missing`` wrote into a folder of embeddings; None where the embeddings are there."""
    path = embeddings / MISSING_FILE
    return str(json.loads(path.read_text(encoding="utf-8"))["missing"]) if path.is_file() else None


def write_result(path: Path, run: str, found: dict[str, Any]) -> None:
    """Write one evaluation of one run, whole or not at all: JSON at ``path``, the metrics' samples as .npz beside it.

    ``found["metrics"]`` holds the measure of each ``MetricKey``; in the file each has its name, with the fields of
    both (docs/results.md).
    """
    measured: Mapping[MetricKey, Measure] = found["metrics"]
    metrics = {key.name: {**key.record(), **measure.record()} for key, measure in measured.items()}
    body = {"run": run, **found, "metrics": metrics}
    write_text(path, json.dumps(body, indent=1, default=Measure.record) + "\n")
    samples = {key.name: measure.samples for key, measure in measured.items() if measure.samples is not None}
    write_arrays(path.with_suffix(".npz"), samples)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as .npz, compressed, whole or not at all."""
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name.

    Raises:
        ValueError: it is not there or damaged; one line with ``remedy``, the command that writes it.
    """
    try:
        return read_arrays(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run: {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; run: {remedy}") from None


def read_arrays(stored: bytes) -> dict[str, np.ndarray]:
    """The arrays of the content of an .npz file by name.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception:  # zipfile, zlib and NumPy have a dozen types for damage
        raise ValueError("damaged") from None
    # zipfile holds each entry against its checksum, but not their number against that of the file's last record.
    if struct.unpack_from("<H", stored, len(stored) - 12)[0] != len(found):
        raise ValueError("damaged")
    return found


def metric_values(found: dict[str, Any]) -> dict[str, float]:
    """The bare metric values with their interval's ends, ``<name>``, ``<name>.low``, ``<name>.high``, for tracking."""
    flat = {}
    for key, measure in found["metrics"].items():
        flat[key.name] = measure.value
        flat[f"{key.name}.low"], flat[f"{key.name}.high"] = measure.low, measure.high
    return flat


def print_metrics(stage: str, run: str, found: dict[str, Any]) -> None:
    """Print metrics on all test images in percent with their intervals, and the notes."""
    for key, m in found["metrics"].items():
        if not key.clean:
            print(f"{stage} {run}: {key.name} {100 * m.value:.1f} [{100 * m.low:.1f}, {100 * m.high:.1f}]")
    for note in found["notes"]:
        print(f"{stage} {run}: note: {note}")
