"""What ingest and evaluation wrote, read back: counts of archives, metrics of runs, and the paper's own figures."""

from __future__ import annotations

import csv
import functools
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.datasets import used_for
from pipeline.evaluation.comparison import over_trainings
from pipeline.evaluation.metrics import percentiles

PAPER_FILE = Path(__file__).with_name("paper.yaml")
STAGES = {"few_shot": "few_shot", "official": "few_shot_official", "regeneration": "regenerate"}  # one a training
RECALL = re.compile(r"_r\d+$")
UNBOUNDED = re.compile(r"(rsum|_over_chance)$|[._]psnr\d")  # metrics that are no share
SIGNED = re.compile(r"[._](psnr|ssim)\d")  # and those that may be below 0


class ResultsError(ValueError):
    """A summary or result file that is missing or not in its form; the message is one line that names it."""


@dataclass(frozen=True)
class Measure:
    """A metric as a fraction (RSUM: a sum of fractions), its interval and the size of its test set.

    ``seeds``: its value by seed, where the figure is a mean over trainings, or else over draws of few-shot's subset.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    seeds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """What ingest says of one archive: studies and images a split in its label files and in the shards."""

    dataset: str
    phantom: bool
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
    """All that was computed for one run or one other model. ``measures`` has the keys of reports/metrics.json.

    ``trained``: the seeds of the run's trainings, () for another model. With several of them a measure is the mean over
    the trainings with the interval of ``comparison.over_trainings``, samples are means, too, and what is left (classes,
    curves, examples, history and so on) is the first training's.

    ``clean``: the same on test images that training has not seen; a key that is missing there has the same value.
    ``removed``: test images that are not clean, by evaluation (zero_shot, few_shot, official, regeneration, retrieval)
    and test set.
    ``samples``: a metric's values over the resamples, float64 [B], in the order of the draws, which two runs share.
    ``classes``, ``curves``, ``precision_recall`` and ``calibration``: of zero-shot classification, by data set and
    class.
    """

    name: str
    trained: tuple[int, ...] = ()
    measures: dict[str, Measure] = field(default_factory=dict)
    clean: dict[str, Measure] = field(default_factory=dict)
    removed: dict[str, dict[str, int]] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict)
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
        raw = _read_json(path, f"run: dvc repro ingest@{dataset}")
        try:
            summary = Summary(
                dataset=raw["dataset"],
                phantom=bool(raw["phantom"]),
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


def load_results(
    results: Path,
    runs: Iterable[str],
    few_shot: Iterable[str],
    others: Iterable[str] = (),
    seeds: Sequence[int] = (0,),
    confidence: float = 0.95,
    official: Iterable[str] = (),
    regeneration: Iterable[str] = (),
) -> tuple[dict[str, RunResult], list[str]]:
    """Read what evaluation wrote for the runs and the other models named, and nothing else that lies in the folder.

    Args:
        results: data/results.
        runs: names of all runs.
        few_shot: those of them that have a linear probe.
        others: other people's models, which have one, too, and no training history.
        seeds: of the trainings of each run.
        confidence: of intervals.
        official: runs that are probed on ChestX-ray14's official lists; ``regeneration``: those that regenerate.

    Returns:
        The results by name, and the files that are not there (their figures are missing from the tables).

    Raises:
        ResultsError: a file is not JSON, belongs to another run, or holds a value outside its range.
    """
    loaded: dict[str, RunResult] = {}
    missing: list[str] = []
    optional = {"few_shot": set(few_shot), "official": set(official), "regeneration": set(regeneration)}
    for name in runs:
        kinds = ["zero_shot", "retrieval", *(kind for kind, names in optional.items() if name in names)]
        trainings = [_read_run(results, f"{name}/{seed}", kinds, missing, confidence) for seed in seeds]
        loaded[name] = _over_trainings(name, tuple(seeds), trainings, confidence)
    for name in others:
        loaded[name] = _read_run(results, name, ["zero_shot", "retrieval", "few_shot"], missing, confidence)
    return loaded, missing


def _read_run(results: Path, name: str, kinds: Sequence[str], missing: list[str], confidence: float) -> RunResult:
    """One training of a run (``<run>/<seed>``) or another model; ``missing`` grows by the files that are not there."""
    run = RunResult(name)
    for kind in kinds:
        path = results / kind / f"{name}.json"
        if path.exists():
            _read_evaluation(path, kind, run)
        else:
            missing.append(str(path))
    if "/" in name:
        history = results / "pretrain" / f"{name}.csv"
        if history.exists():
            with history.open(newline="", encoding="utf-8") as file:
                run.history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        else:
            missing.append(str(history))
    _add_totals(run, confidence)
    return run


def _over_trainings(name: str, seeds: tuple[int, ...], trainings: Sequence[RunResult], confidence: float) -> RunResult:
    """What a run's trainings say together. A figure that one of them lacks is left out."""
    whole = replace(trainings[0], name=name, trained=seeds)
    if len(trainings) == 1:
        return whole
    samples = [set(t.samples) for t in trainings]
    whole.samples = {
        key: np.mean([t.samples[key] for t in trainings], axis=0)
        for key in trainings[0].samples
        if all(key in known for known in samples) and len({len(t.samples[key]) for t in trainings}) == 1
    }
    for part, prefix in (("measures", ""), ("clean", "clean/")):
        stored = [getattr(t, part) for t in trainings]
        figures = {key: [s[key] for s in stored] for key in stored[0] if all(key in s for s in stored)}
        merged = {key: _mean(key, m, seeds, whole.samples.get(prefix + key), confidence) for key, m in figures.items()}
        setattr(whole, part, merged)
    whole.notes = list(dict.fromkeys(note for t in trainings for note in t.notes))
    return whole


def _mean(
    key: str, measures: Sequence[Measure], seeds: Sequence[int], samples: np.ndarray | None, confidence: float
) -> Measure:
    """A figure over trainings; the interval of a share ends where shares do."""
    values = [m.value for m in measures]
    mean, low, high = over_trainings(values, samples, confidence)
    if not UNBOUNDED.search(key):
        high = min(high, 1.0)
    if not SIGNED.search(key):
        low = max(low, 0.0)
    by_seed = {str(seed): value for seed, value in zip(seeds, values, strict=True)}
    return Measure(mean, low, high, measures[0].n, by_seed)


def _read_evaluation(path: Path, kind: str, run: RunResult) -> None:
    """Add one result file, and the samples beside it, to a run."""
    stage = STAGES.get(kind, kind)
    if kind in STAGES:
        stage = f"{stage}@{run.name.replace('/', '-')}" if "/" in run.name else f"few_shot_other@{run.name}"
    raw = _read_json(path, f"run: dvc repro {stage}")
    if raw.get("run") != run.name:
        raise ResultsError(f"{path}: belongs to run {raw.get('run')!r}; run: dvc repro -f {stage}")
    for part, into in (("metrics", run.measures), ("clean", run.clean)):
        for key, value in raw.get(part, {}).items():
            into[_metric_name(kind, key)] = _measure(path, f"{part}.{key}", value)
    run.removed[kind] = {dataset: int(count) for dataset, count in raw.get("removed", {}).items()}
    if kind == "zero_shot":
        for dataset, classes in raw.get("classes", {}).items():
            where = f"classes.{dataset}"
            run.classes[dataset] = {c: _measure(path, f"{where}.{c}", m) for c, m in classes.items()}
        for part in ("curves", "precision_recall", "calibration"):
            getattr(run, part).update(raw.get(part, {}))
    run.pools.update(raw.get("pools", {}))
    run.examples.update(raw.get("examples", {}))
    run.notes = list(dict.fromkeys([*run.notes, *raw.get("notes", [])]))
    samples = path.with_suffix(".npz")
    if samples.exists():
        try:
            with np.load(samples, allow_pickle=False) as arrays:
                run.samples |= {_metric_name(kind, k): arrays[k].astype(np.float64) for k in arrays.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):
            raise ResultsError(f"{samples}: not samples of metrics; run: dvc repro -f {stage}") from None


def headline_metrics(results: Mapping[str, RunResult]) -> dict[str, dict[str, float]]:
    """The content of reports/metrics.json: run -> metric -> fraction, rounded to 6 decimals, in a fixed key order.

    Keys: ``<data set>_zs_auc``, ``_zs_accuracy``, ``_p10_auc``, ``_p100_auc``, ``_r1`` …; ``macro_zs_auc`` (mean of
    VinDr-CXR, RSNA and SIIM), ``rsum`` (Table 3's nine recalls), ``<data set>_r10_over_chance`` (a ratio);
    ``<data set>_ft10_auc`` … (fine-tuned), ``<data set>_t2i_r1`` … (text to image), ``<protocol>/<key>`` (another
    protocol's); ``<data set>_psnr50_matching`` … (regeneration, finest scale; PSNR in dB). ``<key>_clean`` is
    there where the clean test images give another value.
    """
    rows = {}
    for name, run in results.items():
        values, clean = (
            {key: round(m.value, 6) for key, m in part.items() if "_scale" not in key}
            for part in (run.measures, run.clean)
        )
        other = {f"{key}_clean": value for key, value in clean.items() if value != values.get(key)}
        rows[name] = dict(sorted({**values, **other}.items(), key=lambda item: _natural(item[0])))
    return rows


def rsum(run: RunResult, recalls: Sequence[str], confidence: float = 0.95, clean: bool = False) -> Measure | None:
    """The sum of these recalls, or None where one is missing: a shorter sum is another quantity.

    Its interval is evaluation's own where that is the sum of exactly these recalls, else that of the sums of the
    recalls' resamples (each test set is drawn for itself), where these were kept.
    """
    found = {**run.measures, **run.clean} if clean else run.measures
    if not recalls or any(key not in found for key in recalls):
        return None
    total = math.fsum(found[key].value for key in recalls)
    stored = (run.clean if clean else run.measures).get("t2i_rsum" if "_t2i_" in recalls[0] else "rsum")
    if stored and math.isclose(stored.value, total, abs_tol=1e-6):
        return replace(stored, value=total, n=None)
    samples = sample_sum(run, recalls, clean)
    if len(run.trained) > 1:
        sums = [Measure(math.fsum(found[key].seeds[str(seed)] for key in recalls)) for seed in run.trained]
        return _mean("rsum", sums, run.trained, samples, confidence)
    if samples is not None:
        low, high = percentiles(samples, confidence)
        return Measure(total, low, high)
    return Measure(total)


def sample_sum(run: RunResult, keys: Sequence[str], clean: bool = False) -> np.ndarray | None:
    """The resamples' values of a metric, or of a sum of metrics, float64 [B]; None where they were not kept."""
    chosen = [f"clean/{k}" if clean and f"clean/{k}" in run.samples else k for k in keys]
    if any(key not in run.samples for key in chosen) or len({len(run.samples[k]) for k in chosen}) != 1:
        return None
    total: np.ndarray = np.sum([run.samples[key] for key in chosen], axis=0)
    return total


def _add_totals(run: RunResult, confidence: float) -> None:
    """The metrics made of others: macro zero-shot AUC, RSUM and R@10 against chance."""
    binary = used_for("binary_classification")
    aucs = [run.measures.get(f"{d}_zs_auc") for d in binary]
    known = [m for m in aucs if m]
    if len(known) == len(aucs):
        value = math.fsum(m.value for m in known) / len(known)
        run.measures["macro_zs_auc"] = Measure(value)
        samples = sample_sum(run, [f"{d}_zs_auc" for d in binary])
        if samples is not None:
            run.samples["macro_zs_auc"] = samples / len(known)
            run.measures["macro_zs_auc"] = Measure(value, *percentiles(samples / len(known), confidence))
    recalls = [c["key"] for c in load_paper()["table3"]["columns"] if RECALL.search(c["key"])]
    total = rsum(run, recalls, confidence)
    run.measures.pop("rsum", None)
    if total:
        run.measures["rsum"] = total
    for dataset, pool in run.pools.items():
        chance, recall = pool["chance"].get("r10"), run.measures.get(f"{dataset}_r10")
        if chance and recall:
            run.measures[f"{dataset}_r10_over_chance"] = Measure(recall.value / chance)


def _metric_name(kind: str, key: str) -> str:
    """Evaluation's ``rsna.auc`` as the flat name of metrics.json, ``rsna_zs_auc``; what stands before a / stays."""
    before, slash, name = key.rpartition("/")
    dataset, _, metric = name.partition(".")
    if dataset == "total":
        return before + slash + metric
    form = {"zero_shot": "{}_zs_{}", "few_shot": "{}_{}_auc", "official": "{}_{}_auc"}.get(kind, "{}_{}")
    return before + slash + form.format(dataset, metric)


def _measure(path: Path, key: str, raw: Mapping[str, Any]) -> Measure:
    most = math.inf if UNBOUNDED.search(key) else 1.0
    least = -math.inf if SIGNED.search(key) else 0.0
    seeds = raw.get("seeds", {})
    for part, value in (
        *((p, raw.get(p)) for p in ("value", "low", "high")),
        *((f"seeds.{k}", v) for k, v in seeds.items()),
    ):
        if not isinstance(value, int | float) or not math.isfinite(value) or not least <= value <= most:
            raise ResultsError(f"{path}: {key}.{part} is {value!r}, expected a number from {least:g} to {most:g}")
    return Measure(raw["value"], raw["low"], raw["high"], raw.get("n"), seeds)


def _natural(key: str) -> list[str | int]:
    """Sort key under which r5 comes before r10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: not found; {remedy}") from None
    except ValueError:
        raise ResultsError(f"{path}: not JSON; {remedy}") from None
    if not isinstance(raw, dict):
        raise ResultsError(f"{path}: not a JSON object; {remedy}")
    return raw
