"""Experiments of ``dvc exp run`` beside their baseline: what each changed, what became of the metrics, what it cost.

What an experiment produced is read from its own commit: git holds params.yaml and dvc.lock, and DVC's file system finds
in its cache what dvc.lock names. Nothing is checked out. The form of results: docs/results.md.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline.datasets import display_names, source_of, used_for
from pipeline.evaluation.comparison import over_trainings, paired
from pipeline.evaluation.metrics import percentiles
from pipeline.tracking.work_folders import repository_root

KINDS = ("zero_shot", "few_shot", "retrieval")
HEADLINES = {  # of each kind; a metric under another protocol has a "/" in its name and is none
    "zero_shot": re.compile(r"(\w+)\.(auc|accuracy)"),
    "few_shot": re.compile(r"(\w+)\.(p10|p100|ft10|ft100)"),
    "retrieval": re.compile(r"(\w+)\.(rsum|r10)"),
}
MACRO = "macro.auc"  # mean over VinDr-CXR, RSNA and SIIM
LABELS = {
    **{"auc": "AUC", "accuracy": "accuracy", "rsum": "RSUM", "r10": "R@10"},
    **{"p10": "linear 10 %", "p100": "linear 100 %", "ft10": "tuned 10 %", "ft100": "tuned 100 %"},
}


@dataclass(frozen=True)
class Metric:
    """A metric as fractions, with its values over the resamples, float64 [B], where they are stored, and by training,
    where there are several."""

    value: float
    low: float
    high: float
    n: int | None
    samples: np.ndarray | None = None
    trained: tuple[float, ...] = ()


@dataclass(frozen=True)
class Difference:
    """A metric less the baseline's; the interval is None where the two cannot be paired, and ``why`` says so."""

    value: float
    low: float | None = None
    high: float | None = None
    why: str = ""

    @property
    def sign(self) -> int:
        """1 better, -1 worse, 0 where the interval holds zero or there is none."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


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
    metrics: dict[str, dict[str, Metric]]  # run -> headline metric
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
    absent: list[str] = []
    confidence = float(found.params.get("evaluate.bootstrap.confidence", 0.95))
    for run in [*raw.get("runs", {}), *raw.get("others", {})]:
        places = [f"{run}/{seed}" for seed in raw.get("seeds", [0])] if run in raw.get("runs", {}) else [run]
        probed = run in raw.get("main", ()) or run in raw.get("others", {})
        trainings = [_metrics(files, place, probed, absent, confidence) for place in places]
        if metrics := _over_trainings(trainings, confidence):
            found.metrics[run] = metrics
        if (text := _bytes(files, f"data/results/pretrain/{places[0]}.csv")) is not None:
            rows = csv.DictReader(io.StringIO(text.decode()))
            found.history[run] = [(int(row["epoch"]) + 1, float(row["valid_loss"])) for row in rows]
    for dataset in raw["sources"]:
        if (text := _bytes(files, f"data/index/{dataset}.parquet")) is not None:
            found.tests[dataset] = _test_set(text)
    if absent:
        found.notes.append(
            f"{len(absent)} result files are neither in the cache nor on a remote; run: dvc fetch, or repeat it"
        )
    return found


def _metrics(files: Any, place: str, probed: bool, absent: list[str], confidence: float) -> dict[str, Metric]:
    """The headline metrics of one training (``<run>/<seed>``) or another model; ``absent`` grows by missing files."""
    metrics: dict[str, Metric] = {}
    for kind in KINDS:
        path = f"data/results/{kind}/{place}.json"
        text = _bytes(files, path)
        if text is None:
            if kind != "few_shot" or probed:
                absent.append(path)
            continue
        stored = _bytes(files, path.removesuffix("json") + "npz")
        metrics.update(_headlines(path, kind, text, stored))
    macro = _macro(metrics, confidence)
    return {MACRO: macro, **metrics} if macro else metrics


def _over_trainings(trainings: Sequence[dict[str, Metric]], confidence: float) -> dict[str, Metric]:
    """Means over trainings, as the tables have them; a metric that one of them lacks is left out."""
    if len(trainings) == 1:
        return trainings[0]
    merged = {}
    for key, first in trainings[0].items():
        known = [t[key] for t in trainings if key in t]
        if len(known) == len(trainings):
            values = tuple(m.value for m in known)
            kept = [m.samples for m in known if m.samples is not None]
            samples = np.mean(kept, axis=0) if len(kept) == len(known) and len({len(s) for s in kept}) == 1 else None
            mean, low, high = over_trainings(values, samples, confidence)
            high = high if key.endswith("rsum") else min(high, 1.0)  # a share ends there
            merged[key] = Metric(mean, max(low, 0.0), high, first.n, samples, values)
    return merged


def _bytes(files: Any, path: str) -> bytes | None:
    """A file, or None where the commit or the cache has it not."""
    try:
        return bytes(files.read_bytes(path))
    except (FileNotFoundError, IsADirectoryError):
        return None


def _headlines(path: str, kind: str, text: bytes, stored: bytes | None) -> dict[str, Metric]:
    try:
        listed = json.loads(text)["metrics"]
        samples: Mapping[str, np.ndarray] = {}
        if stored is not None:
            with np.load(io.BytesIO(stored), allow_pickle=False) as archive:
                samples = {key: archive[key] for key in archive.files}
        sums = "total.rsum" in listed  # single recalls only where there is no sum of them
        return {
            key: Metric(m["value"], m["low"], m["high"], m.get("n"), samples.get(key))
            for key, m in listed.items()
            if HEADLINES[kind].fullmatch(key) and not (sums and key.endswith(".r10"))
        }
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not in the form of docs/results.md; run the experiment again") from None


def _macro(metrics: Mapping[str, Metric], confidence: float) -> Metric | None:
    """The mean zero-shot AUC; its interval only where each part has its samples (sets are resampled on their own)."""
    parts = [metrics.get(f"{dataset}.auc") for dataset in used_for("binary_classification")]
    known = [part for part in parts if part is not None]
    samples = [part.samples for part in known if part.samples is not None]
    if len(known) < len(parts) or len(samples) < len(parts) or len({len(s) for s in samples}) > 1:
        return None
    mean = np.mean(samples, axis=0)
    value = float(np.mean([part.value for part in known]))
    return Metric(value, *percentiles(mean, confidence), None, mean)


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


def difference(baseline: Experiment, other: Experiment, run: str, key: str) -> Difference | None:
    """A metric of a run less the baseline's, with the interval of the paired bootstrap: both were taken over the same
    resamples of patients, so that what the two have in common cancels. None where either has no such metric."""
    old, new = (e.metrics.get(run, {}).get(key) for e in (baseline, other))
    if old is None or new is None:
        return None
    value = new.value - old.value
    if why := _unpaired(baseline, other, key, old, new):
        return Difference(value, why=why)
    assert old.samples is not None and new.samples is not None
    values = [{"value": m.value, "n": m.n, "trained": m.trained} for m in (new, old)]
    confidence = float(baseline.params.get("evaluate.bootstrap.confidence", 0.95))
    found = paired(values[0], new.samples, values[1], old.samples, confidence)
    return Difference(value, found["low"], found["high"])


def _unpaired(baseline: Experiment, other: Experiment, key: str, old: Metric, new: Metric) -> str:
    """Why the resamples of the two do not pair up, or nothing."""
    for e, metric in ((baseline, old), (other, new)):
        if metric.samples is None:
            return f"no resamples stored for {e.name}"
    assert old.samples is not None and new.samples is not None
    if len(old.trained) != len(new.trained) or baseline.params.get("seeds") != other.params.get("seeds"):
        return "trained with other seeds"
    if baseline.params.get("seed") != other.params.get("seed") or len(old.samples) != len(new.samples):
        return "other resamples: seed or evaluate.bootstrap differs"
    name = key.partition(".")[0]
    sets = {
        "macro": list(used_for("binary_classification")),
        "total": sorted(baseline.tests.keys() | other.tests.keys()),
    }
    for dataset in sets.get(name, [source_of(name)]):
        if baseline.tests.get(dataset) != other.tests.get(dataset):
            return f"other test studies of {dataset}"
    return ""


def headlines(experiments: Sequence[Experiment], run: str) -> list[str]:
    """The headline metrics any of them has for a run, in the order first met."""
    return list(dict.fromkeys(key for e in experiments for key in e.metrics.get(run, {})))


def headline_label(key: str) -> str:
    """A metric's name for people, ``rsna.auc`` -> ``RSNA AUC``."""
    dataset, _, metric = key.partition(".")
    if dataset == "total":
        return LABELS[metric]
    name = "Mean" if dataset == "macro" else display_names().get(dataset, dataset)
    return f"{name} {LABELS[metric]}"


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
