import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.config.archive_params import Source
from pipeline.config.params import Loss
from pipeline.reporting import experiments
from pipeline.tracking import mlflow_runs

ROOT = Path(__file__).parents[1]
STORE = "sqlite:///{}/store.db"


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    """Making the tables of a store takes seconds: done once, copied for each test."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("store")
    MlflowClient(STORE.format(folder)).search_experiments()
    return (folder / "store.db").read_bytes()


@pytest.fixture
def client(tmp_path, monkeypatch, empty_store):
    from mlflow.tracking import MlflowClient

    (tmp_path / "store.db").write_bytes(empty_store)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", STORE.format(tmp_path))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("DVC_EXP_NAME", "tcl-off")
    monkeypatch.chdir(tmp_path)  # artifacts of a store given by URI go below the working directory
    return MlflowClient(STORE.format(tmp_path))


def test_a_store_that_cannot_be_written_is_one_line(tmp_path):
    """``python -m pipeline.tracking``, with a record that waits."""
    env = {**os.environ, "DVC_ROOT": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": str(ROOT)}
    env.pop("MLFLOW_TRACKING_URI", None)
    waiting = tmp_path / "state" / "tracking" / "1"
    waiting.mkdir(parents=True)
    (waiting / "record.json").write_text("{}")
    (tmp_path / "mlflow.db").write_bytes(b"no data base " * 999)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.tracking"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("tracking: sqlite:///") and "the records wait" in done.stderr


@pytest.fixture
def records(tmp_path, monkeypatch):
    """Reads what waits; the store is never touched."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def read():
        return [json.loads(p.read_text()) for p in sorted((tmp_path / "state" / "tracking").glob("*/record.json"))]

    return read


def runs(client):
    """(parents, children), oldest first."""
    experiment = client.get_experiment_by_name("cxr-clip")
    found = sorted(client.search_runs([experiment.experiment_id]), key=lambda r: r.info.start_time)
    parents = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    return parents, [r for r in found if "mlflow.parentRunId" in r.data.tags]


def history(client, run, key):
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)]


def test_nested_records_become_dotted_keys():
    flat = mlflow_runs.flatten({"loss": {"mvs": True, "deep": {"er": 1e-4}}, "k": (1, 5), "name": ""})
    assert flat == {"loss.mvs": "True", "loss.deep.er": "0.0001", "k": "(1, 5)", "name": ""}
    places = {"path": "s3://jane:secret@host/a/b.csv", "protocols": ("/home/jane/own.yaml", "paper"), "k": "~/x"}
    assert mlflow_runs.flatten(places) == {"path": "s3://…/b.csv", "protocols": "('own.yaml', 'paper')", "k": "x"}
    record = mlflow_runs.flatten(Params(Source("r", "a", "b"), Loss()))
    assert record["source.path"] == "a" and record["loss.tcl_weight"] == "0.5"


@dataclass(frozen=True)
class Params:
    source: Source
    loss: Loss


def test_stage_runs_become_children_of_one_repro(client, tmp_path, monkeypatch):
    (tmp_path / "history.csv").write_text("epoch\n0\n")
    monkeypatch.setenv("DVC_STAGE", "pretrain@resnet_m")
    with mlflow_runs.stage_run("pretrain", "resnet_m", Loss(tcl_weight=0.25)) as record:
        for epoch in range(3):
            record.metrics({"train_loss": 3.0 - epoch, "valid_loss": 4.0 - epoch}, epoch)
        record.artifact(tmp_path / "history.csv")
    (tmp_path / "history.csv").unlink()  # the record holds a copy
    monkeypatch.setenv("DVC_STAGE", "tables")
    with mlflow_runs.stage_run("tables", "all", {"loss": {"tcl_weight": 0.25}}) as record:
        record.metrics({"table2.auc": 0.9})
    assert mlflow_runs.send_waiting() == 2
    assert mlflow_runs.send_waiting() == 0 and not list((tmp_path / "state" / "tracking").glob("*/record.json"))

    (parent,), (pretrain, tables) = runs(client)
    assert {r.data.tags["mlflow.parentRunId"] for r in (pretrain, tables)} == {parent.info.run_id}
    assert [r.data.tags["mlflow.runName"] for r in (parent, pretrain, tables)] == [
        *("tcl-off", "pretrain@resnet_m", "tables")
    ]
    assert pretrain.data.tags["dvc_stage"] == "pretrain@resnet_m" and tables.data.tags["stage"] == "tables"
    assert pretrain.data.tags["dvc_exp_name"] == "tcl-off" and "git_revision" in pretrain.data.tags
    assert {r.info.status for r in (parent, pretrain, tables)} == {"FINISHED"}
    assert pretrain.data.params["tcl_weight"] == "0.25" and pretrain.data.params["mvs"] == "True"
    assert history(client, pretrain, "train_loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert history(client, pretrain, "valid_loss") == [(0, 4.0), (1, 3.0), (2, 2.0)]
    assert 0 <= pretrain.data.metrics["seconds"] < 60
    assert pretrain.info.start_time <= pretrain.info.end_time
    # what experiments are compared by is on the parent
    assert parent.data.params == {"loss.tcl_weight": "0.25"} and parent.data.metrics["table2.auc"] == 0.9
    artifacts = client.list_artifacts(pretrain.info.run_id)
    assert [a.path for a in artifacts] == ["history.csv"]
    assert Path(client.download_artifacts(pretrain.info.run_id, "history.csv")).read_text() == "epoch\n0\n"


def test_a_failure_keeps_the_type_of_its_error_alone(client, tmp_path):
    with pytest.raises(KeyError), mlflow_runs.stage_run("ingest", "siim", send=True):
        raise KeyError("Doe^Jane")
    (parent,), (run,) = runs(client)
    assert (run.info.status, parent.info.status) == ("FAILED", "FAILED")
    assert run.data.tags["error"] == "KeyError"
    stored = (tmp_path / "store.db").read_bytes() + b"".join(p.read_bytes() for p in tmp_path.rglob("*.json"))
    assert b"Doe" not in stored and b"KeyError" in stored


def test_a_killed_stage_is_known_by_its_process(client, tmp_path):
    script = (
        "import os; from pipeline.tracking.mlflow_runs import stage_run\n"
        "with stage_run('pretrain', 'swin_m') as r: r.metrics({'train_loss': 2.5}, 4); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == -9
    assert mlflow_runs.send_waiting() == 1
    _, (run,) = runs(client)
    assert run.info.status == "KILLED" and history(client, run, "train_loss") == [(4, 2.5)]
    assert not list((tmp_path / "state" / "tracking").glob("*/record.json"))


def test_a_process_of_another_host_is_not_taken_for_dead(client, tmp_path, monkeypatch):
    """On a shared file system the process id of a training on another node says nothing here."""
    monkeypatch.setattr(mlflow_runs.socket, "gethostname", lambda: "node7")
    with mlflow_runs.stage_run("pretrain", "swin_m") as record:
        record.record["pid"] = 2**22 + 1  # no process here has it
        record.metrics({"train_loss": 2.0})
        monkeypatch.setattr(mlflow_runs.socket, "gethostname", lambda: "node8")
        mlflow_runs.send_waiting()
        _, (run,) = runs(client)
        assert run.info.status == "RUNNING"


def test_a_long_stage_is_sent_as_it_runs(client, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_runs, "SEND_AFTER", 0.0)
    monkeypatch.setattr(mlflow_runs, "SEND_EVERY", 0.0)
    with mlflow_runs.stage_run("pretrain", "swin_m", Loss()) as record:
        record.metrics({"train_loss": 2.0}, 0)
        _, (run,) = runs(client)
        assert run.info.status == "RUNNING" and history(client, run, "train_loss") == [(0, 2.0)]
        record.metrics({"train_loss": 1.0}, 1)
        assert history(client, run, "train_loss") == [(0, 2.0), (1, 1.0)]
    _, (run,) = runs(client)
    assert run.info.status == "FINISHED"
    assert history(client, run, "train_loss") == [(0, 2.0), (1, 1.0)]
    assert not list((tmp_path / "state" / "tracking").glob("*/record.json"))


TRAINING = """
import sys
from pathlib import Path
from pipeline.tracking import mlflow_runs
from pipeline.training import loop

mlflow_runs.SEND_AFTER, mlflow_runs.SEND_EVERY, loop.CURVE = 0.0, 0.2, 1
corpus, out = map(Path, sys.argv[1:])
with mlflow_runs.stage_run("pretrain", "tiny") as record:
    loop.train_run(corpus, out / "model", out / "history.csv", out / "work", record.metrics)
"""


def test_curves_grow_while_a_training_runs(client, tmp_path, config, corpus):
    """Read from the store by another process than the one that trains, which would go on for a thousand epochs."""
    folder = corpus(config(train={"epochs": 1000}))
    command = (sys.executable, "-c", TRAINING, str(folder), str(tmp_path / "out"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    lengths, epochs = [0], []
    said = tmp_path / "said"
    with said.open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as training:
        try:
            while len(lengths) < 4 or not epochs:
                assert training.poll() is None, said.read_text()[-3000:]
                time.sleep(0.2)
                if client.get_experiment_by_name("cxr-clip") and (found := runs(client)[1]):
                    (run,) = found
                    assert run.info.status == "RUNNING"
                    epochs = history(client, run, "valid_loss")
                    curve = history(client, run, "step_loss")
                    assert [step for step, _ in curve] == list(range(1, len(curve) + 1))
                    lengths += [len(curve)] * (len(curve) > lengths[-1])
        finally:
            training.kill()


def test_a_curve_is_sent_now_and_then_and_at_the_end(client, monkeypatch):
    monkeypatch.setattr(mlflow_runs, "SEND_AFTER", 0.0)
    now, sends = [100.0], []
    monkeypatch.setattr(mlflow_runs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(mlflow_runs, "_send_or_say", lambda: sends.append(now[0]))
    with mlflow_runs.stage_run("pretrain", "swin_m", Loss()) as record:
        for _ in range(100):
            record.metrics({"step_loss": 2.0}, 50)
            now[0] += 1.0
    assert sends == [100.0, 130.0, 160.0, 190.0, 200.0]


@pytest.mark.parametrize("step", ["create_run", "log_batch", "log_artifact", "set_terminated"])
def test_what_could_not_be_sent_stays_and_is_sent_once(client, tmp_path, monkeypatch, capsys, step):
    from mlflow.tracking import MlflowClient

    def broken(*_, **__):
        raise ConnectionError("secret")

    (tmp_path / "a.csv").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, broken)
        with mlflow_runs.stage_run("few_shot", "resnet_m", Loss(), send=True) as record:
            record.metrics({"auc": 0.75})
            record.artifact(tmp_path / "a.csv")
        with pytest.raises(ConnectionError):
            mlflow_runs.send_waiting()
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "ConnectionError" in said and "secret" not in said
    assert len(list((tmp_path / "state" / "tracking").glob("*/record.json"))) == 1
    assert mlflow_runs.send_waiting() == 1
    (_,), (run,) = runs(client)  # one parent, one child
    assert run.info.status == "FINISHED" and run.data.params["tcl_weight"] == "0.5"
    assert history(client, run, "auc") == [(0, 0.75)]
    assert [a.path for a in client.list_artifacts(run.info.run_id)] == ["a.csv"]


def test_a_record_that_cannot_be_sent_holds_up_no_other_one(client, tmp_path, capsys):
    """Damaged in many ways, or with a key that MLflow takes for no parameter's: each is set aside with one line."""
    waiting = tmp_path / "state" / "tracking"
    damages = {
        "empty": lambda text: "",
        "half": lambda text: text[: len(text) // 2],
        "bytes": lambda text: "\udcff\udcfe",
        "a list": lambda text: "[1, 2]",
        "a number": lambda text: "7",
        "no tags": lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "tags"}),
        "metrics of another shape": lambda text: json.dumps({**json.loads(text), "metrics": [["auc"]]}),
        "a process of no number": lambda text: json.dumps({**json.loads(text), "status": "RUNNING", "pid": "x"}),
        "a parameter's key": lambda text: json.dumps({**json.loads(text), "params": {"a; b": "1"}}),
        "a metric's key": lambda text: json.dumps({**json.loads(text), "metrics": [["../x", 1.0, 0, 1]]}),
        "a run that is gone": lambda text: json.dumps({**json.loads(text), "run_id": "0" * 32}),
    }
    names = ["first", *damages, "last"]
    for name in names:
        with mlflow_runs.stage_run("few_shot", name, Loss()) as record:
            record.metrics({"auc": 0.75})
        if name in damages:
            file = max(waiting.glob("*/record.json"))
            file.write_text(damages[name](file.read_text()), errors="surrogateescape")
    folders = sorted(path.parent.name for path in waiting.glob("*/record.json"))
    assert mlflow_runs.send_waiting() == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(damages)
    assert all(str(waiting / folder) in line for folder, line in zip(folders[1:-1], lines, strict=True))
    assert sorted(path.name for path in (waiting / "refused").iterdir()) == folders[1:-1]
    _, found = runs(client)
    sent = {r.data.tags["mlflow.runName"]: r for r in found}
    assert {"few_shot@first", "few_shot@last"} <= sent.keys()
    assert sent["few_shot@last"].info.status == "FINISHED" and history(client, sent["few_shot@last"], "auc") == [
        (0, 0.75)
    ]
    assert "RUNNING" not in {r.info.status for r in found}
    assert mlflow_runs.send_waiting() == 0 and not capsys.readouterr().out


def test_a_record_that_fails_stays_and_the_others_go(client, tmp_path, monkeypatch):
    """No word of MLflow against the record itself: a disk that is full, say, while its artifact is copied."""
    from mlflow.tracking import MlflowClient

    (tmp_path / "a.csv").write_text("1")
    for name in ("first", "last"):
        with mlflow_runs.stage_run("few_shot", name, Loss()) as record:
            if name == "first":
                record.artifact(tmp_path / "a.csv")
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifact", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            mlflow_runs.send_waiting()
        _, found = runs(client)
        assert {r.data.tags["mlflow.runName"]: r.info.status for r in found} == {
            "few_shot@first": "RUNNING",
            "few_shot@last": "FINISHED",
        }
    assert mlflow_runs.send_waiting() == 1
    assert {r.info.status for r in runs(client)[1]} == {"FINISHED"}


def test_an_experiment_that_was_deleted_costs_no_record(client, tmp_path):
    client.delete_experiment(client.create_experiment("cxr-clip"))
    with mlflow_runs.stage_run("few_shot", "first", Loss()):
        pass
    with pytest.raises(RuntimeError, match="is deleted; restore it"):
        mlflow_runs.send_waiting()
    assert len(list((tmp_path / "state" / "tracking").glob("*/record.json"))) == 1


def test_every_key_and_value_is_one_that_mlflow_takes(client, monkeypatch):
    odd = {"a; b": 1, "../up": 2, "/root": 3, "a//b": 4, "": 5, "é": 6, "x" * 400: 7, "y\n": 8, "./": 9}
    fine = {"loss.mvs": 11, "rsna_auc/p1": 12, "a b-c:d": 13}
    monkeypatch.setenv("CXR_REPRO", "it's; this")
    monkeypatch.setenv("DVC_EXP_NAME", "a\udcffb")
    with mlflow_runs.stage_run("few_shot", "all", {**odd, **fine, "text": "a\0b\udcff"}) as record:
        record.metrics({**odd, **fine})
    assert mlflow_runs.send_waiting() == 1
    _, (run,) = runs(client)
    assert sorted(run.data.params.values()) == sorted([*map(str, {**odd, **fine}.values()), "a?b?"])
    assert {*odd.values(), *fine.values()} <= {*run.data.metrics.values()}
    assert all(run.data.params[key] == str(value) and run.data.metrics[key] == value for key, value in fine.items())
    assert {len(key) for key in run.data.params if "xxx" in key} == {250}


# without the store


def test_a_record_that_is_damaged_while_its_stage_runs_is_written_anew(records, tmp_path):
    with mlflow_runs.stage_run("zero_shot", "clip", Loss()) as record:
        (file,) = (tmp_path / "state" / "tracking").glob("*/record.json")
        file.write_text('{"run_id": ')
        record.metrics({"auc": 0.5})
        assert records()[0]["metrics"][0][:2] == ["auc", 0.5]


def test_a_stage_writes_its_record_without_mlflow(records):
    with mlflow_runs.stage_run("zero_shot", "clip", Loss()) as record:
        (running,) = records()
        assert (running["status"], running["pid"], running["ended"]) == ("RUNNING", os.getpid(), None)
        record.metrics({"auc": 0.5}, 2)
        assert [m[:3] for m in records()[0]["metrics"]] == [["auc", 0.5, 2]]
    (ended,) = records()
    assert ended["status"] == "FINISHED" and ended["started"] <= ended["ended"]
    assert [m[0] for m in ended["metrics"]] == ["auc", "seconds", "peak_memory"]


def test_nothing_is_recorded_where_tracking_is_off(records, tmp_path):
    with mlflow_runs.stage_run("zero_shot", "clip", Loss(), enabled=False, send=True) as record:
        record.metrics({"auc": 0.5})
        record.artifact(tmp_path / "nothing.csv")
    assert not (tmp_path / "state").exists()


def test_the_store_lies_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert mlflow_runs.store_uri() == f"sqlite:///{ROOT / 'mlflow.db'}"
    monkeypatch.setenv("DVC_ROOT", "/elsewhere")
    assert mlflow_runs.store_uri() == "sqlite:////elsewhere/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    assert mlflow_runs.store_uri() == "http://server:5000"


def test_stages_under_one_dvc_share_its_process(records, tmp_path):
    """Two stages that one ``dvc`` runs, each in its own shell, against a stage run by hand."""
    stage = "from pipeline.tracking.mlflow_runs import stage_run\nwith stage_run('ingest', 'siim'): pass\n"
    (tmp_path / "stage.py").write_text(stage)
    command = f"cd {tmp_path} && {sys.executable} stage.py; true"
    (tmp_path / "dvc").write_text(
        f"import subprocess\nfor _ in range(2): subprocess.run({command!r}, shell=True, check=True)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = subprocess.Popen([sys.executable, str(tmp_path / "dvc")], env=env)
    created = int(psutil.Process(started.pid).create_time())
    assert started.wait(timeout=60) == 0
    with mlflow_runs.stage_run("ingest", "siim"):
        pass
    first, second, by_hand = (record["tags"]["repro"] for record in records())
    assert first == second == f"{started.pid}-{created}"
    assert by_hand != first


def test_the_dvc_that_groups_records_is_the_one_a_stage_is_started_by(records, tmp_path, monkeypatch):
    """A dvc below a worker's dvc, then a shell: both mean the lower dvc. Without any: the parent, and a repro alone."""
    monkeypatch.delenv("CXR_REPRO", raising=False)
    (tmp_path / "stage.py").write_text(
        "import os\nfrom pipeline.tracking.launcher import launcher\n"
        "from pipeline.tracking.mlflow_runs import stage_run\n"
        "with stage_run('ingest', 'siim'): print(launcher().pid, os.getpid(), os.getppid())\n"
    )
    (tmp_path / "start.py").write_text(
        "import os, subprocess, sys\nprint(os.getpid(), flush=True)\n"
        f"inner = [{sys.executable!r}, *sys.argv[1:]]\n"
        f"stage = {f'{sys.executable} stage.py; true'!r}\n"
        "subprocess.run(inner if sys.argv[1:] else stage, shell=not sys.argv[1:], check=True)\n"
    )
    (tmp_path / "dvc").write_text((tmp_path / "start.py").read_text())
    found = []
    for above in (["dvc", "dvc"], ["start.py"]):
        command = [sys.executable, *above]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        said = subprocess.run(command, cwd=tmp_path, env=env, check=True, timeout=60, capture_output=True, text=True)
        found.append([int(word) for word in said.stdout.split()])
    (_, second, started_by, _, _), (_, by_parent, own, parent) = found
    under_dvc, by_hand = (record["tags"]["repro"].partition("-")[0] for record in records())
    assert started_by == second == int(under_dvc)
    assert by_parent == parent and int(by_hand) == own


def test_stages_of_several_dvc_processes_can_share_a_repro(records, monkeypatch):
    monkeypatch.setenv("CXR_REPRO", "make-7")
    with mlflow_runs.stage_run("ingest", "siim"):
        pass
    assert records()[0]["tags"]["repro"] == "make-7"


def test_experiments_of_one_queue_worker_are_repros_of_their_own(records, tmp_path, monkeypatch):
    """A worker of the queue is a dvc process that starts another for each experiment."""
    code = "from pipeline.tracking.mlflow_runs import stage_run as s\nwith s('ingest', 'siim'): pass"
    stage = f'{sys.executable} -c "{code}"'
    (tmp_path / "dvc").write_text(
        "import subprocess, sys\n"
        f"command = [{sys.executable!r}, __file__, 'exec'] if sys.argv[1] == 'worker' else {stage!r}\n"
        "for _ in range(2): subprocess.run(command, shell=isinstance(command, str), check=True)\n"
    )
    monkeypatch.setenv("DVC_EXP_NAME", "half")
    monkeypatch.setenv("DVC_EXP_BASELINE_REV", "0123abc")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(tmp_path / "dvc"), "worker"], env=env, check=True, timeout=60)
    found = records()
    first, second, third, fourth = (record["tags"]["repro"] for record in found)
    assert first == second != third == fourth
    assert {(r["tags"]["dvc_exp_name"], r["tags"]["dvc_exp_baseline_rev"]) for r in found} == {("half", "0123abc")}


def test_a_record_says_what_it_cost(records):
    """Memory is the most the process held: 100 MB show, though they are gone at the end."""
    script = (
        "from pipeline.tracking.mlflow_runs import stage_run\n"
        "with stage_run('embed', 'clip'): held = bytearray(b'x' * {}); del held\n"
    )
    for size in (1, 100_000_000):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-c", script.format(size)], env=env, check=True, timeout=60)
    small, large = ({m[0]: m[1] for m in record["metrics"]} for record in records())
    assert 90e6 < large["peak_memory"] - small["peak_memory"] < 300e6
    assert 5e6 < small["peak_memory"] < 1e9
    assert [record["tags"]["device"] for record in records()] == ["cpu", "cpu"]


def test_the_cost_is_that_of_every_attempt(client):
    """Two attempts of one experiment, a namesake on another commit, and a repro that was none."""
    place = client.create_experiment("cxr-clip")

    def add(name, base, stage, seconds, memory=None, device="cpu", status="FINISHED"):
        tags = {"dvc_exp_name": name, "dvc_exp_baseline_rev": base, "stage": stage, "device": device}
        run = client.create_run(place, start_time=1000, tags=tags).info.run_id
        if memory:
            client.log_metric(run, "peak_memory", memory)
        client.set_terminated(run, status=status, end_time=1000 + 1000 * seconds)

    add("half", "abc", "pretrain", 60, status="KILLED")
    add("half", "abc", "pretrain", 30, 5e9, "NVIDIA H100")
    add("half", "abc", "tables", 4, 1e9)
    add("half", "def", "pretrain", 1000, 9e9)
    add("other", "abc", "pretrain", 1000, 9e9)
    found = experiments.costs(["half", "none"], "abc")
    assert found == {"half": experiments.Cost(3, 94.0, 90.0, "NVIDIA H100", 5e9, None)}
