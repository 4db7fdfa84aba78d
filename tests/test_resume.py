"""Interruptions of every kind: a training that goes on ends as if nothing had happened, or says why it cannot."""

import csv
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.params import Train
from pipeline.config.records import ParamsError
from pipeline.config.run_config import write_run_config
from pipeline.models.cxr_clip import CxrClip
from pipeline.text.tokenizer import Tokenizer
from pipeline.tracking import launcher, mlflow_runs
from pipeline.training import identity, loop, resume, throughput
from pipeline.training.batches import epoch_draws
from pipeline.training.methods import cxr_clip as cxr_clip_method
from tests.conftest import BERT, RESNET, in_steps, make_config, make_corpus

ROOT = Path(__file__).parents[1]
WITH_DROPOUT = replace(BERT, args={**BERT.args, "hidden_dropout_prob": 0.1})
# Runs trainings in forked processes, so that the libraries are imported once. Each line of its input is one: a JSON
# list of the corpus, the folder of its outputs, seconds after which it is killed, whether they count from its very
# start or from when all is made ready, and after how many calls of a function from there it kills itself; null = never.
# It answers with the exit code, the number of calls and the seconds it trained.
FORKS = """
import json, multiprocessing, os, signal, sys, time
from pathlib import Path
import pandas, timm, tokenizers.implementations, torch, transformers
from pipeline.config import run_config
from pipeline.models import cxr_clip
from pipeline.training import loop

torch.set_num_threads(1)
cxr_clip.CxrClip(run_config.read_run_config(Path(sys.argv[1])), 100)  # what is imported when it is first needed
context = multiprocessing.get_context("fork")

def work(corpus, out, most, ready, calls):
    def count(frame, event, argument):
        calls.value += 1
        if calls.value == most:
            os.kill(os.getpid(), signal.SIGKILL)
    run = loop._run
    def counted(*args):
        ready.set()
        if most is not None:
            sys.setprofile(count)
        run(*args)
    loop._run = counted
    sys.stdout = (out / "said").open("a", buffering=1)
    best = loop.train_run(corpus, out / "model", out / "history.csv", out / "work", lambda values, step: None)
    (out / "best").write_text(repr(best))

for line in sys.stdin:
    corpus, out, seconds, early, most = json.loads(line)
    Path(out).mkdir(exist_ok=True)
    calls, ready = context.RawValue("q", 0), context.Event()
    process = context.Process(target=work, args=(Path(corpus), Path(out), most, ready, calls))
    process.start()
    if not early:
        ready.wait()
    begun = time.perf_counter()
    process.join(seconds)
    if process.is_alive():
        process.kill()
    process.join()
    print(json.dumps([process.exitcode, calls.value, time.perf_counter() - begun]), flush=True)
"""


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """A function that trains in a process of its own, and tells how it ended."""
    run = tmp_path_factory.mktemp("forks") / "run.json"
    write_run_config(run, make_config(image_encoder=RESNET))
    with subprocess.Popen(
        [sys.executable, "-c", FORKS, str(run)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def fork(corpus, out, seconds=None, early=False, most=None):
            process.stdin.write(json.dumps([str(corpus), str(out), seconds, early, most]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield fork
        process.kill()


def train(corpus, out, tell=lambda values, step: None, anyway=False):
    return loop.train_run(corpus, out / "model", out / "history.csv", out / "work", tell, resume_anyway=anyway)


def outputs(out):
    """All that a training leaves."""
    with (out / "history.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return rows, {p.name: p.read_bytes() for p in sorted((out / "model").iterdir())}


def interrupt(monkeypatch, step, action):
    """Have ``action`` run in the midst of a step, counted from 1 over the whole training."""
    in_steps(monkeypatch, {step}, before=lambda method: action())


def stop(corpus, out, monkeypatch, step=7, number=signal.SIGTERM):
    """Train until a signal comes in the midst of a step, and see that it stops."""
    with monkeypatch.context() as patch:
        interrupt(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(resume.Stopped) as stopped:
            train(corpus, out)
    return str(stopped.value)


# killed


def test_a_killed_training_ends_as_if_it_had_not_been(forks, corpus, tmp_path):
    """Killed three times after random numbers of calls, with the state saved after every step."""
    folder = corpus(make_config(image_encoder=RESNET, text_encoder=WITH_DROPOUT, train={"save_minutes": 0.0}))
    code, calls, _ = forks(folder, tmp_path / "whole", most=-1)
    assert code == 0
    rng = random.Random(0)
    for _ in range(3):
        assert forks(folder, tmp_path / "killed", most=int(rng.uniform(0.15, 0.35) * calls))[0] == -signal.SIGKILL
        assert not (tmp_path / "killed" / "model").exists()
    assert forks(folder, tmp_path / "killed")[0] == 0
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
    assert (tmp_path / "killed" / "best").read_text() == (tmp_path / "whole" / "best").read_text()
    assert "resumes in epoch" in (tmp_path / "killed" / "said").read_text()
    left = sorted(p.name.split("-")[0] for p in (tmp_path / "killed" / "work").iterdir())
    assert left == ["best", "lock", "state.pt"]  # what writes the outputs again


def test_a_killed_training_with_a_memory_ends_as_if_it_had_not_been(forks, corpus, tmp_path):
    """DeCLIP's: a queue that has wrapped around, and networks that only training has."""
    weights = {"nn_weight": 0.2, "simsiam_weight": 0.2, "mlm_weight": 0.2, "queue": 20}
    run = {"image_encoder": RESNET, "text_encoder": WITH_DROPOUT, "sampling": {"unit": "image"}, "loss": weights}
    folder = corpus(make_config(**run, augment={"text_method": "eda"}, train={"save_minutes": 0.0}))
    code, calls, _ = forks(folder, tmp_path / "whole", most=-1)
    assert code == 0
    for part in (0.55, 0.35):
        assert forks(folder, tmp_path / "killed", most=int(part * calls))[0] == -signal.SIGKILL
    state = torch.load(tmp_path / "killed" / "work" / "state.pt", weights_only=True)
    queue = {name: value for name, value in state["heads"].items() if name.startswith("queue.")}
    assert int(queue["queue._extra_state"]) > 20 and queue["queue.texts"].norm(dim=1).allclose(torch.ones(20))
    assert forks(folder, tmp_path / "killed")[0] == 0
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "whole")
    assert "resumes in epoch" in (tmp_path / "killed" / "said").read_text()


@pytest.mark.drill
def test_drill_of_kills_at_random_moments(forks, corpus, tmp_path):
    """Six trainings, each killed four times by the clock; half of them save their state after every step."""
    options = {"image_encoder": RESNET, "text_encoder": WITH_DROPOUT}
    folder = corpus(make_config(**options, train={"epochs": 12}))
    code, _, took = forks(folder, tmp_path / "whole")
    assert code == 0
    rng, kills, resumed = random.Random(1), 0, 0
    whole = outputs(tmp_path / "whole")
    for number in range(6):
        out = tmp_path / str(number)
        every = 0.0 if number % 2 else 0.05 * took / 60
        write_run_config(folder / "run.json", make_config(**options, train={"epochs": 12, "save_minutes": every}))
        for kill in range(4):
            early = kill == 2  # one of the four while all is made ready, or a little later
            code, *_ = forks(folder, out, seconds=rng.uniform(0.02, 0.3) * took, early=early)
            assert code == -signal.SIGKILL and not (out / "model").exists()
            kills += 1
        assert forks(folder, out)[0] == 0
        rows, files = outputs(out)
        files["run.json"] = whole[1]["run.json"]  # it holds save_minutes
        assert (rows, files) == whole and (out / "best").read_text() == (tmp_path / "whole" / "best").read_text()
        resumed += (out / "said").read_text().count("resumes in epoch")
    print(f"{kills} kills, {resumed} times a training went on")
    assert kills == 24 and resumed >= 12


# signals


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, studies, prompts):
    """A corpus, its best validation loss and the outputs of its training."""
    at = tmp_path_factory.mktemp("undisturbed")
    folder = make_corpus(at, make_config(image_encoder=RESNET, text_encoder=WITH_DROPOUT), studies, prompts)
    return folder, train(folder, at), outputs(at)


# In the first epoch, at its end, in the second.
@pytest.mark.parametrize(("step", "number"), zip([3, 5, 7], [*resume.STOPPING, resume.STOPPING[0]], strict=True))
def test_a_signal_stops_after_the_step_and_the_next_start_goes_on(
    undisturbed, tmp_path, monkeypatch, capsys, number, step
):
    folder, loss, whole = undisturbed
    handler = signal.getsignal(number)
    said = stop(folder, tmp_path / "a", monkeypatch, step, number)
    assert (
        f"in epoch {(step - 1) // 5} after step {(step - 1) % 5 + 1}; the state is saved" in said and "\n" not in said
    )
    assert signal.getsignal(number) is handler
    steps = []
    real = loop.compute_gradients
    monkeypatch.setattr(loop, "compute_gradients", lambda *args: steps.append(1) or real(*args))
    best = train(folder, tmp_path / "a")
    assert len(steps) == 10 - step
    assert f"training resumes in epoch {(step - 1) // 5} at step {(step - 1) % 5 + 1}" in capsys.readouterr().out
    assert best == loss and outputs(tmp_path / "a") == whole


def test_data_workers_outlive_a_signal_to_the_whole_group(corpus, tmp_path, monkeypatch):
    folder = corpus(make_config(train={"workers": 2}))
    import multiprocessing

    others = set(multiprocessing.active_children())  # of other tests

    def everyone():
        children = set(multiprocessing.active_children()) - others
        assert len(children) == 2
        pids = [str(pid) for pid in (*(c.pid for c in children), os.getpid())]
        subprocess.run(["kill", "-TERM", *pids], check=True)  # not from their parent: that they would obey

    with monkeypatch.context() as patch:
        interrupt(patch, 2, everyone)
        with pytest.raises(resume.Stopped, match="in epoch 0 after step 2"):
            train(folder, tmp_path / "a")
    (folder / "run.json").write_text((folder / "run.json").read_text().replace('"workers": 2', '"workers": 0'))
    assert train(folder, tmp_path / "a") == train(folder, tmp_path / "b")  # workers change nothing, the state fits


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (resume.Stopped("stopped by a signal"), 75, "pretrain resnet_m/0: stopped by a signal\n"),
        (FloatingPointError("the loss is nan"), "pretrain resnet_m/0: the loss is nan", ""),
        (resume.StateError("no room"), "pretrain resnet_m/0: no room", ""),
        (FloatingPointError(""), 1, ""),  # of a rank that leaves the word to another
    ],
)
def test_how_the_stage_ends(tmp_path, monkeypatch, capsys, error, code, says):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["pretrain", "resnet_m", "0"])

    def fails(*_):
        raise error

    monkeypatch.setattr(loop, "train_run", fails)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("stages.pretrain", run_name="__main__")
    assert end.value.code == code and capsys.readouterr().err == says


# whose state it is


def test_what_a_state_is_compared_by_is_all_that_decides_the_result(corpus, tmp_path):
    run = make_config()
    folder = corpus(run)
    words = Tokenizer.build(BERT, ["one two three"])
    cpu = torch.device("cpu")
    first = identity.identity(run, folder, words, cpu)
    assert identity.identity(run, folder, Tokenizer.build(BERT, ["one two three"]), cpu) == first
    same = {"workers": 3, "save_minutes": 1.0, "timeout_minutes": 1.0, "launcher": "x", "device": "auto"}
    assert identity.identity(replace(run, train=replace(run.train, **same)), folder, words, cpu) == first
    assert set(same) == set(identity.INDIFFERENT)

    def changed(**what):
        now = identity.identity(**{"config": run, "corpus": folder, "tokenizer": words, "device": cpu, **what})
        return [key for key in first if now[key] != first[key]]

    other = {"epochs": 3, "lr": 2e-3, "batch_size": 10, "patience": 1, "threads": 2, "shuffle_pairs": True}
    other |= {"micro_batch": 2, "length_groups": 3, "compile": True}
    for key in set(asdict(Train())) - set(same):
        now = other.get(key, {"weight_decay": 0.0, "warmup_epochs": 0.5, "precision": "bf16"}.get(key))
        assert changed(config=replace(run, train=replace(run.train, **{key: now}))) == ["parameters"], key
    assert changed(config=replace(run, loss=replace(run.loss, tcl_weight=0.4))) == ["parameters"]
    assert changed(tokenizer=Tokenizer.build(BERT, ["one two three four four"])) == ["tokenizer"]
    assert changed(device=torch.device("meta")) == ["device"]
    for name, what in {"studies.parquet": ["studies"], "prompts/chexpert.json": ["studies", "prompts"]}.items():
        with (folder / name).open("ab") as handle:
            handle.write(b" ")
        assert changed() == what


def copied_library(folder):
    shutil.copytree(ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "pipeline"


def test_code_is_compared_by_what_computes(tmp_path):
    """Comments, docstrings and layout are not; every module and data file that training is made of is, new ones too."""
    library = copied_library(tmp_path)
    first = identity.code_digest(library)
    assert first == identity.code_digest(ROOT / "pipeline")

    def changed(name, edit):
        file = library / name
        before = file.read_text() if file.exists() else None
        file.write_text(edit(before))
        now = identity.code_digest(library)
        file.write_text(before) if before is not None else file.unlink()
        return now != first

    losses = "training/losses.py"
    assert not changed(losses, lambda text: "# a comment\n" + text.replace("Mean over the rows", "The mean over rows"))
    assert not changed(
        losses, lambda text: text.replace("return (rows + columns) / 2", "return (\n        rows + columns) / 2")
    )
    assert not changed("evaluation/metrics.py", lambda text: text + "\nx = 1\n")
    assert not changed("tracking/launcher.py", lambda text: text + "\nx = 1\n")
    assert changed(losses, lambda text: text.replace("return (rows + columns) / 2", "return (rows + columns) / 3"))
    assert changed("text/synonyms.yaml", lambda text: text + "# a comment\n")
    for name in (
        "study.py",
        "study_keys.py",
        "storage/shards.py",
        "text/eda.py",
        "models/mixed.py",
        "training/loop.py",
    ):
        assert changed(name, lambda text: text + "\nx = 1\n"), name
    assert changed("training/methods/another.py", lambda _: "x = 1\n")


def test_the_state_is_of_all_modules_that_train():
    """What the stage imports is in the folders that are compared, or only reads parameters or keeps the books."""
    script = "import sys; from pipeline.training import loop; print(*(m for m in sys.modules if m[:9] == 'pipeline.'))"
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    compared = ("pipeline.study", "pipeline.storage", "pipeline.text", "pipeline.models", "pipeline.training")
    assert {m for m in said.split() if not m.startswith(compared)} <= {
        *(
            "pipeline.config",
            "pipeline.config.archive_params",
            "pipeline.config.checks",
            "pipeline.config.devices",
            "pipeline.config.load",
            "pipeline.config.params",
            "pipeline.config.places",
        ),
        *("pipeline.config.records", "pipeline.config.run_config", "pipeline.config.yaml_file", "pipeline.datasets"),
    }


def test_a_changed_parameter_never_resumes(corpus, tmp_path, monkeypatch, capsys):
    stop(corpus(make_config()), tmp_path / "a", monkeypatch)
    folder = corpus(make_config(train={"lr": 2e-3}))
    best = train(folder, tmp_path / "a")
    out = capsys.readouterr().out
    assert "the saved state is of another training (parameters changed); training starts from the beginning" in out
    assert train(folder, tmp_path / "b") == best
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


@pytest.mark.parametrize(
    ("anyway", "says"),
    [
        (False, "the saved state is of another training (code, libraries changed); training starts from the beginning"),
        (True, "code and libraries changed, and the state is used as asked; training resumes in epoch 1 at step 2"),
    ],
)
def test_changed_code_resumes_only_when_asked_to(corpus, tmp_path, monkeypatch, capsys, anyway, says):
    folder = corpus(make_config())
    stop(folder, tmp_path / "a", monkeypatch)
    monkeypatch.setattr(identity, "code_digest", lambda library: "other")
    monkeypatch.setattr(identity, "LIBRARIES", ("torch",))
    train(folder, tmp_path / "a", anyway=anyway)
    assert says in capsys.readouterr().out


def test_changed_parameters_never_resume_however_asked(corpus, tmp_path, monkeypatch, capsys):
    stop(corpus(make_config()), tmp_path / "a", monkeypatch)
    monkeypatch.setattr(identity, "code_digest", lambda library: "other")
    train(corpus(make_config(train={"lr": 2e-3})), tmp_path / "a", anyway=True)
    assert "another training (code, parameters changed); training starts from the beginning" in capsys.readouterr().out


def flip(file):
    """Change a bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Evil.folder),)


@pytest.mark.parametrize("damage", ["cut", "a bit", "code", "no best", "a bit of the best"])
def test_a_state_that_cannot_be_used_is_not(corpus, tmp_path, monkeypatch, capsys, damage):
    folder = corpus(make_config())
    stop(folder, tmp_path / "a", monkeypatch)
    state = tmp_path / "a" / "work" / "state.pt"
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-1000])
    elif damage == "a bit":
        flip(state)
    elif damage == "a bit of the best":
        flip(tmp_path / "a" / "work" / "best-0.safetensors")
    elif damage == "code":
        Evil.folder = tmp_path / "evil"
        torch.save({"identity": Evil()}, state)
    else:
        (tmp_path / "a" / "work" / "best-0.safetensors").unlink()
    best = train(folder, tmp_path / "a")
    said = "weights of the best epoch are gone" if damage == "no best" else "state is damaged"
    said = "weights of the best epoch are damaged" if damage == "a bit of the best" else said
    out = capsys.readouterr().out
    assert said in out and "training starts from the beginning" in out
    assert not (tmp_path / "evil").exists()
    assert train(folder, tmp_path / "b") == best


def test_one_process_at_a_time_trains_a_run(corpus, tmp_path):
    folder = corpus(make_config())
    with (
        resume.alone(tmp_path / "work"),
        pytest.raises(ParamsError, match=rf"work: process {os.getpid()} of this host is training this run"),
    ):
        train(folder, tmp_path)
    train(folder, tmp_path)


def test_a_lock_of_another_host_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.socket, "gethostname", lambda: "node 7")
    with resume.alone(tmp_path):
        assert (tmp_path / "lock").read_text() == f"node 7 {os.getpid()}"
        monkeypatch.setattr(resume.socket, "gethostname", lambda: "node 8")
        says = rf"process {os.getpid()} of host node 7, which shares this file system, is training this run; end it, or"
        with pytest.raises(ParamsError, match=says), resume.alone(tmp_path):
            pass


# finished, and nobody saw it


def test_a_finished_training_writes_its_outputs_again_without_training(corpus, tmp_path, monkeypatch, capsys):
    """DVC removed them, since whoever ran it died before the training ended."""
    folder = corpus(make_config(image_encoder=RESNET, train={"epochs": 3}))
    losses = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(loop.Validation, "loss", lambda *_: next(losses))
    best, whole = train(folder, tmp_path / "a"), outputs(tmp_path / "a")
    work = tmp_path / "a" / "work"
    assert sorted(p.name for p in work.iterdir()) == ["best-1.safetensors", "lock", "state.pt"]
    assert (work / "state.pt").stat().st_size < 20_000  # no optimizer, no weights
    shutil.rmtree(tmp_path / "a" / "model")
    (tmp_path / "a" / "history.csv").unlink()
    monkeypatch.setattr(loop, "compute_gradients", lambda *_: pytest.fail("it trains again"))
    capsys.readouterr()
    told = []
    assert train(folder, tmp_path / "a", lambda values, step: told.append(step)) == best == 1.0
    assert outputs(tmp_path / "a") == whole and told == [0, 1, 2]
    said = capsys.readouterr().out
    assert "training had finished, and whoever started it was gone; its outputs are written from here\n" in said


def test_a_finished_training_of_other_parameters_is_removed(corpus, tmp_path, capsys):
    train(corpus(make_config()), tmp_path / "a")
    folder = corpus(make_config(train={"lr": 2e-3}))
    best = train(folder, tmp_path / "a")
    assert "another training (parameters changed); training starts from the beginning" in capsys.readouterr().out
    assert best == train(folder, tmp_path / "b") and outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_a_finished_training_whose_end_was_seen_trains_anew(corpus, tmp_path, monkeypatch):
    folder = corpus(make_config())
    train(folder, tmp_path)
    resume.forget(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    steps, real = [], loop.compute_gradients
    monkeypatch.setattr(loop, "compute_gradients", lambda *args: steps.append(1) or real(*args))
    train(folder, tmp_path)
    assert len(steps) == 10


@pytest.mark.parametrize("there", [True, False])
def test_the_stage_forgets_a_training_whose_end_is_seen(tmp_path, monkeypatch, capsys, there):
    """``there``: whether the process that started the stage is alive at its end."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("enabled: true", "enabled: false"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain", "resnet_m", "0"])
    shell = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(launcher, "launcher", lambda: psutil.Process(shell.pid))

    def trains(corpus, out, history, work, *_):
        work.mkdir(parents=True)
        if not there:
            shell.kill()
            shell.wait()
        return 1.0

    monkeypatch.setattr(loop, "train_run", trains)
    monkeypatch.setattr(mlflow_runs.StageRun, "artifact", lambda *_: None)
    runpy.run_module("stages.pretrain", run_name="__main__")
    assert "best validation loss 1.0000" in capsys.readouterr().out
    assert (tmp_path / "data" / "work" / "pretrain" / "resnet_m" / "0").exists() is not there
    shell.kill()
    shell.wait()


STARTED = """
import sys, time
from pipeline.tracking.launcher import is_there, launcher
above = launcher()
print(above.pid, flush=True)
sys.stdin.read()
print(is_there(above), flush=True)
"""


def test_who_started_a_stage_is_the_dvc_above_it_and_shells_outlive_it(tmp_path):
    """As under DVC and torchrun: dvc -> sh -> torchrun -> process. The dvc is killed, the others live on."""
    (tmp_path / "started.py").write_text(STARTED)
    torchrun = f"import subprocess, sys; subprocess.run([{sys.executable!r}, 'started.py'])"
    (tmp_path / "torchrun.py").write_text(torchrun)
    run = f"import subprocess; subprocess.run({f'{sys.executable} torchrun.py; true'!r}, shell=True)"
    (tmp_path / "dvc").write_text(run)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    for kill, answer in ((True, b"False\n"), (False, b"True\n")):
        dvc = subprocess.Popen([sys.executable, "dvc", "repro"], cwd=tmp_path, env=env, **pipes)
        assert int(dvc.stdout.readline()) == dvc.pid
        if kill:
            dvc.kill()
            dvc.wait()
        dvc.stdin.close()
        assert dvc.stdout.readline() == answer
        dvc.stdout.close()
        dvc.wait()


# what the state holds


def test_a_training_that_goes_on_tells_its_whole_story(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CURVE", 2)
    folder = corpus(make_config())
    stop(folder, tmp_path / "a", monkeypatch)
    told, whole = [], []
    train(folder, tmp_path / "a", lambda values, step: told.append((step, values.get("step_loss"))))
    train(folder, tmp_path / "b", lambda values, step: whole.append((step, values.get("step_loss"))))
    assert sorted(told, key=str) == sorted(whole, key=str)
    assert [step for step, loss in whole if loss is not None] == [2, 4, 6, 8, 10]
    assert [step for step, loss in whole if loss is None] == [0, 1]


def test_the_state_is_saved_by_the_clock_and_after_each_epoch(corpus, tmp_path, monkeypatch):
    saved = []
    real = resume.Saved.save
    monkeypatch.setattr(resume.Saved, "save", lambda self, p: saved.append((p.epoch, p.step)) or real(self, p))
    train(corpus(make_config()), tmp_path / "a")
    assert saved == [(0, 5), (1, 0), (1, 5), (2, 0)]  # before and after validation
    saved.clear()
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    real_step = loop.compute_gradients
    monkeypatch.setattr(loop, "compute_gradients", lambda *a: now.__setitem__(0, now[0] + 60) or real_step(*a))
    train(corpus(make_config(train={"save_minutes": 2.0})), tmp_path / "b")
    assert saved == [(0, 2), (0, 4), (0, 5), (1, 0), (1, 2), (1, 4), (1, 5), (2, 0)]


def test_the_best_model_survives_what_comes_after_it(corpus, tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 3.0, 4.0])
    monkeypatch.setattr(loop.Validation, "loss", lambda *_: next(losses))
    folder = corpus(make_config(train={"epochs": 4}))
    work = tmp_path / "a" / "work"
    stop(folder, tmp_path / "a", monkeypatch, step=17)
    assert sorted(p.name for p in work.iterdir()) == ["best-1.safetensors", "lock", "state.pt"]
    kept = load_file(work / "best-1.safetensors")
    assert not (tmp_path / "a" / "model").exists()
    assert train(folder, tmp_path / "a") == 1.0
    weights = load_file(tmp_path / "a" / "model" / "model.safetensors")
    assert weights.keys() == kept.keys() and all(torch.equal(weights[k], kept[k]) for k in kept)


@pytest.mark.parametrize(("patience", "epochs"), [(0, 6), (1, 3), (2, 6), (3, 6)])
def test_patience_ends_a_training(corpus, tmp_path, monkeypatch, patience, epochs):
    """Counted by hand: the best are epochs 0, 1 and 3."""
    losses = iter([3.0, 2.0, 2.0, 1.0, float("nan"), 4.0])
    monkeypatch.setattr(loop.Validation, "loss", lambda *_: next(losses))
    train(corpus(make_config(train={"epochs": 6, "patience": patience})), tmp_path)
    assert len(outputs(tmp_path)[0]) == epochs


# what goes wrong


def test_studies_that_are_not_finite_are_named(corpus, tmp_path, monkeypatch, studies):
    run = make_config(train={"save_minutes": 0.0})
    real, calls = CxrClip.forward, [0]

    def forward(net, *inputs):
        images, texts, scale = real(net, *inputs)
        calls[0] += net.training
        if calls[0] >= 7:  # the second step of the second epoch, and when it is looked at again
            wrong = torch.ones(16)
            wrong[[2, 13]] = torch.tensor([float("inf"), float("nan")])
            images = images * wrong[:, None]
        return images, texts, scale

    folder = corpus(run)
    with monkeypatch.context() as patch:
        patch.setattr(CxrClip, "forward", forward)
        with pytest.raises(FloatingPointError) as error:
            train(folder, tmp_path / "a")
    training = [s for d in run.datasets for s in studies if s.dataset == d and s.split == "train"]
    places = epoch_draws(40, 8, run.seed, 1)[1][:, 1]
    named = ", ".join(f"{s.dataset}/{s.patient}/{s.study}" for s in (training[i] for i in sorted(places[[2, 13 - 8]])))
    said = str(error.value)
    assert said.startswith(f"tiny: the loss is nan in epoch 1 at step 1, from studies {named}; lower train.lr")
    assert "\n" not in said and not any(s.findings and s.findings in said for s in studies)
    best = train(folder, tmp_path / "a")  # from the step before
    assert best == train(folder, tmp_path / "b") and outputs(tmp_path / "a") == outputs(tmp_path / "b")


def test_where_no_study_stands_out_eight_of_the_step_are_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(
        cxr_clip_method,
        "cxr_clip_loss",
        lambda e, *_: ((e.image1 / 0).sum() * e.text1.sum() * 0, {"mvs": torch.tensor(0.0)}),
    )
    with pytest.raises(FloatingPointError, match=r"studies (\w+/p\d+/s\d+, ){7}\w+/p\d+/s\d+ and 2 more; lower"):
        train(corpus(make_config(train={"batch_size": 10})), tmp_path)


def test_gradients_that_are_not_finite_never_reach_the_weights(corpus, tmp_path, monkeypatch):
    """The loss of a step may be finite and its gradients not."""
    folder = corpus(make_config(train={"save_minutes": 0.0}))
    with monkeypatch.context() as patch:
        in_steps(patch, {7}, after=lambda method: method.net.log_scale.grad.fill_(float("nan")))
        with pytest.raises(FloatingPointError, match="the gradients are not finite in epoch 1 at step 1, from"):
            train(folder, tmp_path / "a")
    assert train(folder, tmp_path / "a") == train(folder, tmp_path / "b")


@pytest.mark.parametrize(("step", "kept"), [(7, "the one saved before is kept"), (1, "no earlier one is there")])
def test_a_signal_does_not_claim_a_state_that_was_refused(corpus, tmp_path, monkeypatch, step, kept):
    folder = corpus(make_config(train={"save_minutes": 60.0}))
    with monkeypatch.context() as patch:
        in_steps(
            *(patch, {step}),
            before=lambda method: os.kill(os.getpid(), signal.SIGTERM),
            after=lambda method: method.net.log_scale.data.fill_(float("nan")),
        )
        with pytest.raises(resume.Stopped) as stopped:
            train(folder, tmp_path / "a")
    says = f"; the state is not saved, since weights of the model are not finite; {kept}"
    assert str(stopped.value).endswith(says) and "state is saved" not in str(stopped.value)
    assert (tmp_path / "a" / "work" / "state.pt").exists() == (step > 1)
    assert train(folder, tmp_path / "a") == train(folder, tmp_path / "b")


def test_an_epoch_whose_weights_are_not_finite_is_never_the_best(corpus, tmp_path, monkeypatch):
    """Such as of a word that validation does not meet: its loss is finite, but the weights are not kept."""
    losses = iter([3.0, 1.0])

    def validation(self, *_):
        loss = next(losses)
        if loss == 1.0:
            self.method.net.text_tower.model.get_input_embeddings().weight.data[-1] = float("nan")
        return loss

    monkeypatch.setattr(loop.Validation, "loss", validation)
    assert train(corpus(make_config()), tmp_path) == 3.0
    assert all(v.isfinite().all() for v in load_file(tmp_path / "model" / "model.safetensors").values())


def test_a_full_disk_leaves_the_state_before_whole(corpus, tmp_path, monkeypatch):
    folder = corpus(make_config(train={"save_minutes": 0.0}))
    stop(folder, tmp_path / "a", monkeypatch)
    state = tmp_path / "a" / "work" / "state.pt"
    before = state.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(resume.StateError) as error:
            train(folder, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the training state could not be saved, and the one before it is kept" in str(error.value)
    assert "MiB are free there): make room" in str(error.value) and "\n" not in str(error.value)
    assert state.read_bytes() == before
    assert sorted(p.name for p in state.parent.iterdir()) == ["best-0.safetensors", "lock", "state.pt"]
    assert train(folder, tmp_path / "a") == train(folder, tmp_path / "b")
    assert outputs(tmp_path / "a") == outputs(tmp_path / "b")


# how time is used


def test_flops_of_a_step():
    """ResNet-50 at 224 pixels takes 4.09 G multiply-adds; the text's are counted by hand."""
    net = CxrClip(make_config(image_encoder=replace(RESNET, args={}), image_size=224), 300)
    work = throughput.Work(net, 224, 48, torch.device("cpu"))
    assert work.image == pytest.approx(2 * 4.09e9 + 2 * 2048 * 16, rel=0.01)
    h, inner, layers, n = 32, 64, 1, 40
    by_hand = layers * (n * 2 * (4 * h * h + 2 * h * inner) + 2 * 2 * n * n * h) + 2 * h * 16
    text = work.of(0, torch.tensor([n])) / 3
    assert text == pytest.approx(by_hand, rel=0.01)
    assert work.of(3, torch.tensor([n, n])) == pytest.approx(3 * (3 * work.image + 2 * text))
    assert net.training


def test_peaks(monkeypatch):
    cuda = torch.device("cuda", 0)
    names = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 2080": None,
    }
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert throughput.peak(cuda, "fp16") == flops
        assert throughput.peak(cuda, "fp32") is None
    assert throughput.peak(torch.device("cpu"), "bf16") is None


def test_an_epoch_says_how_its_time_was_used(corpus, tmp_path, capsys):
    told = []
    train(corpus(make_config()), tmp_path, lambda values, step: told.append(values))
    out = capsys.readouterr()
    lines = [line for line in out.out.splitlines() if line.startswith("tiny: epoch")]
    assert len(lines) == 2
    assert all("studies/s, " in line and "% of the time waiting for data, MFU —" in line for line in lines)
    assert "80/80" in out.err and "loss=" in out.err and "studies/s" in out.err
    assert len(told) == 2 and all(0 < row["waiting"] < 1 and "mfu" not in row for row in told)
