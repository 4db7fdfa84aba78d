import csv
import math
import os
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.config.records import ParamsError
from pipeline.training import batches, loop, resume, validation
from pipeline.training.batches import validation_parts
from pipeline.training.distributed import Process
from pipeline.training.methods import cxr_clip, mixed
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.schedule import warmup_cosine
from pipeline.training.validation import Validation
from tests.conftest import RESNET, SWIN, in_steps, make_corpus, make_mixed

ROOT = Path(__file__).parents[1]
TWO_PROCESSES = """
import multiprocessing, os, sys
from pathlib import Path
import timm, transformers
from pipeline.training import loop, validation
from pipeline.training.batches import validation_parts
from pipeline.training.distributed import Process

corpus, out = map(Path, sys.argv[1:])

def work(rank):
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
    best = loop.train_run(corpus, out / "model", out / "history.csv", out / "work", lambda row, epoch: None)
    (out / f"best-{rank}").write_text(repr(best))

processes = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in (0, 1)]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit(max(abs(process.exitcode) for process in processes))
"""


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def two_processes(config, studies, prompts, tmp_path_factory):
    """A training by two processes, begun before the other tests of this file because it takes a while to start."""
    folder = tmp_path_factory.mktemp("two")
    make_corpus(folder, config(image_encoder=SWIN, train={"epochs": 3}), studies, prompts)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_PROCESSES, str(folder / "corpus"), str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        yield process, folder
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def train(folder, out):
    """(best validation loss, rows of the history, weights, rows as they were reported)."""
    told = []
    work = out / "work"
    best = loop.train_run(folder, out / "model", out / "history.csv", work, lambda row, at: told.append((at, row)))
    weights = load_file(out / "model" / "model.safetensors") if (out / "model").exists() else None
    return best, history(out / "history.csv"), weights, told


def history(path):
    with path.open() as handle:
        return [{k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(handle)]


# learning rate


def test_learning_rate_warms_up_from_above_zero_and_ends_at_zero():
    factor = [warmup_cosine(s, 10, 50) for s in range(51)]
    np.testing.assert_allclose(factor[:10], np.arange(1, 11) / 10)
    np.testing.assert_allclose(factor[10:], [(1 + math.cos(math.pi * k / 40)) / 2 for k in range(41)], atol=1e-12)
    assert factor[30] == pytest.approx(0.5) and factor[50] == pytest.approx(0, abs=1e-12)


def test_warm_up_may_be_absent_or_part_of_an_epoch():
    assert warmup_cosine(0, 0, 20) == 1.0
    factor = [warmup_cosine(s, 5, 20) for s in range(20)]
    assert factor[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factor[5:] == sorted(factor[5:], reverse=True) and 0 < factor[-1] < 0.02


# training


def test_two_trainings_are_bit_identical(config, corpus, tmp_path):
    folder = corpus(config(image_encoder=RESNET, text_encoder=replace(config().text_encoder, args=WITH_DROPOUT)))
    first, second = (train(folder, tmp_path / name) for name in "ab")
    for name in ("model.safetensors", "run.json", "tokenizer.json"):
        assert (tmp_path / "a" / "model" / name).read_bytes() == (tmp_path / "b" / "model" / name).read_bytes()
    assert (tmp_path / "a" / "history.csv").read_bytes() == (tmp_path / "b" / "history.csv").read_bytes()
    assert first[0] == second[0]


def test_a_seed_of_a_training_is_added_to_the_runs(config, corpus, tmp_path):
    one = config(train={"epochs": 1})
    work = tmp_path / "work"
    loop.train_run(corpus(one), tmp_path / "a", tmp_path / "a.csv", work, lambda row, at: None, seed=2)
    loop.train_run(
        corpus(replace(one, seed=one.seed + 2)), tmp_path / "b", tmp_path / "b.csv", work, lambda row, at: None
    )
    loop.train_run(corpus(one), tmp_path / "c", tmp_path / "c.csv", work, lambda row, at: None)
    model = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert model["a"] == model["b"] != model["c"]
    assert (tmp_path / "a" / "run.json").read_bytes() == (tmp_path / "b" / "run.json").read_bytes()


WITH_DROPOUT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


def test_history_holds_a_row_an_epoch(config, corpus, tmp_path):
    run = config(train={"epochs": 3})
    best, rows, _, told = train(corpus(run), tmp_path)
    assert list(rows[0]) == ["epoch", "step", "lr", "train_loss", "valid_loss", "mvs", "icl", "tcl", "scale"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 5), (1, 10), (2, 15)]  # 40 studies, 8 a step
    assert best == min(row["valid_loss"] for row in rows)
    for row, (epoch, reported) in zip(rows, told, strict=True):
        assert {name: reported[name] for name in row} == row and epoch == row["epoch"]
        assert reported.keys() - row.keys() == {"studies_per_second", "seconds", "waiting"}  # a CPU's peak is not known
        assert row["train_loss"] == pytest.approx(row["mvs"] + row["icl"] + 0.5 * row["tcl"], rel=1e-5)
        last = warmup_cosine(int(row["step"]) - 1, 5, 15)
        assert row["lr"] == pytest.approx(1e-3 * last)
        assert reported["studies_per_second"] * reported["seconds"] == pytest.approx(40)


def test_it_learns(config, corpus, tmp_path):
    """On studies it has seen the loss falls below that of a guess among 8, log 8 = 2.08, where it begins."""
    quiet = {"image": False, "text": False}
    run = config(augment=quiet, datasets=("mimic_cxr",), train={"epochs": 16, "lr": 1e-2})
    _, rows, _, _ = train(corpus(replace(run, image_encoder=RESNET)), tmp_path)
    assert rows[0]["mvs"] > math.log(8)
    assert np.mean([row["mvs"] for row in rows[-4:]]) < math.log(8) - 0.1
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]


class Draws(tuple):
    nbytes = 0


class OfFourAndTwo:
    """A method whose validation loss of a batch is what ``losses`` says for its studies."""

    def __init__(self, losses, rank=0, world=1):
        self.losses, self.seen = losses, []
        self.process = Process(torch.device("cpu"), rank, world)
        self.learner = torch.nn.Linear(1, 1)

    def collate(self, draws):
        return Draws(draws)

    def validation_loss(self, batch):
        self.seen.append(batch)
        return torch.tensor(self.losses[batch])


def test_the_validation_loss_weighs_by_studies_then_by_data_sets(config):
    """6 studies in batches of 4 are 4 and 2, 4 are one batch, and a single study is none."""
    run = config(train={"batch_size": 4})
    sets = [[f"{name}{i}" for i in range(count)] for name, count in {"a": 6, "b": 4, "c": 1, "d": 3}.items()]
    parts = [tuple(data[i] for i in part) for data in sets for part in validation_parts(len(data), 4)]
    assert [len(part) for part in parts] == [4, 2, 4, 3]
    losses = dict(zip(parts, (1.0, 4.0, 10.0, 6.0), strict=True))
    method = OfFourAndTwo(losses)
    assert Validation(method, sets, run).loss() == pytest.approx(((4 * 1 + 2 * 4) / 6 + 10 + 6) / 3)
    assert not method.learner.training and method.seen == parts
    with pytest.raises(ParamsError, match=r"runs\.tiny\.datasets: none has a validation split"):
        Validation(method, [], run).loss()


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_validation_batches(config, monkeypatch, world):
    """Each batch is decoded by one of them, and all get the number that one process gets."""
    run = config(train={"batch_size": 4})
    sets = [[f"{name}{i}" for i in range(count)] for name, count in {"a": 11, "b": 7}.items()]
    parts = [tuple(data[i] for i in part) for data in sets for part in validation_parts(len(data), 4)]
    losses = dict(zip(parts, (0.1, 0.7, 1.3, 2.9, 3.1), strict=True))
    alone, rows, seen = Validation(OfFourAndTwo(losses), sets, run).loss(), [], []
    for gathering in (lambda row, device: rows.append(row) or torch.stack([row] * world), lambda *_: torch.stack(rows)):
        monkeypatch.setattr(validation, "gather_rows", gathering)
        methods = [OfFourAndTwo(losses, rank, world) for rank in range(world)]
        found = [Validation(method, sets, run).loss() for method in methods]
        seen = [batch for method in methods for batch in method.seen]
    assert found == [alone] * world
    assert sorted(seen) == sorted(parts)


def test_validation_in_pieces_is_that_of_whole_batches(config, corpus, monkeypatch):
    """What a device holds at a time does not grow with the batch."""
    for run in (config(train={"batch_size": 20}), make_mixed(train={"batch_size": 20})):
        folder = corpus(run)
        t = loop._build(run, folder, folder / "work", Process(torch.device("cpu")), lambda *_: None)
        whole, seen, kind = t.validation.loss(), [], type(t.method.net)
        real = kind.encode_image
        for module in (cxr_clip, mixed):
            monkeypatch.setattr(module, "FORWARD", 3)
        with monkeypatch.context() as patch:
            patch.setattr(kind, "encode_image", lambda *a, real=real, seen=seen: seen.append(len(a[1])) or real(*a))
            assert t.validation.loss() == pytest.approx(whole, rel=1e-5)
        assert 0 < max(seen) <= 6  # two views a study
        monkeypatch.undo()


def test_validation_reads_each_view_once_in_a_training(config, corpus, monkeypatch):
    run = config(train={"batch_size": 8})
    folder = corpus(run)
    t = loop._build(run, folder, folder / "work", Process(torch.device("cpu")), lambda *_: None)
    read, real = [], batches.load_view
    monkeypatch.setattr(batches, "load_view", lambda view: read.append((view.shard, view.offset)) or real(view))
    first = t.validation.loss()
    assert len(read) == len(set(read)) > 10  # a study with one view shows it twice
    assert t.validation.loss() == first and len(read) == len(set(read))
    monkeypatch.setattr(validation, "KEPT", 1)  # no room: read again, and the same
    again = Validation(t.method, t.validation.sets, run)
    assert again.loss() == again.loss() == first and not again._kept
    monkeypatch.undo()
    by_workers = Validation(t.method, t.validation.sets, replace(run, train=replace(run.train, workers=2)))
    assert by_workers.loss() == by_workers.loss() == first and by_workers._kept
    assert not any(x.is_shared() for batch in by_workers._kept for x in (batch.images, *batch.tokens, batch.keys))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_signal_in_validation_stops_between_batches_and_nothing_is_lost(config, corpus, tmp_path, monkeypatch, at):
    run = config(image_encoder=RESNET, train={"batch_size": 4})
    folder, seen = corpus(run), []
    real = CxrClipMethod.validation_loss

    def interrupted(self, batch):
        seen.append(1)
        if len(seen) == at + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(CxrClipMethod, "validation_loss", interrupted)
        with pytest.raises(resume.Stopped, match="in epoch 0 in its validation; the state is saved"):
            train(folder, tmp_path / "a")
    assert len(seen) == at + 1
    steps, real_step = [], loop.compute_gradients
    monkeypatch.setattr(loop, "compute_gradients", lambda *args: steps.append(1) or real_step(*args))
    best, rows, weights, _ = train(folder, tmp_path / "a")
    assert len(steps) == 10  # the second epoch's
    other = train(folder, tmp_path / "b")
    assert (best, rows) == other[:2] and all(torch.equal(weights[k], v) for k, v in other[2].items())


# fp16, whose scaler and autocast torch has on the CPU, too


@pytest.fixture
def fp16(config, corpus, monkeypatch):
    """The corpus of a run in fp16, which computes in single precision: what is tested is what gradients it gets."""
    monkeypatch.setattr(loop, "device_of", lambda options: torch.device("cpu"))
    monkeypatch.setattr(cxr_clip, "autocast", lambda *_: nullcontext())
    return corpus(config(train={"precision": "fp16"}))


def overflowing(monkeypatch, steps):
    """Gradients of these steps, counted from 1, are not finite; of all of them where None."""

    def overflow(method):
        method.net.image_projection.weight.grad[0, 0] = float("inf")

    in_steps(monkeypatch, steps, after=overflow)


def stop(_):
    os.kill(os.getpid(), signal.SIGTERM)


def test_steps_that_fp16_leaves_out_are_counted(fp16, tmp_path, monkeypatch, capsys):
    overflowing(monkeypatch, {1, 2, 7})
    _, rows, _, _ = train(fp16, tmp_path)
    assert list(rows[0])[-3:] == ["scale", "loss_scale", "skipped"]
    assert [(row["loss_scale"], row["skipped"]) for row in rows] == [(2.0**14, 2), (2.0**13, 1)]
    assert "skipped=" in capsys.readouterr().err


def test_an_interrupted_fp16_training_counts_on(fp16, tmp_path, monkeypatch):
    overflowing(monkeypatch, {1, 2, 7})
    whole = train(fp16, tmp_path / "whole")[1]
    monkeypatch.undo()
    monkeypatch.setattr(loop, "device_of", lambda options: torch.device("cpu"))
    monkeypatch.setattr(cxr_clip, "autocast", lambda *_: nullcontext())
    with monkeypatch.context() as patch:
        overflowing(patch, {1, 2})
        in_steps(patch, {3}, before=stop)
        with pytest.raises(resume.Stopped, match="in epoch 0 after step 3"):
            train(fp16, tmp_path / "a")
    overflowing(monkeypatch, {4})
    assert train(fp16, tmp_path / "a")[1] == whole


@pytest.mark.parametrize(("skips", "said"), [(5, "5 steps in a row"), (50, "17 steps in a row .* loss scale is 0.5;")])
def test_a_training_that_fp16_cannot_hold_ends(fp16, config, corpus, tmp_path, monkeypatch, skips, said):
    """It ran to its end once: 40 of 40 steps left out, a scale of 1e-7, and an untrained model as the best."""
    monkeypatch.setattr(loop, "SKIPS", skips)
    folder = corpus(config(train={"precision": "fp16", "epochs": 5}))
    overflowing(monkeypatch, None)
    with pytest.raises(FloatingPointError, match=f"tiny: the gradients are too large for fp16 in epoch .*: {said}"):
        train(folder, tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("late", [0, 1])
def test_what_is_read_late_is_the_same(config, corpus, tmp_path, monkeypatch, late):
    """On CUDA a step's numbers are read while the next step runs."""
    folder = corpus(config(image_encoder=RESNET))
    whole = train(folder, tmp_path / "whole")
    monkeypatch.setattr(loop, "READ_LATE", {"cpu": late})
    assert train(folder, tmp_path / "late")[1] == whole[1]
    with monkeypatch.context() as patch:
        count = in_steps(patch, {3}, after=lambda method: method.net.log_scale.grad.fill_(float("nan")))
        with pytest.raises(FloatingPointError, match="the gradients are not finite in epoch 0 at step 2, from studies"):
            train(folder, tmp_path / "broken")
    assert count[0] == 3 + late
    with monkeypatch.context() as patch:
        in_steps(patch, {3}, before=stop)
        with pytest.raises(resume.Stopped, match=f"in epoch 0 after step {3 + late}; the state is saved"):
            train(folder, tmp_path / "stopped")
    assert train(folder, tmp_path / "stopped")[1] == whole[1]


def test_the_best_epoch_by_validation_is_kept(config, corpus, tmp_path, monkeypatch):
    losses, seen = iter([3.0, 1.0, math.nan, 2.0]), []

    def validation(self, *_):
        seen.append({k: v.clone() for k, v in self.method.net.state_dict().items()})
        return next(losses)

    monkeypatch.setattr(loop.Validation, "loss", validation)
    best, rows, weights, _ = train(corpus(config(train={"epochs": 4})), tmp_path)
    assert best == 1.0 and [row["valid_loss"] for row in rows][:2] == [3.0, 1.0]
    assert all(torch.equal(weights[k], v) for k, v in seen[1].items())
    assert any(not torch.equal(weights[k], v) for k, v in seen[3].items())


def test_weight_decay_takes_hold_of_every_parameter(config, corpus, tmp_path, monkeypatch):
    """Paper section 4.2 names no exception."""
    groups = []
    real = torch.optim.AdamW

    def spy(parameters, **options):
        optimizer = real(parameters, **options)
        groups.extend(optimizer.param_groups)
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    _, _, weights, _ = train(corpus(config(train={"epochs": 1, "weight_decay": 0.03})), tmp_path)
    assert [group["weight_decay"] for group in groups] == [0.03]
    given = sorted(p.shape for p in groups[0]["params"])
    assert given == sorted(v.shape for k, v in weights.items() if k.endswith(("weight", "bias", "_table", "log_scale")))


# errors


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_the_cpu_is_an_error(config, corpus, tmp_path, precision):
    with pytest.raises(ParamsError, match=rf"train\.precision: {precision} needs CUDA.*set fp32"):
        train(corpus(config(train={"precision": precision})), tmp_path)


def test_a_batch_larger_than_the_corpus_is_an_error(config, corpus, tmp_path):
    with pytest.raises(ValueError, match=r"train\.batch_size: 41 studies a step, but the corpus holds only 40; lower"):
        train(corpus(config(train={"batch_size": 41})), tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_loss_that_is_not_finite_is_an_error(config, corpus, tmp_path, monkeypatch):
    real = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, **options: real(p, **{**options, "weight_decay": 1e36}))
    with pytest.raises(
        FloatingPointError, match=r"tiny: the loss is (nan|inf) in epoch 0 at step \d, from studies .*; lower train\.lr"
    ):
        train(corpus(config(train={"lr": 1.0})), tmp_path)


def test_no_finite_validation_is_an_error(config, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Validation, "loss", lambda *_: math.nan)
    with pytest.raises(FloatingPointError, match="no epoch had a finite validation loss"):
        train(corpus(config(train={"epochs": 1})), tmp_path)


# several processes


def test_two_processes_compute_what_one_does(two_processes, tmp_path):
    """Swin has no BatchNorm and nothing here drops out, so gathered negatives with gradients give the same losses; the
    second and third epoch tell whether the updates, too, were the same."""
    process, folder = two_processes
    best, one, _, _ = train(folder / "corpus", tmp_path / "one")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said[-3000:]
    two = history(folder / "history.csv")
    assert (folder / "best-0").read_text() == (folder / "best-1").read_text()
    for key in ("train_loss", "valid_loss", "mvs", "icl", "tcl"):
        assert two[0][key] == pytest.approx(one[0][key], abs=1e-4)
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], abs=2e-3)
    assert [row["scale"] for row in two] == pytest.approx([row["scale"] for row in one], abs=1e-4)
    assert min(row["valid_loss"] for row in two) == pytest.approx(best, abs=2e-3)


def test_a_batch_must_divide_among_processes(config, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "join", lambda device, options, **_: Process(device, 0, 3))
    with pytest.raises(ParamsError, match=r"train\.batch_size: 8 studies do not divide among 3 processes"):
        train(corpus(config()), tmp_path)
