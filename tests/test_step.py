"""A step on 1, 2 and 4 processes and in pieces: loss, gradients and statistics of BatchNorm are those of one pass.

In float64, so that rounding hides no mistake: tiny BatchNorms over few values lose five digits of float32's seven.
"""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from pipeline.config.params import Loss
from pipeline.config.records import ParamsError
from pipeline.training.batch_norm import synchronise_batch_norm
from pipeline.training.batches import collate
from pipeline.training.step import apply_gradients, compute_gradients
from tests import mixed_steps
from tests.conftest import RESNET, make_config
from tests.mixed_steps import Ids
from tests.step_ranks import CASES, HALF, batch_of, collate_of, method_of, model, samples, step, validated
from tests.test_losses import info_nce

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors: threads would only wait for one another and for the processes beside them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def ranks(tmp_path_factory):
    """Steps by two and by four processes, begun before the other tests of this file; {world: process} and results."""
    folder = tmp_path_factory.mktemp("ranks")
    running = {}
    for world in (2, 4):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        running[world] = subprocess.Popen(
            [sys.executable, "-m", "tests.step_ranks", str(folder), str(world), port],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield running, folder
    for process in running.values():
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def whole():
    """By one process in one pass."""
    return {case: step(case) for case in CASES}


def assert_alike(got, expected, tolerance=1e-5):
    """Each tensor to ``tolerance`` of its norm. Gradients that are zero but for rounding, such as those of a bias that
    softmax takes out again, to 1e-8 of the largest."""
    assert got.keys() == expected.keys()
    largest = max(float(v.norm()) for name, v in expected.items() if name.startswith("grad."))
    for name, value in expected.items():
        off = float((got[name].double() - value.double()).norm())
        assert off <= tolerance * float(value.double().norm()) + 1e-8 * largest, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("groups", [1, 16])
def test_length_groups_change_nothing(whole, case, groups):
    assert_alike(step(case, groups=groups), whole[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_step_in_pieces_is_the_step(whole, case, micro_batch):
    """ResNet: BatchNorm over the whole batch, its running statistics moved once. Swin: cut like the texts."""
    assert_alike(step(case, micro_batch=micro_batch), whole[case])


@pytest.mark.parametrize("case", CASES)
def test_the_place_in_the_batch_changes_nothing(whole, case):
    """Dropout follows the study, not the row."""
    config = make_config(**CASES[case])
    loss, *_ = compute_gradients(method_of(model(config), config), collate_of(config)(samples(config)[::-1]))
    assert loss.item() == pytest.approx(whole[case]["loss.total"].item(), rel=1e-9)


def test_the_step_has_something_to_get_wrong(whole):
    """Every parameter has a gradient, statistics moved, and dropout makes a difference."""
    for got in whole.values():
        assert all(v.abs().max() > 0 for name, v in got.items() if name.startswith("grad."))
    assert whole["resnet"]["buffer.image_tower.model.bn1.running_mean"].abs().max() > 1e-3
    config = make_config(**CASES["resnet"])
    batch = batch_of(config)
    other = replace(batch, keys=batch.keys + 1)
    losses = [method_of(model(config), config).loss(b)[0].item() for b in (batch, batch, other)]
    assert losses[0] == losses[1] != losses[2]


def test_pieces_are_no_larger_than_asked(monkeypatch):
    for case, images in (("resnet", 16), ("swin", 4)):
        config = make_config(**CASES[case])
        config = replace(config, train=replace(config.train, micro_batch=2, length_groups=2))
        net = model(config)
        seen = {"image": [], "text": []}
        net.image_tower.register_forward_hook(lambda _, args, out, seen=seen: seen["image"].append(len(args[0])))
        net.text_tower.register_forward_hook(lambda _, args, out, seen=seen: seen["text"].append(len(args[0])))
        compute_gradients(method_of(net, config), batch_of(config))
        assert max(seen["text"]) == 4 and sum(seen["text"]) == 2 * 16
        assert max(seen["image"]) == images and sum(seen["image"]) == (16 if case == "resnet" else 2 * 16)


def test_the_loss_is_the_numpy_loss_of_the_embeddings():
    config = make_config(**CASES["swin"], loss=Loss(icl_weight=0.7, tcl_weight=0.3))
    net, batch = model(config).eval(), batch_of(config)
    drawn = samples(config)
    with torch.no_grad():
        loss, parts = method_of(net, config).loss(batch)
        i1, i2 = (net.encode_image(torch.from_numpy(np.stack([s.images[k] for s in drawn]))).numpy() for k in (0, 1))
        texts = [
            [
                net.encode_text(torch.from_numpy(ids)[None], torch.ones(1, len(ids)).long())
                for ids in Ids().encode(s.texts)
            ]
            for s in drawn
        ]
    t1, t2 = (torch.cat([t[k] for t in texts]).numpy() for k in (0, 1))
    mvs = np.mean([info_nce(i, t, 10.0) for i in (i1, i2) for t in (t1, t2)])
    icl, tcl = info_nce(i1, i2, 10.0), info_nce(t1, t2, 10.0)
    assert parts["mvs"].item() == pytest.approx(mvs, rel=1e-6)
    assert loss.item() == pytest.approx(mvs + 0.7 * icl + 0.3 * tcl, rel=1e-6)


@pytest.mark.parametrize("weights", [Loss(mvs=False, icl_weight=0.0, tcl_weight=0.0), Loss(mvs=False, tcl_weight=0.0)])
def test_single_samples_go_the_same_way(weights):
    config = make_config(**{**CASES["swin"], "loss": weights})
    images, texts = (2 if weights.icl_weight else 1), 1
    drawn = [s._replace(images=s.images[:images], texts=s.texts[:texts]) for s in samples(config)]
    batch = collate(drawn, Ids(), 3)
    pieces = replace(config, train=replace(config.train, micro_batch=3))
    got = []
    for run in (config, pieces):
        net = model(run)
        loss, parts, _ = compute_gradients(method_of(net, run), batch)
        assert set(parts) == {"mvs", "icl"} if weights.icl_weight else {"mvs"}
        got.append({"loss": loss} | {f"grad.{n}": p.grad for n, p in net.named_parameters() if p.requires_grad})
    assert_alike(got[1], got[0])


@pytest.mark.parametrize("micro_batch", [0, 2])
def test_gradients_carry_the_factor_of_the_scaler(whole, micro_batch):
    config = make_config(**CASES["swin"])
    config = replace(config, train=replace(config.train, micro_batch=micro_batch, length_groups=3))
    net = model(config)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loss, *_ = compute_gradients(method_of(net, config), batch_of(config), scaler)
    got = {f"grad.{name}": p.grad / 1024 for name, p in net.named_parameters() if p.requires_grad}
    expected = {name: v for name, v in whole["swin"].items() if name in got}
    assert loss.item() == pytest.approx(whole["swin"]["loss.total"].item(), rel=1e-9)
    assert_alike(got, expected)


@pytest.mark.parametrize("case", CASES)
def test_half_precision_in_pieces_has_all_gradients(case):
    """bfloat16 rounds pieces otherwise than the whole, but to its two digits they agree."""
    got = []
    for micro_batch in (0, 3):
        config = make_config(**CASES[case])
        train = replace(config.train, micro_batch=micro_batch, precision="bf16")
        config = replace(config, train=train)
        net = model(config, torch.float32)
        loss, *_ = compute_gradients(method_of(net, config), batch_of(config))
        assert loss.dtype == torch.float32
        got.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]))
    assert torch.nn.functional.cosine_similarity(*got, dim=0) > 0.98


def test_large_gradients_are_no_broken_ones():
    """AdamW does not care how large they are; the square of one is beyond float32."""
    weight = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(weight.parameters(), fused=True)
    off = torch.amp.GradScaler("cpu", enabled=False)
    for value, broken in ((1e20, 0.0), (float("inf"), 1.0), (float("nan"), 1.0)):
        before = weight.weight.detach().clone()
        for p in weight.parameters():
            p.grad = torch.full_like(p, 1.0)
        weight.weight.grad[0, 0] = value
        assert apply_gradients(weight, optimizer, off, torch.tensor(1.0)).tolist() == [broken, 1.0]
        assert torch.equal(weight.weight, before) == bool(broken)


def test_batch_norm_without_checkpointing_cannot_be_cut(monkeypatch):
    config = make_config(**CASES["resnet"])
    config = replace(config, train=replace(config.train, micro_batch=1))
    net = model(config)

    def refuse(enable=True):
        assert not enable, "gradient checkpointing not supported"

    monkeypatch.setattr(net.image_tower.model, "set_grad_checkpointing", refuse)
    with pytest.raises(ParamsError, match=r"train\.micro_batch: ResNet has BatchNorm.*set 0"):
        compute_gradients(method_of(net, config), batch_of(config))


def test_a_batch_norm_of_timm_is_refused_on_the_cpu():
    net = timm.create_model("efficientnet_b0", num_classes=0)
    with pytest.raises(ParamsError, match=r"BatchNormAct2d cannot be synchronised on the CPU"):
        synchronise_batch_norm(net, CPU)
    assert RESNET.name == "resnet50"  # whose BatchNorm is torch's


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_compute_what_one_does(ranks, whole, world):
    """Kept for last: the processes ran beside the other tests."""
    running, folder = ranks
    said = running[world].communicate(timeout=300)[0]
    assert running[world].returncode == 0, said[-3000:]
    for case in CASES:
        for micro_batch in (0, 1):
            for rank in range(world):
                assert_alike(torch.load(folder / f"{case}-{world}-{micro_batch}-{rank}.pt"), whole[case])
        alone = validated(case)
        assert [torch.load(folder / f"valid-{case}-{world}-{rank}.pt") for rank in range(world)] == [alone] * world
    single = step("resnet", dtype=torch.float32)
    for rank in range(world):
        got = torch.load(folder / f"float32-{world}-0-{rank}.pt")
        assert got["loss.total"].item() == pytest.approx(single["loss.total"].item(), rel=1e-5)
        a, b = (torch.cat([v.flatten() for n, v in x.items() if n.startswith("grad.")]) for x in (got, single))
        assert (a - b).norm() < 1e-4 * b.norm()


@pytest.mark.parametrize("case", [*CASES, "mixed"])
def test_two_processes_in_half_precision_agree_with_one_in_single(ranks, case):
    """Under autocast in bfloat16, BatchNorm over both: to its two digits. By the first two processes."""
    running, folder = ranks
    assert running[2].wait(timeout=300) == 0
    kinds = mixed_steps.CASES["three to one"]
    whole = (
        mixed_steps.step(mixed_steps.batch_of(mixed_steps.samples(kinds)), **HALF)
        if case == "mixed"
        else step(case, **HALF)
    )
    for rank in range(2):
        got = torch.load(folder / f"half-{case}-{rank}.pt")
        assert got.keys() == whole.keys() and got["loss.total"].dtype == torch.float32
        assert got["loss.total"].item() == pytest.approx(whole["loss.total"].item(), rel=0.02)
        a, b = (torch.cat([v.double().flatten() for n, v in x.items() if n[:5] == "grad."]) for x in (got, whole))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98
        assert all(v.dtype == torch.float32 for n, v in got.items() if "running" in n)


@pytest.mark.parametrize("case", mixed_steps.CASES)
def test_two_processes_compute_what_one_does_with_mixed_data(ranks, case):
    """Unequal numbers of pairs, images, texts; or none. By the first two processes."""
    running, folder = ranks
    assert running[2].wait(timeout=300) == 0
    whole = mixed_steps.step(mixed_steps.batch_of(mixed_steps.samples(mixed_steps.CASES[case])))
    for rank in range(2):
        got = torch.load(folder / f"mixed-{case}-{rank}.pt")
        assert_alike(got, whole)
        for name in (n for n in whole if n.startswith("loss.")):
            assert got[name].item() == pytest.approx(whole[name].item(), rel=1e-9, abs=1e-12), name
