"""MLflow records: one experiment, a parent run per ``dvc repro``, a child per stage run.

Ours, because a stage that calls MLflow itself takes 4 to 10 s for it, one that writes a record a tenth of a second.

Importing MLflow and opening its store takes most of that, more than most stages of a small profile need. So a stage
only writes its record (a small JSON and copies of its artifacts) under ``state/tracking/``; records are sent by stages
that run for more than five minutes (as they run, so curves appear live), and all that wait by the last stage,
``tables``. A record that could not be sent stays and goes with the next send: ``python -m pipeline.tracking`` sends at
once. One that is damaged, or that MLflow refuses, holds up no other one: it is put into ``state/tracking/refused``.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.config.places import without_places
from pipeline.storage.atomic import replacing
from pipeline.tracking.launcher import dvc_above
from pipeline.tracking.work_folders import repository_root

EXPERIMENT = "cxr-clip"
SEND_AFTER = 300.0  # seconds a stage has run before it sends its own record
SEND_EVERY = 30.0  # seconds between two sends of a stage that runs: they hold it up
LONGEST_KEY = 250  # characters, of MLflow's
# MLflow's words for what is wrong with a record, not with the store or the way to it.
OF_THE_RECORD = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST")


def store_uri() -> str:
    """MLFLOW_TRACKING_URI where it is set, else a sqlite file at the repository root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{repository_root() / 'mlflow.db'}"


def flatten(record: Any, prefix: str = "") -> dict[str, str]:
    """Nested dataclasses and mappings as dotted keys, MLflow's form of parameters; places by their last part alone."""
    items = asdict(record) if is_dataclass(record) and not isinstance(record, type) else record
    flat: dict[str, str] = {}
    for key, value in items.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[_key(name)] = _text(str(without_places(value)))
    return flat


def _key(name: str) -> str:
    """A name as MLflow takes it for a parameter or a metric: one that it takes is left as it is, another one gets a
    checksum, so that no two become one."""
    plain = re.sub(r"[^\w./: -]", "_", name)
    plain = "/".join(part for part in plain.split("/") if part not in ("", ".", ".."))
    known = plain == name and 0 < len(name) <= LONGEST_KEY
    return name if known else f"{plain[: LONGEST_KEY - 9]}_{zlib.crc32(name.encode('utf-8', 'replace')):08x}"


def _text(value: str) -> str:
    """A value as any database takes it: without NUL and what is no Unicode (bytes of the environment)."""
    return value.encode("utf-8", "replace").decode("utf-8").replace("\0", "?")


class StageRun:
    """What a stage says of itself while it runs: metrics, and files for the record."""

    def __init__(self, folder: Path | None, record: dict[str, Any]) -> None:
        self.folder = folder
        self.record = record
        self.sent = -SEND_EVERY  # when a send began last

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Note metric values at a step (epoch); those of a long stage are soon in MLflow, where curves grow."""
        now = int(time.time() * 1000)
        self.record["metrics"] += [[_key(key), float(value), step, now] for key, value in values.items()]
        self.save()
        due = time.monotonic() - self.sent >= SEND_EVERY or self.record["ended"] is not None
        if self.folder and due and time.time() - self.record["started"] > SEND_AFTER:
            self.sent = time.monotonic()
            _send_or_say()

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file with the record. Never a shard, a report or an image of a patient."""
        if self.folder:
            (self.folder / "artifacts").mkdir(exist_ok=True)
            shutil.copy(path, self.folder / "artifacts" / path.name)

    def artifacts(self, paths: Iterable[Path]) -> None:
        """``artifact`` of each."""
        for path in paths:
            self.artifact(path)

    def save(self) -> None:
        """Write the record whole or not at all, keeping what a sender noted in it."""
        if not self.folder:
            return
        with _lock():
            file = self.folder / "record.json"
            if file.exists():
                with suppress(ValueError):  # damaged on the disk: written anew
                    old = json.loads(file.read_text())
                    self.record.update({key: old[key] for key in ("run_id", "sent") if key in old})
            _write(file, self.record)


@contextmanager
def stage_run(
    stage: str, name: str, params: Any = None, enabled: bool = True, send: bool = False
) -> Iterator[StageRun]:
    """Record one run of a stage.

    Args:
        stage: the DVC stage; ``name`` its matrix item, or "all".
        params: what the stage depends on, a dataclass or mapping; no patient data.
        enabled: params.tracking.enabled; False records nothing.
        send: whether to send all waiting records when the stage ends.
    """
    folder = repository_root() / "state" / "tracking" / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}" if enabled else None
    record: dict[str, Any] = {
        "stage": stage,
        "name": name,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.time(),
        "ended": None,
        "status": "RUNNING",
        "params": flatten(params) if params is not None else {},
        "metrics": [],
        "tags": {key: _text(value) for key, value in _tags().items()},
        "sent": 0,
    }
    if folder:
        folder.mkdir(parents=True)
    run = StageRun(folder, record)
    run.save()
    try:
        yield run
        record["status"] = "FINISHED"
    except BaseException as error:
        record["status"] = "FAILED"
        record["tags"]["error"] = type(error).__name__  # never the message: it may quote a file
        raise
    finally:
        record["ended"] = time.time()
        record["tags"]["device"] = _device()
        run.metrics({"seconds": record["ended"] - record["started"], **_peaks()})
        if folder and send:
            _send_or_say()


def _send_or_say() -> None:
    """Send what waits; a store that cannot be reached costs a line, not the stage's work."""
    try:
        send_waiting()
    except Exception as error:
        print(
            f"tracking: records not sent ({type(error).__name__}); they stay in state/tracking and go with the next "
            "send, or with: python -m pipeline.tracking"
        )


def send_waiting() -> int:
    """Send every waiting record to MLflow, oldest first; the number of records sent. One process sends at a time.

    A record that is damaged or that MLflow refuses is set aside. One that fails otherwise stays, and the others go.

    Raises:
        Exception: the store cannot be reached, or a record could not be sent; the first such error.
    """
    waiting = repository_root() / "state" / "tracking"
    if not waiting.is_dir() or not any(waiting.glob("*/record.json")):
        return 0
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow.tracking import MlflowClient  # seconds: only where records are sent

    with _lock():
        client = MlflowClient(store_uri())
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            artifacts = None if "MLFLOW_TRACKING_URI" in os.environ else (repository_root() / "mlartifacts").as_uri()
            experiment_id = client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        elif experiment.lifecycle_stage == "deleted":  # else every record would be refused
            raise RuntimeError(f"MLflow's experiment {EXPERIMENT} is deleted; restore it (mlflow experiments restore)")
        else:
            experiment_id = experiment.experiment_id
        sent, failed = 0, None
        parents: dict[str, str] = {}
        ended: dict[str, list[tuple[float, str]]] = {}
        for file in sorted(waiting.glob("*/record.json")):
            try:
                record = _send(client, experiment_id, file, parents)
            except Exception as error:
                if _is_of_the_record(error):
                    _set_aside(client, file, error)
                    continue
                failed = failed or error
                try:
                    client.get_experiment(experiment_id)
                except Exception:  # the store itself, for which MLflow waits minutes each time
                    raise error from None
                continue
            sent += 1
            if record["ended"] is not None:
                ended.setdefault(parents[record["tags"]["repro"]], []).append((record["ended"], record["status"]))
        for parent, ends in ended.items():
            status = "FINISHED" if all(s == "FINISHED" for _, s in ends) else "FAILED"
            client.set_terminated(parent, status=status, end_time=int(max(ends)[0] * 1000))
        if failed:
            raise failed
    return sent


def _is_of_the_record(error: Exception) -> bool:
    """Whether a record itself is the reason why it was not sent."""
    if hasattr(error, "error_code"):  # of MLflow
        return error.error_code in OF_THE_RECORD
    return not isinstance(error, OSError) or isinstance(error, FileNotFoundError | IsADirectoryError)


def _set_aside(client: Any, file: Path, error: Exception) -> None:
    """Put a record where no send looks for it, and say so; that of a stage that runs stays, which writes on in it."""
    why, running, run = getattr(error, "error_code", type(error).__name__), False, ""
    with suppress(Exception):  # as damaged as it may be
        record = json.loads(file.read_text())
        run = record.get("run_id", "")
        running = record["status"] == "RUNNING" and psutil.pid_exists(record["pid"])
    if running:
        print(f"tracking: {file.parent}: refused by MLflow ({why})")
        return
    aside = file.parents[1] / "refused" / file.parent.name
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    file.parent.rename(aside)
    print(f"tracking: {file.parent}: damaged or refused by MLflow ({why}); it is now in {aside.parent}")
    if run:  # what was taken of it
        with suppress(Exception):
            client.set_terminated(run, status="FAILED")


def _send(client: Any, experiment_id: str, file: Path, parents: dict[str, str]) -> dict[str, Any]:
    """Bring one record's MLflow run up to date; a finished record is removed afterwards. Returns the record.

    ``parents`` remembers the parent run of each repro, to ask the store for it once.
    """
    from mlflow.entities import Metric, Param

    record = json.loads(file.read_text())
    here = record.get("host", socket.gethostname()) == socket.gethostname()  # a process id says nothing elsewhere
    if record["status"] == "RUNNING" and here and not psutil.pid_exists(record["pid"]):
        record.update(
            status="KILLED", ended=record["metrics"][-1][3] / 1000 if record["metrics"] else record["started"]
        )
    repro = record["tags"]["repro"]
    parent = parents.get(repro) or parents.setdefault(repro, _parent(client, experiment_id, record))
    if "run_id" not in record:
        label = record["stage"] if record["name"] == "all" else f"{record['stage']}@{record['name']}"
        tags = {**record["tags"], "mlflow.parentRunId": parent, "mlflow.runName": label, "stage": record["stage"]}
        run = client.create_run(experiment_id, start_time=int(record["started"] * 1000), tags=tags)
        record["run_id"] = run.info.run_id
        _write(file, record)  # at once: should a later step fail, the next send goes on with this run
    if not record["sent"]:
        params = [Param(k, v[:6000]) for k, v in record["params"].items()]
        for start in range(0, len(params), 100):
            client.log_batch(record["run_id"], params=params[start : start + 100])
        if record["stage"] == "tables":  # the parent carries what experiments are compared by
            for start in range(0, len(params), 100):
                with suppress(Exception):  # a second `tables` of one repro may not change a parameter
                    client.log_batch(parent, params=params[start : start + 100])
    metrics = [Metric(key, value, at, step) for key, value, step, at in record["metrics"][record["sent"] :]]
    for target in (record["run_id"], parent) if record["stage"] == "tables" else (record["run_id"],):
        for start in range(0, len(metrics), 1000):
            client.log_batch(target, metrics=metrics[start : start + 1000])
    record["sent"] = len(record["metrics"])
    _write(file, record)
    if record["status"] == "RUNNING":
        return record
    for artifact in sorted(file.parent.glob("artifacts/*")):
        client.log_artifact(record["run_id"], str(artifact))
    if "device" in record["tags"]:  # known at the end alone
        client.set_tag(record["run_id"], "device", record["tags"]["device"])
    end = int(record["ended"] * 1000)
    client.set_terminated(record["run_id"], status=record["status"], end_time=end)
    shutil.rmtree(file.parent)
    return record


def _parent(client: Any, experiment_id: str, record: dict[str, Any]) -> str:
    """The MLflow run of the repro the record belongs to, made on first use."""
    repro = record["tags"]["repro"]
    found = client.search_runs([experiment_id], f"tags.kind = 'repro' and tags.repro = '{repro}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    name = record["tags"].get("dvc_exp_name") or f"repro {record['tags']['git_revision'][:8]}"
    tags = {**record["tags"], "kind": "repro", "mlflow.runName": name}
    tags.pop("dvc_stage", None)
    run = client.create_run(experiment_id, start_time=int(record["started"] * 1000), tags=tags)
    return str(run.info.run_id)


def _tags() -> dict[str, str]:
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    tags = {"git_revision": revision or "unknown", "repro": _repro()}
    for tag in ("dvc_stage", "dvc_exp_name", "dvc_exp_baseline_rev"):
        if os.environ.get(variable := tag.upper()):
            tags[tag] = os.environ[variable]
    return tags


def _repro() -> str:
    """What all stages of one ``dvc repro`` share: the dvc process next above them. A stage run by hand is its own.

    Where several dvc processes share the work, whoever starts them says so by the variable CXR_REPRO.
    """
    if "CXR_REPRO" in os.environ:
        return re.sub(r"[^A-Za-z0-9_.-]", "_", os.environ["CXR_REPRO"])  # it is a word of a query
    own = dvc_above() or psutil.Process()
    return f"{own.pid}-{int(own.create_time())}"


def _device() -> str:
    """What the stage computed on: the GPU's name, else cpu. torch is not loaded for it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return "cpu"


def _peaks() -> dict[str, float]:
    """Most memory a stage held, in bytes: of its largest process, and on its GPU where it used one."""
    unit = 1 if sys.platform == "darwin" else 1024
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    with suppress(OSError):  # Linux counts what started us as our own, but not here
        lines = Path("/proc/self/status").read_text().splitlines()
        own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), own)
    peaks = {"peak_memory": float(max(own, children) * unit)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        peaks["peak_gpu_memory"] = float(torch.cuda.max_memory_allocated())
    return peaks


@contextmanager
def _lock() -> Iterator[None]:
    """One process at a time reads or writes records and the sqlite store."""
    waiting = repository_root() / "state" / "tracking"
    waiting.mkdir(parents=True, exist_ok=True)
    with (waiting / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write(file: Path, record: dict[str, Any]) -> None:
    with replacing(file) as partial:
        partial.write_text(json.dumps(record))
