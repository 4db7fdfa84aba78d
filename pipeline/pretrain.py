"""Contrastive pre-training of one run (paper section 4.2): AdamW, warm-up, cosine, AMP, DDP, best by validation."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from pipeline import model as checkpoint
from pipeline.atomic import replacing
from pipeline.batches import Batch, TrainingSet, ValidationSet, training_batches, validation_batches
from pipeline.encoders import Tokenizer
from pipeline.losses import Embeddings, cxr_clip_loss
from pipeline.model import CxrClip
from pipeline.params import ParamsError, RunConfig, Train, read_run_config
from pipeline.prompts import Prompts, read_pools
from pipeline.schedule import warmup_cosine
from pipeline.study import Study, read_studies

HISTORY = (
    *("epoch", "step", "lr", "train_loss", "valid_loss", "mvs", "icl", "tcl"),
    *("scale", "studies_per_second", "seconds"),
)
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(corpus: Path, out: Path, history: Path, on_epoch: Callable[[dict[str, float], int], None]) -> float:
    """Train the run that ``corpus`` (see ``pipeline.corpus``) describes and keep its best model.

    Under ``torchrun`` every process trains on its share of each batch; negatives are gathered over all of them with
    gradients, so the batch of the parameters is the batch of the loss.

    Args:
        out: folder for model.safetensors, run.json and the tokenizer.
        history: csv file of ``HISTORY``, a row an epoch.
        on_epoch: called by rank 0 with each row and its epoch.

    Returns:
        The best validation loss.

    Raises:
        ParamsError: settings that do not go together. FloatingPointError: a loss that is not finite.
    """
    config = read_run_config(corpus / "run.json")
    device = _device(config.train)
    rank, world = _join_processes(device)
    if config.train.batch_size % world:
        raise ParamsError(f"train.batch_size: {config.train.batch_size} studies do not divide among {world} processes")
    _seed(config, device)
    prompts = {path.stem: read_pools(path) for path in sorted((corpus / "prompts").glob("*.json"))}
    training = read_studies(corpus / "studies.parquet", ("train",))
    validation = read_studies(corpus / "studies.parquet", ("valid",))
    tokenizer = Tokenizer.build(config.text_encoder, _texts(training, prompts))
    net = CxrClip(config, len(tokenizer)).to(device)
    if world > 1 and device.type == "cuda":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    module: nn.Module = DistributedDataParallel(net) if world > 1 else net
    data = TrainingSet(training, prompts, config)
    valid = [ValidationSet(validation.select(dataset=d), prompts, config) for d in config.datasets]
    steps = len(data) // config.train.batch_size
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True
    )
    warmup, total = round(config.train.warmup_epochs * steps), config.train.epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    if rank == 0:
        size = sum(p.numel() for p in net.parameters()) / 1e6
        print(
            f"{config.name}: {len(training)} studies, {size:.1f} M parameters, {world} x {device.type}, "
            f"{config.train.precision}, {config.train.epochs} epochs of {steps} steps"
        )
    best, rows = math.inf, []
    bar = tqdm(total=total, desc=config.name, unit="step", disable=rank != 0, mininterval=1)
    for epoch in range(config.train.epochs):
        start = time.perf_counter()
        net.train()
        sums: dict[str, float] = {}
        lr = 0.0
        for batch in training_batches(data, tokenizer, epoch, rank, world, config.train.workers):
            with _autocast(config.train, device):
                loss, parts = _loss(module, batch, config, device, world)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"{config.name}: the loss is {loss.item()} in epoch {epoch}; lower train.lr")
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            lr = float(schedule.get_last_lr()[0])
            scaler.step(optimizer)
            scaler.update()
            net.clamp_scale()
            schedule.step()
            for name, term in {"train_loss": loss, **parts}.items():
                sums[name] = sums.get(name, 0.0) + term.item()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
        seconds = time.perf_counter() - start
        row = {
            **{name: total / steps for name, total in sums.items()},
            "epoch": epoch,
            "step": (epoch + 1) * steps,
            "lr": lr,
            "valid_loss": validation_loss(net, valid, tokenizer, config, device),
            "scale": net.scale.item(),
            "studies_per_second": steps * config.train.batch_size / seconds,
            "seconds": seconds,
        }
        if rank == 0:
            rows.append(row)
            on_epoch(row, epoch)
            if row["valid_loss"] < best:
                checkpoint.save(net, tokenizer, config, out)
        best = min(best, row["valid_loss"])
    bar.close()
    if rank == 0:
        _write_history(history, rows)
    if world > 1:
        dist.destroy_process_group()
    if not math.isfinite(best):
        raise FloatingPointError(f"{config.name}: no epoch had a finite validation loss")
    return best


@torch.no_grad()
def validation_loss(
    net: CxrClip, sets: list[ValidationSet], tokenizer: Tokenizer, config: RunConfig, device: torch.device
) -> float:
    """The training objective on the fixed validation draws: mean over batches, then over the data sets that have
    any. Every rank computes all of it, so that all agree on the best epoch."""
    net.eval()
    means = []
    for data in sets:
        losses = []
        for batch in validation_batches(data, tokenizer):
            with _autocast(config.train, device):
                losses.append(_loss(net, batch, config, device, world=1)[0].item())
        if losses:
            means.append(sum(losses) / len(losses))
    if not means:
        raise ParamsError(f"runs.{config.name}.datasets: none has a validation split of two studies or more")
    return sum(means) / len(means)


def _loss(
    module: nn.Module, batch: Batch, config: RunConfig, device: torch.device, world: int
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs = (x.to(device, non_blocking=True) for x in (batch.images, batch.tokens, batch.mask))
    images, texts, scale = module(*inputs)
    parts: list[Tensor | None] = []
    for stacked in (images, texts):
        samples = list(stacked.split(batch.studies))
        if world > 1:
            samples = [torch.cat(all_gather(s)) for s in samples]
        parts += [samples[0], samples[1] if len(samples) > 1 else None]
    image1, image2, text1, text2 = parts
    assert image1 is not None and text1 is not None
    return cxr_clip_loss(Embeddings(image1, text1, image2, text2), scale, config.loss)


def _texts(studies: Sequence[Study], prompts: dict[str, Prompts]) -> list[str]:
    """All text a tokenizer may learn from: every section, and every prompt sentence once."""
    texts = [text for s in studies for text in (s.findings, s.impression) if text]
    texts += [text for said in prompts.values() for pool in said.pools.values() for text in chain(*pool.values())]
    return texts


def _join_processes(device: torch.device) -> tuple[int, int]:
    """(rank, world size) as torchrun set them; (0, 1) outside it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return int(os.environ.get("RANK", "0")), world


def _device(options: Train) -> torch.device:
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise ParamsError("train.device: cuda was asked for, but torch sees no CUDA device; set auto or cpu")
    if options.device == "cpu" or not cuda:
        if options.precision != "fp32":
            raise ParamsError(f"train.precision: {options.precision} needs CUDA, and this run is on the CPU; set fp32")
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _seed(config: RunConfig, device: torch.device) -> None:
    """Same weights on every rank; on the CPU also the same arithmetic every time."""
    torch.manual_seed(config.seed)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True)
        # Filling memory costs time, and nothing here reads it before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _autocast(options: Train, device: torch.device) -> torch.autocast | nullcontext[None]:
    if options.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, PRECISIONS[options.precision])


def _write_history(path: Path, rows: list[dict[str, float]]) -> None:
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, HISTORY, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
