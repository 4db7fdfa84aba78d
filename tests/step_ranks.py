"""One step of a tiny model by several processes: python -m tests.step_ranks FOLDER WORLD PORT (see test_step.py)."""

import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import timm  # noqa: F401  imported before the fork
import torch
import torch.distributed as dist
import transformers  # noqa: F401

from pipeline.config.run_config import RunConfig
from pipeline.models.cxr_clip import CxrClip
from pipeline.training.batches import Batch, Collate, StudyDraw
from pipeline.training.distributed import Process
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.methods.declip import DeclipMethod, Heads, Learner, SimSiam
from pipeline.training.step import compute_gradients
from pipeline.training.validation import Validation
from tests import mixed_steps
from tests.conftest import BERT, RESNET, SWIN, make_config
from tests.mixed_steps import Ids

STUDIES = 8
HALF = {"dtype": torch.float32, "precision": "bf16"}  # autocast, which the CPU has for bfloat16
WORDS = 50
DROPPING = {**BERT.args, "num_hidden_layers": 2, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
CASES = {  # BatchNorm, and BERT, whose attention is a function; drop path, and RoFormer, whose attention is modules
    "resnet": {
        "image_encoder": replace(RESNET, args={**RESNET.args, "zero_init_last": False, "drop_path_rate": 0.2}),
        "text_encoder": replace(BERT, args={**DROPPING, "model_type": "bert"}),
        "loss": {"label_smoothing": 0.1},
    },
    "swin": {
        "image_encoder": replace(
            SWIN, args={**SWIN.args, "drop_path_rate": 0.3, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1}
        ),
        "text_encoder": replace(BERT, args=DROPPING),
    },
    "declip": {
        "text_encoder": replace(BERT, args=DROPPING),
        "loss": {
            **{"mvs_weight": 0.4, "icl_weight": 0.0, "nn_weight": 0.2, "simsiam_weight": 0.3, "mlm_weight": 0.1},
            **{"queue": 20, "mlm_rate": 0.3, "label_positives": True},
        },
    },
}


def samples(config: RunConfig, count: int = STUDIES) -> list[StudyDraw]:
    """Draws of two images and two texts of 3 to 20 tokens."""
    rng = np.random.default_rng(5)
    made = []
    for place in range(count):
        images = list(rng.integers(0, 256, (2, config.image_size, config.image_size), dtype=np.uint8))
        texts = [" ".join(map(str, rng.integers(1, WORDS, rng.integers(3, 21)))) for _ in range(2)]
        made.append(StudyDraw(images, texts, place, int(rng.integers(2**62)), labels=place % 5))
    return made


def batch_of(config: RunConfig, rank: int = 0, world: int = 1) -> Batch:
    return collate_of(config)(samples(config)[rank::world])


def collate_of(config: RunConfig) -> Collate:
    """What the loader of the run's method makes of draws."""
    return method_of(model(config), config).collate


def model(config: RunConfig, dtype: torch.dtype = torch.float64) -> CxrClip | Learner:
    """With terms of DeCLIP the queue remembers 15 texts, so that those of a step wrap around."""
    torch.manual_seed(3)
    net = CxrClip(config, WORDS)
    if not config.loss.nn_weight:
        return net.to(dtype).train()
    heads = Heads(net, config)
    heads.simsiam = SimSiam(config.dim, 32, 16)
    heads.queue.push(torch.nn.functional.normalize(torch.randn(15, config.dim)))
    return Learner(net, heads).to(dtype).train()


def method_of(net: CxrClip | Learner, config: RunConfig, rank: int = 0, world: int = 1) -> CxrClipMethod | DeclipMethod:
    kind = DeclipMethod if isinstance(net, Learner) else CxrClipMethod
    return kind(net, Ids(), config, Process(torch.device("cpu"), rank, world))


def step(
    case: str,
    rank: int = 0,
    world: int = 1,
    micro_batch: int = 0,
    groups: int = 3,
    dtype: torch.dtype = torch.float64,
    precision: str = "fp32",
) -> dict[str, torch.Tensor]:
    """Loss, parts, gradients and buffers after one step, by name."""
    config = make_config(**CASES[case])
    train = replace(config.train, micro_batch=micro_batch, length_groups=groups, precision=precision)
    config = replace(config, train=train)
    net = model(config, dtype)
    loss, parts, _ = compute_gradients(method_of(net, config, rank, world), batch_of(config, rank, world))
    got = {f"loss.{name}": value for name, value in {"total": loss, **parts}.items()}
    got |= {f"grad.{name}": p.grad for name, p in net.named_parameters() if p.requires_grad}
    return got | {
        f"buffer.{name}": b
        for name, b in net.named_buffers()
        if "running" in name or "tracked" in name or "queue" in name
    }


def validated(case: str, rank: int = 0, world: int = 1) -> float:
    """Validation loss of an untrained model over sets of 21, 5 and 1 studies, in batches of 8."""
    config = make_config(**CASES[case])
    sets = [samples(config, count) for count in (21, 5, 1)]  # places and draws are all it asks of a set
    return Validation(method_of(model(config), config, rank, world), sets, config).loss()


def rank_of(folder: Path, rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    for case in CASES:
        for micro_batch in (0, 1):
            torch.save(step(case, rank, world, micro_batch), folder / f"{case}-{world}-{micro_batch}-{rank}.pt")
        torch.save(validated(case, rank, world), folder / f"valid-{case}-{world}-{rank}.pt")
    torch.save(step("resnet", rank, world, dtype=torch.float32), folder / f"float32-{world}-0-{rank}.pt")
    for case in CASES if world == 2 else ():
        torch.save(step(case, rank, world, **HALF), folder / f"half-{case}-{rank}.pt")
    if world == 2:
        share = mixed_steps.batch_of(mixed_steps.samples(mixed_steps.CASES["three to one"]), rank, world)
        torch.save(mixed_steps.step(share, rank, world, **HALF), folder / f"half-mixed-{rank}.pt")
    for case, kinds in mixed_steps.CASES.items() if world == 2 else ():
        share = mixed_steps.batch_of(mixed_steps.samples(kinds), rank, world)
        torch.save(mixed_steps.step(share, rank, world), folder / f"mixed-{case}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    folder, world, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    os.environ["OMP_NUM_THREADS"] = "1"
    ranks = [
        multiprocessing.get_context("fork").Process(target=rank_of, args=(folder, rank, world, port))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))
