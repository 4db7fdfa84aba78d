"""What trainings and evaluations say of a GPU that they cannot use. There is none here: torch is made to see some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import stages
from pipeline.config.devices import cuda_device, has_kernels
from pipeline.config.params import Train
from pipeline.config.records import ParamsError
from pipeline.evaluation.device import evaluation_autocast, evaluation_device
from pipeline.storage import memory
from pipeline.text.marian import choose_device
from pipeline.training import batches, distributed
from pipeline.training.batches import TrainingSet, ValidationSet
from pipeline.training.distributed import Process
from pipeline.training.validation import Validation
from tests.conftest import make_config, run_python

ROOT = Path(__file__).parents[1]
LOCKED = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # as torch 2.15 is built
CARDS = {
    "GTX 1080": ((6, 1), False),
    "V100": ((7, 0), False),
    "T4": ((7, 5), True),
    "A100": ((8, 0), True),
    "A40": ((8, 6), True),
    "L40": ((8, 9), True),  # of the generation of sm_86
    "H100": ((9, 0), True),
    "B200": ((10, 0), True),
    "RTX 5090": ((12, 0), True),
    "one of tomorrow": ((13, 0), True),  # compiled from compute_120 as it starts
}


@pytest.fixture
def see(monkeypatch):
    """Make torch see GPUs of one kind."""

    def seen(capability=(9, 0), count=2, built=tuple(LOCKED)):
        values = {
            **{"is_available": True, "device_count": count, "get_arch_list": list(built), "set_device": None},
            **{"get_device_capability": capability, "get_device_name": "A card"},
        }
        for name, value in values.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)

    return seen


@pytest.mark.parametrize("card", CARDS)
def test_which_cards_torch_has_kernels_for(card):
    capability, fits = CARDS[card]
    assert has_kernels(LOCKED, capability) is fits


def test_kernels_of_one_device_run_on_no_other():
    assert has_kernels(["sm_90a"], (9, 0)) and not has_kernels(["sm_90a"], (9, 1))
    assert has_kernels(["sm_100f"], (10, 3)) and not has_kernels(["sm_100f"], (12, 0))
    assert not has_kernels(["sm_86"], (8, 0)) and not has_kernels(["gfx90a"], (9, 0)) and not has_kernels([], (9, 0))


def test_a_card_without_kernels_is_one_line_wherever_work_starts(see):
    see((7, 0))
    says = (
        r": A card is sm_70, and torch \S+ has kernels for sm_75, .*, compute_120 alone; use another card, the CPU, or"
    )
    with pytest.raises(ParamsError, match="^train.launcher" + says):
        distributed.device_of(Train())
    with pytest.raises(ParamsError, match="^evaluate" + says):
        evaluation_device(0)
    with pytest.raises(ParamsError, match="^back_translation.device" + says):
        choose_device("auto")


def test_more_processes_than_devices_are_one_line(see, monkeypatch):
    see(count=2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ParamsError, match=r"train\.launcher: process 3 here has no CUDA device, torch sees 2; start 2 at"
    ):
        distributed.device_of(Train())
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.device_of(Train()) == torch.device("cuda", 1) == cuda_device(1, "x")


def test_what_make_repro_runs_side_by_side_takes_devices_in_turn(see, monkeypatch):
    """A process of torchrun goes by its rank all the same."""
    see(count=3)
    places = []
    for turn in ("0", "1", "4"):
        monkeypatch.setenv("CXR_TURN", turn)
        places.append((distributed.device_of(Train()).index, evaluation_device(0).index))
    assert places == [(0, 0), (1, 1), (1, 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distributed.device_of(Train()).index == 2


def test_make_numbers_what_it_runs_side_by_side(tmp_path):
    """By a stand-in for dvc, which waits for the other one."""
    dvc = tmp_path / "dvc"
    wait = f"until [ -e {tmp_path}/$((1 - CXR_TURN)) ]; do sleep .1; done"
    dvc.write_text(f"#!/bin/sh\ntouch {tmp_path}/$CXR_TURN; {wait}\n")
    dvc.chmod(0o755)
    rule = "both:\n\t@printf 'one \\ntwo \\n' | $(SHARED)"
    asked = ["make", f"--eval={rule}", "both", "JOBS=2", f"BIN={os.path.relpath(tmp_path, ROOT)}"]
    subprocess.run(asked, cwd=ROOT, check=True, timeout=60)
    assert {"0", "1"} <= {p.name for p in tmp_path.iterdir()}


def test_bfloat16_where_the_card_has_it(see):
    see((7, 5))
    with pytest.raises(ParamsError, match=r"train\.precision: A card does not compute in bf16.*set fp16"):
        distributed.device_of(Train(precision="bf16"))
    assert distributed.device_of(Train(precision="fp16")).type == "cuda"
    device = torch.device("cuda", 0)
    assert not evaluation_autocast(device)._enabled
    see((8, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        assert evaluation_autocast(device)._enabled and evaluation_autocast(device).fast_dtype == torch.bfloat16
    assert not evaluation_autocast(torch.device("cpu"))._enabled


@pytest.mark.parametrize(("device", "own"), [(torch.device("cuda", 1), torch.device("cuda", 1)), ("cpu", None)])
def test_a_process_group_knows_its_device(monkeypatch, device, own):
    asked = {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "rendezvous", lambda url: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: asked.update(how, backend=backend))
    for from_cpu, backend in ((False, "nccl"), (True, "cpu:gloo,cuda:nccl")):  # the second for mixed runs
        distributed.join(torch.device(device), Train(), from_cpu)
        assert asked["device_id"] == own and asked["backend"] == (backend if own else "gloo")


# memory


@pytest.fixture
def small(monkeypatch):
    """Shared memory as a container has it, 64 MB."""
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: SimpleNamespace(total=64 << 20))


def test_shared_memory_that_is_too_small_is_one_line(small, monkeypatch, tmp_path):
    memory.check_shared_memory(0, 1 << 40, "train.workers")
    memory.check_shared_memory(4, 4 << 20, "train.workers")  # 4 batches each
    says = r"train\.workers: 4 processes hold 80 MiB of batches ready, and /dev/shm has 64 MiB; lower it, or start"
    with pytest.raises(ParamsError, match=says):
        memory.check_shared_memory(4, 5 << 20, "train.workers")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ParamsError, match="hold 128 MiB"):
        memory.check_shared_memory(4, (4 << 20) + 1, "train.workers")
    monkeypatch.setattr(memory, "SHARED", tmp_path / "none")
    memory.check_shared_memory(4, 1 << 40, "train.workers")


def test_evaluation_starts_as_many_processes_as_have_room(small, monkeypatch, tmp_path):
    """4 batches each, in half of 64 MiB."""
    found = [memory.processes_that_fit(8, size << 20) for size in (1, 2, 8, 9)]
    assert found == [8, 4, 1, 0]
    monkeypatch.setenv("CXR_JOBS", "2")  # make repro runs two of these
    assert memory.processes_that_fit(8, 2 << 20) == 2
    monkeypatch.setattr(memory, "SHARED", tmp_path / "none")
    assert memory.processes_that_fit(8, 1 << 40) == 8


def test_a_loader_may_open_as_many_files_as_the_system_allows():
    code = "import resource as r; from pipeline.storage.memory import allow_many_files as a; n = r.RLIMIT_NOFILE; "
    code += "hard = r.getrlimit(n)[1]; r.setrlimit(n, (64, hard)); a(); print(r.getrlimit(n) == (hard, hard))"
    assert run_python(code) == "True\n"


def test_a_loader_looks_at_shared_memory_first(small, studies, prompts, monkeypatch):
    """At B = 128 and 224 pixels a batch has 14 MB: 8 processes hold 480 MB."""
    run = make_config(image_size=224, train={"batch_size": 128, "workers": 8})
    many = [s for s in studies if s.split == "train"] * 20
    with pytest.raises(ParamsError, match=r"train\.workers: 8 processes hold 4\d\d MiB"):
        batches.training_batches(TrainingSet(many, prompts, run), list, 0, 0, 1, 8)
    method = SimpleNamespace(process=Process(torch.device("cpu")), learner=torch.nn.Identity(), collate=list)
    with pytest.raises(ParamsError, match=r"train\.workers: 8 processes hold 4\d\d MiB"):
        Validation(method, [ValidationSet(many, prompts, run)], run).loss()


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("pretrain", "train.micro_batch (the result stays the same) or train.batch_size"),
        ("embed", "evaluate.batch_size"),
        ("few_shot", "evaluate.batch_size, or evaluate.few_shot.fine_tune.batch_size"),
    ],
)
def test_a_gpu_whose_memory_is_full_is_one_line(monkeypatch, stage, key):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.2 GiB "
            "is free. See documentation for Memory Management"
        )

    monkeypatch.setattr(sys, "argv", [stage, "resnet_m"])
    monkeypatch.setattr(stages, "keep_private", lambda: None)
    with pytest.raises(SystemExit) as ended:
        stages.run(stage, full)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert str(ended.value) == f"{stage} resnet_m: {said}; lower {key}"
