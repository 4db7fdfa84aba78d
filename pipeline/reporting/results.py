"""What ingest and evaluation wrote, read back: counts of archives, metrics of runs, and the paper's own figures."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.datasets import MANIFEST
from pipeline.evaluation.measure import Measure, measure_from_record
from pipeline.evaluation.metric_key import RSUM, Direction, MetricKey, key_from_record, read_key
from pipeline.evaluation.store import read_arrays
from pipeline.reporting.totals import add_totals, means_over_trainings

PAPER_FILE = Path(__file__).with_name("paper.yaml")
STAGES = {"few_shot": "few_shot", "official": "few_shot_official", "regeneration": "regenerate"}  # one a training
Read = Callable[[str], bytes | None]  # the content of the file at a path; None where there is none


class ResultsError(ValueError):
    """A summary or result file that is missing or not in its form; the message is one line that names it."""


@dataclass(frozen=True)
class Summary:
    """What ingest says of one archive: studies and images a split in its label files and in the shards."""

    dataset: str
    phantom: bool
    own: bool  # read from a list of the user's own, whatever its name
    labels_only: bool
    listed: dict[str, dict[str, int]]
    written: dict[str, dict[str, int]]
    found_images: int
    written_images: int
    rejected_images: int
    reasons: dict[str, int]
    notes: tuple[str, ...]


@dataclass
class RunResult:
    """All that was computed for one run or one other model.

    ``trained``: the seeds of the run's trainings, () for another model. With several of them a measure is the mean over
    the trainings with the interval of ``comparison.over_trainings``, and what is left (classes, curves, examples,
    history and so on) is the first training's.

    ``measures``: on all test images, and under keys with ``clean`` on those that training has not seen; a key that is
    missing there has the same value.
    ``classes``, ``curves``, ``precision_recall`` and ``calibration``: of zero-shot classification, by test set and
    class. ``pools``, ``examples``: of retrieval, by test set.
    """

    name: str
    trained: tuple[int, ...] = ()
    measures: dict[MetricKey, Measure] = field(default_factory=dict)
    classes: dict[str, dict[str, Measure]] = field(default_factory=dict)
    curves: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    precision_recall: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    calibration: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    pools: dict[str, Any] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@functools.cache
def load_paper(path: Path = PAPER_FILE) -> dict[str, Any]:
    """The paper's tables as data. Raises ``ResultsError`` where a row has not one figure a column."""
    paper: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key in (k for k in paper if k.startswith("table")):
        table = paper[key]
        for row in table["rows"]:
            if len(row["paper"]) != len(table["columns"]):
                count = f"{len(row['paper'])} figures for {len(table['columns'])} columns"
                raise ResultsError(f"{path}: {key}.{row['key']}: {count}")
    return paper


def load_summaries(index: Path, datasets: Iterable[str]) -> dict[str, Summary]:
    """Read ``<index>/<dataset>.json`` of each data set.

    Raises:
        ResultsError: a summary is missing, or its images do not add up.
    """
    summaries = {}
    for dataset in datasets:
        path = index / f"{dataset}.json"
        raw = _parsed(path, read_file(str(path)), f"run: dvc repro ingest@{dataset}")
        try:
            summary = Summary(
                dataset=raw["dataset"],
                phantom=bool(raw["phantom"]),
                own=raw["reader"] == MANIFEST,
                labels_only=bool(raw["labels_only"]),
                listed=raw["listed"],
                written=raw["written"],
                found_images=int(raw["found_images"]),
                written_images=int(raw["written_images"]),
                rejected_images=int(raw["rejected_images"]),
                reasons=dict(raw["reasons"]),
                notes=tuple(raw["notes"]),
            )
        except KeyError as error:
            raise ResultsError(f"{path}: key {error} is missing; run: dvc repro -f ingest@{dataset}") from None
        if summary.written_images + summary.rejected_images != summary.found_images:
            raise ResultsError(
                f"{path}: {summary.written_images} images written + {summary.rejected_images} rejected are not the "
                f"{summary.found_images} found; run: dvc repro -f ingest@{dataset}"
            )
        summaries[dataset] = summary
    return summaries


def read_file(path: str) -> bytes | None:
    """A file of this machine, for ``load_results``."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None


def load_results(
    results: Path,
    runs: Iterable[str],
    few_shot: Iterable[str],
    others: Iterable[str] = (),
    seeds: Sequence[int] = (0,),
    confidence: float = 0.95,
    official: Iterable[str] = (),
    regeneration: Iterable[str] = (),
    read: Read = read_file,
) -> tuple[dict[str, RunResult], list[str]]:
    """Read what evaluation wrote for the runs and the other models named, and nothing else that is in the folder.

    Args:
        results: data/results.
        runs: names of all runs.
        few_shot: those of them that have a linear probe.
        others: other people's models, which have one, too, and no training history.
        seeds: of the trainings of each run.
        confidence: of intervals.
        official: runs that are probed on ChestX-ray14's official lists; ``regeneration``: those that regenerate.
        read: gives the content of a path below ``results``: of this machine, or of another revision.

    Returns:
        The results by name, and the files that are not there (their figures are missing from the tables).

    Raises:
        ResultsError: a file is not in the form of docs/results.md, belongs to another run, or holds a value outside its
            range.
    """
    loaded: dict[str, RunResult] = {}
    missing: list[str] = []
    optional = {"few_shot": set(few_shot), "official": set(official), "regeneration": set(regeneration)}

    def one(name: str, kinds: Sequence[str]) -> RunResult:
        """One training of a run (``<run>/<seed>``) or another model."""
        run = RunResult(name)
        for kind in kinds:
            path = f"{results}/{kind}/{name}.json"
            if (text := read(path)) is None:
                missing.append(path)
            else:
                _read_evaluation(run, kind, path, text, read)
        if "/" in name:
            path = f"{results}/pretrain/{name}.csv"
            if (text := read(path)) is None:
                missing.append(path)
            else:
                rows = csv.DictReader(io.StringIO(text.decode()))
                run.history = [{k: float(v) for k, v in row.items() if v} for row in rows]
        chances = {test_set: pool["chance"] for test_set, pool in run.pools.items()}
        add_totals(run.measures, _summands(), chances, confidence)
        return run

    for name in runs:
        kinds = ["zero_shot", "retrieval", *(kind for kind, names in optional.items() if name in names)]
        trainings = [one(f"{name}/{seed}", kinds) for seed in seeds]
        measures = means_over_trainings([t.measures for t in trainings], seeds, confidence)
        notes = list(dict.fromkeys(note for t in trainings for note in t.notes))
        loaded[name] = replace(trainings[0], name=name, trained=tuple(seeds), measures=measures, notes=notes)
    for name in others:
        loaded[name] = one(name, ["zero_shot", "retrieval", "few_shot"])
    return loaded, missing


def _summands() -> dict[Direction, list[MetricKey]]:
    """What RSUM adds up, by direction: the recalls of Tables 3 and S3."""
    keys = [read_key(c["key"]) for table in ("table3", "tableS3") for c in load_paper()[table]["columns"]]
    return {way: [key for key in keys if key.direction == way and not key.over] for way in RSUM}


def _read_evaluation(run: RunResult, kind: str, path: str, text: bytes, read: Read) -> None:
    """Add one result file, and the samples beside it, to a run."""
    stage = STAGES.get(kind, kind)
    if kind in STAGES:
        stage = f"{stage}@{run.name.replace('/', '-')}" if "/" in run.name else f"few_shot_other@{run.name}"
    raw = _parsed(path, text, f"run: dvc repro {stage}")
    if raw.get("run") != run.name:
        raise ResultsError(f"{path}: belongs to run {raw.get('run')!r}; run: dvc repro -f {stage}")
    beside = path.removesuffix("json") + "npz"
    try:
        found = {} if (stored := read(beside)) is None else read_arrays(stored)
        samples = {name: values.astype(np.float64) for name, values in found.items()}
    except ValueError:
        raise ResultsError(f"{beside}: not samples of metrics; run: dvc repro -f {stage}") from None
    try:
        removed = {where: int(count) for where, count in raw.get("removed", {}).items()}
        for name, record in raw["metrics"].items():
            key = key_from_record(record)
            if key.name != name:
                raise ResultsError(f"{path}: metrics.{name} has the fields of {key.name}; run: dvc repro -f {stage}")
            where = f"metrics.{name}"
            run.measures[key] = _measure(path, where, record, key.bounds, removed.get(key.where), samples.get(name))
        if kind == "zero_shot":
            for test_set, classes in raw.get("classes", {}).items():
                where = f"classes.{test_set}"
                run.classes[test_set] = {c: _measure(path, f"{where}.{c}", m) for c, m in classes.items()}
            for part in ("curves", "precision_recall", "calibration"):
                getattr(run, part).update(raw.get(part, {}))
        run.pools.update(raw.get("pools", {}))
        run.examples.update(raw.get("examples", {}))
        run.notes = list(dict.fromkeys([*run.notes, *raw.get("notes", [])]))
    except ResultsError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ResultsError(f"{path}: not in the form of docs/results.md; run: dvc repro -f {stage}") from None


def _measure(
    path: str,
    where: str,
    record: Mapping[str, Any],
    bounds: tuple[float, float] = (0.0, 1.0),
    removed: int | None = None,
    samples: np.ndarray | None = None,
) -> Measure:
    try:
        return measure_from_record(record, bounds, removed, samples)
    except ValueError as error:
        raise ResultsError(f"{path}: {where}.{error}") from None


def headline_metrics(results: Mapping[str, RunResult]) -> dict[str, dict[str, float]]:
    """The content of reports/metrics.json: run -> metric -> fraction, rounded to 6 decimals, in a fixed key order.

    Keys are the names of ``metric_key``, without those of regeneration's coarser scales. A clean metric is there where
    it has another value than on all test images.
    """
    rows = {}
    for name, run in results.items():
        shown = {key: round(m.value, 6) for key, m in run.measures.items() if not key.scale}
        other = {k: v for k, v in shown.items() if not k.clean or v != shown.get(replace(k, clean=False))}
        rows[name] = dict(sorted(((k.name, v) for k, v in other.items()), key=lambda item: _natural(item[0])))
    return rows


def _natural(key: str) -> list[str | int]:
    """Sort key under which r5 comes before r10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _parsed(path: Path | str, text: bytes | None, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; None: it is not there."""
    if text is None:
        raise ResultsError(f"{path}: not found; {remedy}")
    try:
        raw = json.loads(text)
    except ValueError:
        raise ResultsError(f"{path}: not JSON; {remedy}") from None
    if not isinstance(raw, dict):
        raise ResultsError(f"{path}: not a JSON object; {remedy}")
    return raw
