"""Everything a first GPU has to prove, in minutes: python -m benchmarks.gpu

Each part has a deadline of its own and ends with a JSON line; the last line is all of them. A part that fails says why
and the others go on; the exit status is then 1. On data it makes itself, without DVC and MLflow.

    environment   versions, the device, what torch was built for
    masks         keyed dropout has the same bits as on the CPU
    precision     steps in bf16 and fp16 against fp32; micro-batches against the whole; a scale of 2^40 comes down;
                  gradients that are not finite end a training; Python waits for the device once a step at most
    collectives   each one we use, and a DDP step, over one process
    speed         ms, studies/s, kernels, CPU ms, peak GB and MFU of a step at the paper's size and batch: bf16, fp16,
                  torch's own dropout, compiled, 8 length groups, 16 studies, and the release's way
    methods       Swin-Tiny, DeCLIP and mixed
    training      the loop with workers from shards, stopped by SIGTERM and taken up again
    evaluation    embeddings, a probe's features, fine-tuning

With --device cpu --tiny all of it runs on small models on the CPU, where the figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.step import (
    BERT_BASE,
    MEDIAN,
    SHORT_SIDE,
    VOCABULARY,
    Words,
    made_up_studies,
    padded_whole,
    release_loss,
)
from pipeline.config.load import load_params
from pipeline.config.params import Augment, FineTune, ImageEncoder, MixedModel, TextEncoder
from pipeline.config.run_config import NOT_MIXED, Roles, RunConfig, run_config
from pipeline.evaluation.embed import embedder_of
from pipeline.evaluation.fine_tune import evaluation_pictures, fine_tune
from pipeline.evaluation.labelled import Labelled
from pipeline.models import encoders
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.dropout_kernel import keyed_dropout
from pipeline.models.keyed_dropout import Rows
from pipeline.models.keyed_random import stream_seeds
from pipeline.storage.index import write_studies
from pipeline.study import Study
from pipeline.training import loop, resume
from pipeline.training.batches import StudyDraw, TrainingSet
from pipeline.training.corpus import write_corpus
from pipeline.training.distributed import Process, gathered, summed
from pipeline.training.methods import method_of
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.step import apply_gradients, compute_gradients
from pipeline.training.throughput import peak

DEADLINES = {  # seconds
    **{"environment": 20, "masks": 40, "precision": 80, "collectives": 40},
    **{"speed": 150, "methods": 60, "training": 60, "evaluation": 60},
}
LARGE = ((6, 33, 768), (6, 12, 255, 255), (384, 3, 49, 49), (6, 512))  # shapes of layers whose masks are compared
SPECIAL, MASK = [0, 1, 2, 3], 3  # ids of the made-up tokenizer that are no words, the last of them [MASK]


@dataclass(frozen=True)
class Setting:
    """What all parts share: the device, whether models are tiny, made-up studies and processes of the loader."""

    device: torch.device
    tiny: bool
    studies: list[Study]
    workers: int
    folder: Path

    @property
    def batch(self) -> int:
        """Studies of a step: the paper's 128."""
        return 8 if self.tiny else 128

    def config(self, precision: str = "fp32", dropout: float = 0.1, **train: Any) -> RunConfig:
        """The paper's ResNet-50 and BERT-base with random weights; tiny ones instead."""
        config = run_config(load_params(Path("profiles/demo.yaml")), "resnet_m")
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        text = replace(config.text_encoder, args={"model_type": "bert", **config.text_encoder.args, **drops})
        if not self.tiny:
            bert = {"model_type": "bert", **BERT_BASE, **drops}
            text = TextEncoder("", VOCABULARY["paper"], bert, 256)
            config = replace(config, image_encoder=ImageEncoder("resnet50", False), image_size=224)
        options = {"batch_size": self.batch, "length_groups": 4, "precision": precision, **train}
        options |= {"device": self.device.type, "workers": self.workers}
        return replace(config, text_encoder=text, train=replace(config.train, **options))

    def words(self, config: RunConfig) -> Words:
        """A tokenizer that has nothing to look up."""
        return Words(config.text_encoder.vocabulary, config.text_encoder.max_tokens)

    def draws(self, config: RunConfig) -> list[StudyDraw]:
        """Those of one step."""
        data = TrainingSet(self.studies, {}, config)
        return [data[0, i % len(data)] for i in range(config.train.batch_size)]

    def method(self, config: RunConfig) -> CxrClipMethod:
        """CXR-CLIP with weights by a seed, on the device."""
        torch.manual_seed(0)
        net = CxrClip(config, config.text_encoder.vocabulary).train()
        return CxrClipMethod(net, self.words(config), config, Process(self.device))  # type: ignore[arg-type]


# ---- parts


def environment(s: Setting) -> dict[str, Any]:
    """What the figures were measured on."""
    names = ("torch", "transformers", "timm", "numpy", "opencv-python-headless", "triton")
    found: dict[str, Any] = {name: version(name) for name in names}
    found |= {"python": sys.version.split()[0], "cores": os.cpu_count(), "device": s.device.type}
    shared = os.statvfs("/dev/shm")
    found["shm_gb"] = round(shared.f_frsize * shared.f_blocks / 2**30, 2)
    if s.device.type == "cuda":
        about = torch.cuda.get_device_properties(s.device)
        found |= {"name": about.name, "memory_gb": round(about.total_memory / 2**30, 1)}
        found |= {"capability": f"sm_{about.major}{about.minor}", "kernels": torch.cuda.get_arch_list()}
        found |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def masks(s: Setting) -> dict[str, Any]:
    """Values and gradients of keyed dropout on the device and on the CPU, bit for bit."""
    seeds = stream_seeds(torch.arange(6) * 12345)
    compared = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((6, 33, 96), (6, 2, 65, 65), (24, 3, 49, 49), (6, 512)) if s.tiny else LARGE:
            for whole_rows in (False, True):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                found = []
                for device in (torch.device("cpu"), s.device):
                    on = x.to(device, copy=True).requires_grad_()
                    y = keyed_dropout(on, seeds.to(device), 0.1, whole_rows)
                    y.backward(torch.ones_like(y))
                    assert on.grad is not None
                    found.append((y.detach().cpu(), on.grad.cpu()))
                _must(all(map(torch.equal, *found)), f"{dtype} {shape} whole_rows={whole_rows} differs")
                compared += 2 * x.numel()
    return {"values": compared, "equal": True}


def precision(s: Setting) -> dict[str, Any]:
    """Correctness of a step: see the head of this module."""
    small = {"batch_size": min(16, s.batch), "length_groups": 2}
    config = s.config(**small)
    batch = s.method(config).collate(s.draws(config))
    gradients: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    ways: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}, "pieces": {"micro_batch": 4}}
    if s.device.type == "cuda":
        ways["fp16"] = {"precision": "fp16"}
    for way, train in ways.items():
        method = s.method(s.config(**{**small, **train}))
        scaler = torch.amp.GradScaler(s.device.type, enabled=way == "fp16", init_scale=1024.0)
        losses[way] = float(compute_gradients(method, batch, scaler)[0])
        flat = [p.grad.flatten().float() for p in method.net.parameters() if p.grad is not None]
        gradients[way] = torch.cat(flat).double().cpu() / (1024 if way == "fp16" else 1)
    found: dict[str, Any] = {}
    for way in (w for w in ways if w != "fp32"):
        found[f"cosine_{way}"] = round(
            float(nn.functional.cosine_similarity(gradients[way], gradients["fp32"], dim=0)), 6
        )
        found[f"loss_{way}"] = round(losses[way] / losses["fp32"] - 1, 6)
    limit = 0.8 if s.tiny else 0.999  # BatchNorms of a tiny model are over few values
    _must(
        all(value > limit for name, value in found.items() if name.startswith("cosine")), f"gradients differ: {found}"
    )
    found |= _scaler(s, small, batch)
    method = s.method(config)
    optimizer = _optimizer(method)
    loss, *_ = compute_gradients(method, batch)
    method.net.log_scale.grad = torch.full_like(method.net.log_scale, float("nan"))
    before = [p.detach().clone() for p in method.net.parameters()]
    broken = float(apply_gradients(method.net, optimizer, _off(s), loss)[0])
    kept = all(map(torch.equal, before, method.net.parameters()))
    _must(broken > 0 and kept, "a gradient that is not finite was not seen, or reached the weights")
    return found | {"nan_seen": True, "waits_a_step": _waits(s, small, batch)}


def _scaler(s: Setting, small: dict[str, Any], batch: Any) -> dict[str, Any]:
    """Steps that a scale of 2^40 takes to come down to one that fits."""
    method = s.method(s.config(**small, precision="fp16" if s.device.type == "cuda" else "fp32"))
    optimizer, scaler = _optimizer(method), torch.amp.GradScaler(s.device.type, init_scale=2.0**40)
    scales = [2.0**40]
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        loss, *_ = compute_gradients(method, batch, scaler)
        scales.append(float(apply_gradients(method.net, optimizer, scaler, loss)[1]))
        if scales[-1] == scales[-2]:
            break
    _must(scales[-1] == scales[-2] and np.isfinite(float(loss)), "the scale never settled")
    return {"scale_settled_at": scales[-1], "skipped": len(scales) - 2}


def _waits(s: Setting, small: dict[str, Any], batch: Any) -> float:
    """How often a step makes Python wait for the device, as torch's own check counts."""
    if s.device.type != "cuda":
        return 0.0
    method = s.method(s.config(**small, precision="bf16"))
    optimizer, off, steps = _optimizer(method), _off(s), 4
    on = batch.to(s.device)
    _step(method, optimizer, off, on)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(steps):
                _step(method, optimizer, off, on)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(w.message) for w in said) / steps
    _must(waits <= 1, f"Python waits {waits} times a step: {[str(w.message)[:200] for w in said][:3]}")
    return waits


def collectives(s: Setting) -> dict[str, Any]:
    """One process: what NCCL (gloo on the CPU) makes of each collective we use, and of DDP."""
    backend, port = ("nccl" if s.device.type == "cuda" else "gloo"), 29500 + os.getpid() % 1000
    own = s.device if s.device.type == "cuda" else None
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=own)
    try:
        x = torch.randn(4, 8, device=s.device, requires_grad=True)
        both = gathered(x)[0] + summed(x)
        both.sum().backward()
        _must(
            torch.equal(both.detach(), 2 * x.detach()) and bool((x.grad == 2).all()), "a collective changed its input"
        )
        config = s.config(batch_size=min(16, s.batch))
        method = s.method(config)
        batch = method.collate(s.draws(config))
        alone = float(compute_gradients(method, batch)[0])
        method.module = nn.parallel.DistributedDataParallel(method.net, broadcast_buffers=False)
        method.net.zero_grad(set_to_none=True)
        loss = float(compute_gradients(method, batch)[0])
        _must(abs(loss - alone) < 1e-3 * abs(alone), f"DDP's loss is {loss}, without it {alone}")
        return {"backend": backend, "ddp_loss": round(loss, 5)}
    finally:
        dist.destroy_process_group()


def speed(s: Setting) -> dict[str, Any]:
    """Of a step on ready batches: our ways, and the release's in the same run."""
    half = "bf16" if s.device.type == "cuda" else "fp32"
    ways: dict[str, RunConfig] = {
        half: s.config(half),
        **({"fp16": s.config("fp16")} if s.device.type == "cuda" else {}),
        "no_dropout": s.config(half, dropout=0.0),
        "groups_8": s.config(half, length_groups=8),
        "b_16": s.config(half, batch_size=min(16, s.batch)),
        "compiled": s.config(half, compile=not s.tiny),
    }
    found: dict[str, Any] = {}
    for way, config in ways.items():
        found[way] = _timed(s, s.method(config), config)
    config = s.config(half)
    with mock.patch.object(encoders, "draw_by_study", lambda *_: Rows()):  # dropout stays torch's own
        theirs = s.method(config)
    found["torch_dropout"] = _timed(s, theirs, config)
    found["release"] = _timed(s, theirs, config, release=True)
    best = found[half]["ms"]
    found["step_ratio"] = round(found["release"]["ms"] / best, 3)
    found["dropout_share"] = round(1 - found["torch_dropout"]["ms"] / best, 3)
    return found


def _timed(s: Setting, method: CxrClipMethod, config: RunConfig, release: bool = False) -> dict[str, Any]:
    """Figures of a step on one ready batch; the median of 10 after 3 that warm up."""
    batch = method.collate(s.draws(config)).to(s.device)
    if release:
        batch = padded_whole(batch, config.text_encoder.max_tokens)
    optimizer, scaler = (
        _optimizer(method),
        torch.amp.GradScaler(s.device.type, enabled=config.train.precision == "fp16"),
    )

    def step() -> None:
        if release:
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(release_loss(method.net, batch, config)).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            _step(method, optimizer, scaler, batch)

    for _ in range(1 if s.tiny else 3):
        step()
    if s.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent, cpu = [], time.process_time()
    count = 2 if s.tiny else 10
    for _ in range(count):
        _wait(s)
        start = time.perf_counter()
        step()
        _wait(s)
        spent.append(time.perf_counter() - start)
    seconds = statistics.median(spent)
    found = {"ms": round(1000 * seconds, 2), "studies_per_second": round(config.train.batch_size / seconds, 1)}
    found["cpu_ms"] = round(1000 * (time.process_time() - cpu) / count, 1)
    if s.device.type == "cuda":
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        found["kernels"] = _kernels(step)
        top = peak(s.device, config.train.precision)
        if top and not release:
            found["mfu"] = round(method.meter()(batch) / seconds / top, 4)
    return found


def _kernels(step: Callable[[], None]) -> int:
    """Kernels that a step starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())


def methods(s: Setting) -> dict[str, Any]:
    """A step of Swin-Tiny, of DeCLIP and of a mixed run."""
    half = "bf16" if s.device.type == "cuda" else "fp32"
    config = s.config(half)
    swin = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4} if s.tiny else {}
    name = "swin_tiny_patch4_window7_224"
    means = (0.5,) * 3
    terms = {"mvs_weight": 0.4, "nn_weight": 0.2, "simsiam_weight": 0.2, "mlm_weight": 0.2, "icl_weight": 0.0}
    mixed = {**NOT_MIXED, "regeneration_weight": 5.0, "mlm_weight": 0.2, "alignment_weight": 1.0}
    sizes = (8, 1, 32, 2, 2) if s.tiny else (16, 1, 768, 12, 12)
    runs = {
        "swin": replace(config, image_encoder=ImageEncoder(name, False, means, means, swin)),
        "declip": replace(config, loss=replace(config.loss, **terms)),
        "mixed": replace(
            config,
            image_encoder=None,
            mixed=MixedModel(*sizes, 0.5),
            roles=Roles(("mimic_cxr",), (), (), 1.0),
            loss=replace(config.loss, **mixed),
        ),
    }
    found: dict[str, Any] = {}
    for run, of in runs.items():
        words = self_made(s.words(of))
        torch.manual_seed(0)
        method = method_of(of, words, Process(s.device))
        method.learner.train()
        batch = method.collate(s.draws(of))
        optimizer, off, spent = _optimizer(method), _off(s), []
        for _ in range(2 if s.tiny else 6):
            _wait(s)
            start = time.perf_counter()
            loss = _step(method, optimizer, off, batch)
            _wait(s)
            spent.append(time.perf_counter() - start)
        _must(bool(loss.isfinite()), f"the loss of {run} is {float(loss)}")
        found[run] = {"ms": round(1000 * min(spent), 2), "loss": round(float(loss), 4)}
    return found


def training(s: Setting) -> dict[str, Any]:
    """The loop with its loader: undisturbed, and stopped by SIGTERM and taken up again."""
    half = "bf16" if s.device.type == "cuda" else "fp32"
    config = s.config(half, epochs=2, batch_size=min(16, s.batch), save_minutes=60.0)
    config = replace(config, text_encoder=replace(config.text_encoder, vocabulary=2000), datasets=("mimic_cxr",))
    split = [replace(study, split="valid" if n % 4 == 3 else "train") for n, study in enumerate(s.studies)]
    write_studies(s.folder / "index" / "mimic_cxr.parquet", split)
    write_corpus(config, s.folder / "index", s.folder / "prompts", s.folder / "corpus")
    told: list[dict[str, float]] = []

    def train(name: str) -> float:
        out = s.folder / name
        places = out / "model", out / "history.csv", out / "work"
        return loop.train_run(s.folder / "corpus", *places, lambda row, _: told.append(row))

    best = train("whole")
    rows = [row for row in told if "valid_loss" in row]
    timer = threading.Timer(0.5 * sum(row["seconds"] for row in rows) + 0.5, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        train("stopped")
        stopped = False  # it was too fast
    except resume.Stopped:
        stopped = True
    timer.cancel()
    again = train("stopped")
    _must(abs(again - best) < 0.05 * best, f"taken up again it ends at {again}, undisturbed at {best}")
    last = rows[-1]
    return {"valid_loss": round(best, 4), "again": round(again, 4), "stopped": stopped} | {
        name: round(last[name], 4) for name in ("studies_per_second", "waiting")
    }


def evaluation(s: Setting) -> dict[str, Any]:
    """Embeddings, a probe's features and fine-tuning, in images a second."""
    config = s.config()
    method = s.method(config)
    net = method.net.eval()
    views = [view for study in s.studies for view in study.views]
    embedder = embedder_of(net, self_made(s.words(config)), config.image_size)
    found: dict[str, Any] = {}
    for name, encode in (("embed", net.encode_image), ("features", net.image_tower)):
        start = time.perf_counter()
        rows = embedder.over(encode, views, embedder.prepare_at)
        found[f"{name}_per_second"] = round(len(views) / (time.perf_counter() - start), 1)
        _must(bool(np.isfinite(rows).all()), f"{name} are not finite")
    splits = {"train": s.studies[:32], "valid": s.studies[32:48], "test": s.studies[48:]}
    rng = np.random.default_rng(0)
    labels = {split: rng.random((len(of), 2)) < 0.5 for split, of in splits.items()}
    data = Labelled("made up", ("a", "b"), splits, labels)
    valid = evaluation_pictures(data, "valid", config.image_size).to(s.device)
    start = time.perf_counter()
    options = FineTune(lr=1e-4, batch_size=16)
    fine_tune(net.image_tower, data, np.arange(32), valid, config.image_size, Augment(), 3, options, 64, 0, s.workers)
    _wait(s)
    return found | {"fine_tune_per_second": round(3 * 32 / (time.perf_counter() - start), 1)}


PARTS: tuple[Callable[[Setting], dict[str, Any]], ...] = (
    *(environment, masks, precision, collectives),
    *(speed, methods, training, evaluation),
)


# ---- helpers


def self_made(words: Words) -> Any:
    """``Words`` with what a method asks of a real tokenizer."""
    words.tokenizer = type("Special", (), {"mask_token_id": MASK, "all_special_ids": SPECIAL})()  # type: ignore[attr-defined]
    type(words).__len__ = lambda self: self.vocabulary  # type: ignore[attr-defined, method-assign]
    return words


def _optimizer(method: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(method.learner.parameters(), lr=1e-5, fused=True)


def _off(s: Setting) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(s.device.type, enabled=False)


def _step(method: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batch: Any) -> Tensor:
    """A step as the loop does it, but for reading its numbers."""
    optimizer.zero_grad(set_to_none=True)
    loss, *_ = compute_gradients(method, batch, scaler, lambda: [False, False])
    apply_gradients(method.learner, optimizer, scaler, loss)
    method.net.clamp_scale()
    return loss


def _wait(s: Setting) -> None:
    if s.device.type == "cuda":
        torch.cuda.synchronize()


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in here after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Run the parts that are asked for, all of them unless named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(part.__name__ for part in PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--workers", type=int, default=None, help="processes of the loader (8; with --tiny 1)")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - {part.__name__ for part in PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device(asked.device)
    workers = asked.workers if asked.workers is not None else 1 if asked.tiny else 8
    whole: dict[str, Any] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        size = "demo" if asked.tiny else "paper"
        studies = made_up_studies(Path(folder), MEDIAN[size], SHORT_SIDE[size])
        setting = Setting(device, asked.tiny, studies, workers, Path(folder))
        for part in (p for p in PARTS if not asked.parts or p.__name__ in asked.parts):
            start = time.perf_counter()
            try:
                with deadline(DEADLINES[part.__name__]):
                    found = part(setting)
            except Exception as error:  # of this part; the others go on
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            found["seconds"] = round(time.perf_counter() - start, 1)
            whole[part.__name__] = found
            print(json.dumps({part.__name__: found}), flush=True)
    failed = [name for name, found in whole.items() if "error" in found]
    print(json.dumps({**whole, "failed": failed, "seconds": round(time.perf_counter() - began, 1)}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
