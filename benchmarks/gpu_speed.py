"""Parts of the check for a GPU that take time: steps of every kind, the loop, evaluation."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_setting import Setting, must, optimizer_of, take_step, unscaled, wait, waits
from benchmarks.step import padded_whole, release_loss
from pipeline.config.params import Augment, FineTune, ImageEncoder, MixedModel
from pipeline.config.run_config import NOT_MIXED, Roles, RunConfig
from pipeline.evaluation.embed import embedder_of
from pipeline.evaluation.fine_tune import evaluation_pictures, fine_tune
from pipeline.evaluation.labelled import Labelled
from pipeline.models import encoders, keyed_dropout
from pipeline.models.keyed_dropout import Rows
from pipeline.storage.index import write_studies
from pipeline.training import loop, resume
from pipeline.training.corpus import write_corpus
from pipeline.training.distributed import Process
from pipeline.training.methods import method_of
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.throughput import peak


def speed(s: Setting) -> dict[str, Any]:
    """Of a step on ready batches: our ways, and the release's in the same run."""
    half, config = s.half, s.config(s.half)
    ways: dict[str, RunConfig] = {
        half: config,
        **({"fp16": s.config("fp16"), "fp32": s.config()} if s.device.type == "cuda" else {}),
        "no_dropout": s.config(half, dropout=0.0),
        "groups_8": s.config(half, length_groups=8),
        "b_16": s.config(half, batch_size=min(16, s.batch)),
        "compiled": s.config(half, compile=not s.tiny),
    }
    found: dict[str, Any] = {}
    for way, run in ways.items():
        found[way] = _timed(s, s.method(run), run)
    if s.device.type == "cuda":
        with mock.patch.object(keyed_dropout, "is_fused", lambda *_: False):
            found["attention_apart"] = _timed(s, s.method(config), config)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False):
            found["untimed_convolutions"] = _timed(s, s.method(config), config)
        exact = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            found["tf32"] = _timed(s, s.method(s.config()), s.config())
        finally:
            torch.set_float32_matmul_precision(exact)
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
    optimizer = optimizer_of(method)
    scaler = torch.amp.GradScaler(s.device.type, enabled=config.train.precision == "fp16")

    def step() -> None:
        if release:
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(release_loss(method.net, batch, config)).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            take_step(method, optimizer, scaler, batch)

    for _ in range(1 if s.tiny else 3):
        step()
    if s.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    spent, cpu = [], time.process_time()
    count = 2 if s.tiny else 10
    for _ in range(count):
        wait(s)
        start = time.perf_counter()
        step()
        wait(s)
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
    config = s.config(s.half)
    swin = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4} if s.tiny else {}
    name = "swin_tiny_patch4_window7_224"
    means = (0.5,) * 3
    terms: dict[str, Any] = {
        "mvs_weight": 0.4,
        "nn_weight": 0.2,
        "simsiam_weight": 0.2,
        "mlm_weight": 0.2,
        "icl_weight": 0.0,
    }
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
        torch.manual_seed(0)
        method = method_of(of, s.words(of), Process(s.device))  # type: ignore[arg-type]
        method.learner.train()
        batch = method.collate(s.draws(of))
        optimizer, off, spent = optimizer_of(method), unscaled(s), []
        for _ in range(2 if s.tiny else 6):
            wait(s)
            start = time.perf_counter()
            loss = take_step(method, optimizer, off, batch)
            wait(s)
            spent.append(time.perf_counter() - start)
        must(bool(loss.isfinite()), f"the loss of {run} is {float(loss)}")
        found[run] = {"ms": round(1000 * min(spent), 2), "loss": round(float(loss), 4)}
        found[run]["waits_a_step"] = waits(s, method, batch)
    return found


def training(s: Setting) -> dict[str, Any]:
    """The loop with its loader: undisturbed, and stopped by SIGTERM and taken up again."""
    config = s.config(s.half, epochs=2, batch_size=min(16, s.batch), save_minutes=60.0)
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
    must(abs(again - best) < 0.05 * best, f"taken up again it ends at {again}, undisturbed at {best}")
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
    embedder = embedder_of(net, s.words(config), config.image_size)  # type: ignore[arg-type]
    embedder = replace(embedder, workers=s.workers)
    found: dict[str, Any] = {}
    for name, encode in (("embed", embedder.encode_images), ("features", embedder.features)):
        start = time.perf_counter()
        rows = embedder.over(encode, views)
        found[f"{name}_per_second"] = round(len(views) / (time.perf_counter() - start), 1)
        must(bool(np.isfinite(rows).all()), f"{name} are not finite")
    splits = {"train": s.studies[:32], "valid": s.studies[32:48], "test": s.studies[48:]}
    rng = np.random.default_rng(0)
    labels = {split: rng.random((len(of), 2)) < 0.5 for split, of in splits.items()}
    data = Labelled("made up", ("a", "b"), splits, labels)
    valid = evaluation_pictures(data, "valid", config.image_size).to(s.device)
    start = time.perf_counter()
    options = FineTune(lr=1e-4, batch_size=16)
    fine_tune(net.image_tower, data, np.arange(32), valid, config.image_size, Augment(), 3, options, 64, 0, s.workers)
    wait(s)
    return found | {"fine_tune_per_second": round(3 * 32 / (time.perf_counter() - start), 1)}
