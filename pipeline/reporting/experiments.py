"""Experiments of ``dvc exp run`` beside their baseline: what each changed, what became of the metrics, what it cost.

What an experiment produced is read from its own commit: git holds params.yaml and dvc.lock, and DVC's file system finds
in its cache what dvc.lock names. Nothing is checked out. The form of results: docs/results.md.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from pipeline.datasets import display_names, source_of, used_for
from pipeline.evaluation.comparison import Difference, paired
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MetricKey
from pipeline.reporting.results import load_results
from pipeline.tracking.work_folders import repository_root

RESULTS = Path("data/results")


@dataclass(frozen=True)
class Cost:
    """What an experiment took: wall time of its stages in seconds, memory in bytes. None = not recorded."""

    stages: int
    seconds: float
    training: float
    device: str | None
    memory: float | None
    gpu_memory: float | None


@dataclass
class Experiment:
    """One commit's parameters and results."""

    name: str
    revision: str
    params: dict[str, Any]  # params.yaml with dotted keys
    metrics: dict[str, dict[MetricKey, Measure]]  # run -> headline metric
    history: dict[str, list[tuple[int, float]]]  # run -> (epoch from 1, validation loss), of the first seed
    tests: dict[str, str]  # data set -> digest of its test studies, patients and labels
    files: tuple[str, ...] = ()  # changed beside params.yaml
    notes: list[str] = field(default_factory=list)
    cost: Cost | None = None


def read_experiment(files: Any, name: str, revision: str, changed: Iterable[str] = ()) -> Experiment:
    """What a commit produced.

    Args:
        files: an fsspec file system with the repository's paths: ``dvc.api.DVCFileSystem(rev=...)``, or a folder.
        changed: files it changes beside params.yaml.

    Raises:
        ValueError: a result is not in the form of docs/results.md.
    """
    raw = yaml.safe_load(files.read_text("params.yaml", encoding="utf-8"))
    found = Experiment(name, revision, flat(raw), {}, {}, {}, tuple(changed))
    others = raw.get("others", {})
    results, absent = load_results(
        *(RESULTS, raw.get("runs", {}), raw.get("main", ()), others, raw.get("seeds", [0]), _confidence(found)),
        read=partial(_bytes, files),
    )
    for run, result in results.items():
        if metrics := headline_measures(result.measures):
            found.metrics[run] = metrics
        if result.history:
            found.history[run] = [(int(row["epoch"]) + 1, row["valid_loss"]) for row in result.history]
    for dataset in raw["sources"]:
        if (text := _bytes(files, f"data/index/{dataset}.parquet")) is not None:
            found.tests[dataset] = _test_set(text)
    if absent:
        found.notes.append(
            f"{len(absent)} result files are neither in the cache nor on a remote; run: dvc fetch, or repeat it"
        )
    return found


def headline_measures(measures: Mapping[MetricKey, Measure]) -> dict[MetricKey, Measure]:
    """What experiments compare: the mean AUC, other zero-shot metrics, the rest, retrieval; single recalls only where
    there is no sum."""
    sums = any(key.headline and key.over == "sum" for key in measures)
    chosen = [key for key in measures if key.headline and not (sums and key.quantity == "recall" and not key.over)]

    def place(key: MetricKey) -> tuple[bool, bool, bool]:
        return key.over != "mean", key.task != "zero_shot", key.task == "retrieval"

    return {key: measures[key] for key in sorted(chosen, key=place)}


def _confidence(experiment: Experiment) -> float:
    return float(experiment.params.get("evaluate.bootstrap.confidence", 0.95))


def _bytes(files: Any, path: str) -> bytes | None:
    """A file, or None where the commit or the cache has it not."""
    try:
        return bytes(files.read_bytes(path))
    except (FileNotFoundError, IsADirectoryError):
        return None


def _test_set(text: bytes) -> str:
    """A digest of who is tested on what: patient, study and labels of the test split, in order."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(text), columns=["patient", "study", "split", "labels"])
    rows = table.filter(pc.equal(table["split"], "test")).to_pylist()
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, values as they are."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def changes(baseline: Experiment, other: Experiment) -> dict[str, tuple[str, str]]:
    """Parameters that differ: key -> (baseline's, the experiment's), as YAML; "—" where there is none.

    Of a place on the machine it tells the last part alone.
    """

    def show(params: Mapping[str, Any], key: str) -> str:
        if key not in params:
            return "—"
        value = params[key]
        if isinstance(value, str) and value.startswith(("/", "~")):
            return Path(value).name
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()

    keys = list(dict.fromkeys([*baseline.params, *other.params]))
    both = [(key, baseline.params.get(key, ...), other.params.get(key, ...)) for key in keys]
    return {key: (show(baseline.params, key), show(other.params, key)) for key, old, new in both if old != new}


def difference(baseline: Experiment, other: Experiment, run: str, key: MetricKey) -> Difference | None:
    """A metric of a run less the baseline's, with the interval of the paired bootstrap: both were taken over the same
    resamples of patients, so that what the two have in common cancels. None where either has no such metric."""
    old, new = (e.metrics.get(run, {}).get(key) for e in (baseline, other))
    if old is None or new is None:
        return None
    if why := _unpaired(baseline, other, key, old, new):
        return Difference(new.value - old.value, why=why)
    return paired(new, old, _confidence(baseline))


def _unpaired(baseline: Experiment, other: Experiment, key: MetricKey, old: Measure, new: Measure) -> str:
    """Why the resamples of the two do not pair up, or nothing."""
    for e, measure in ((baseline, old), (other, new)):
        if measure.samples is None:
            return f"no resamples stored for {e.name}"
    assert old.samples is not None and new.samples is not None
    if old.trainings.keys() != new.trainings.keys() or baseline.params.get("seeds") != other.params.get("seeds"):
        return "trained with other seeds"
    if baseline.params.get("seed") != other.params.get("seed") or len(old.samples) != len(new.samples):
        return "other resamples: seed or evaluate.bootstrap differs"
    for dataset in _tested_on(key, baseline.tests.keys() | other.tests.keys()):
        if baseline.tests.get(dataset) != other.tests.get(dataset):
            return f"other test studies of {dataset}"
    return ""


def _tested_on(key: MetricKey, known: Iterable[str]) -> Sequence[str]:
    """The data sets whose test studies a metric depends on; a sum of recalls: any of those ``known``."""
    if key.over == "sum":
        return sorted(known)
    return used_for("binary_classification") if key.over == "mean" else [source_of(key.test_set)]


def headlines(experiments: Sequence[Experiment], run: str) -> list[MetricKey]:
    """The headline metrics any of them has for a run, in the order first met."""
    return list(dict.fromkeys(key for e in experiments for key in e.metrics.get(run, {})))


def headline_label(key: MetricKey) -> str:
    """A metric's name for people, ``rsna_zs_auc`` -> ``RSNA AUC``."""
    if key.over == "sum":
        return key.label
    name = "Mean" if key.over == "mean" else display_names().get(key.test_set, key.test_set)
    return f"{name} {key.label}"


def touched(baseline: Experiment, other: Experiment) -> list[str]:
    """Runs whose figures are not the baseline's to the last bit."""

    def figures(e: Experiment, run: str) -> Any:
        return e.history.get(run), {k: (m.value, m.low, m.high, m.n) for k, m in e.metrics.get(run, {}).items()}

    runs = dict.fromkeys([*baseline.metrics, *baseline.history, *other.metrics, *other.history])
    return [run for run in runs if figures(baseline, run) != figures(other, run)]


def verdict(baseline: Experiment, other: Experiment) -> tuple[int, int, int, int]:
    """Over all headline metrics of the runs it touched: better, worse, not told apart, without an interval."""
    counts = [0, 0, 0, 0]
    for run in touched(baseline, other):
        for key in headlines([baseline, other], run):
            found = difference(baseline, other, run, key)
            if found is not None:
                counts[3 if found.low is None else {1: 0, -1: 1, 0: 2}[found.sign]] += 1
    return counts[0], counts[1], counts[2], counts[3]


def costs(names: Iterable[str], baseline: str) -> dict[str, Cost]:
    """What MLflow knows of experiments: every attempt, those that were killed too.

    Args:
        names: of experiments.
        baseline: commit they start from; another experiment may have borne the name before.
    """
    import os

    from pipeline.tracking import mlflow_runs

    if "MLFLOW_TRACKING_URI" not in os.environ and not (repository_root() / "mlflow.db").is_file():
        return {}
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow_runs.store_uri())
    experiment = client.get_experiment_by_name(mlflow_runs.EXPERIMENT)
    found = {}
    for name in names if experiment else ():
        asked = f"tags.dvc_exp_name = '{name}' and tags.dvc_exp_baseline_rev = '{baseline}'"
        runs = client.search_runs([experiment.experiment_id], asked)
        stages = [r for r in runs if "stage" in r.data.tags and r.info.end_time]
        if not stages:
            continue
        took = [(r.data.tags["stage"], (r.info.end_time - r.info.start_time) / 1000) for r in stages]
        devices = {r.data.tags["device"] for r in stages if "device" in r.data.tags}
        memory = [r.data.metrics["peak_memory"] for r in stages if "peak_memory" in r.data.metrics]
        gpu = [r.data.metrics["peak_gpu_memory"] for r in stages if "peak_gpu_memory" in r.data.metrics]
        found[name] = Cost(
            stages=len(stages),
            seconds=sum(seconds for _, seconds in took),
            training=sum(seconds for stage, seconds in took if stage == "pretrain"),
            device=", ".join(sorted(devices - {"cpu"})) or ("cpu" if devices else None),
            memory=max(memory, default=None),
            gpu_memory=max(gpu, default=None),
        )
    return found
