"""One training step of any method: its loss and gradients, the same on any number of processes; and what methods'
steps have in common."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from pipeline.config.params import Train
from pipeline.models.checkpoint import Net
from pipeline.training.batch_norm import synchronise_batch_norm
from pipeline.training.batches import B
from pipeline.training.distributed import Process
from pipeline.training.method import Method, Scaled, Terms

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
Learner = TypeVar("Learner", bound=nn.Module)


def compute_gradients(method: Method[B], batch: B, scaler: torch.amp.GradScaler | None = None) -> Terms:
    """The loss of a step and, in ``.grad`` of every parameter, its gradient averaged over processes.

    Args:
        batch: this process's share, on any device.
        scaler: of fp16; gradients are then multiplied by its factor, as after ``scaler.scale(loss).backward()``.

    Returns:
        Loss and terms as numbers of the whole batch, alike on all processes and without a graph.
    """
    scaled: Scaled = scaler.scale if scaler is not None else lambda loss: loss
    loss, parts = method.gradients(batch, scaled)
    numbers = torch.stack([loss, *parts.values()]).detach()
    if method.process.world > 1:
        dist.all_reduce(numbers)
        numbers /= method.process.world
    return numbers[0], dict(zip(parts, numbers[1:], strict=True))


def made_ready(learner: Learner, net: Net, options: Train, process: Process) -> Learner:
    """A method's ``learner`` on its device, with BatchNorm over all processes and ``net`` compiled where the run asks
    for it; changed in place."""
    learner.to(process.device)
    if process.world > 1:
        synchronise_batch_norm(learner, process.device)
    if options.compile:
        net.compile_towers()
    return learner


def average_gradients(net: nn.Module, world: int) -> None:
    """What DDP does, for gradients that were gathered without it."""
    if world == 1:
        return
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view(grad.shape) / world)


def autocast(options: Train, device: torch.device) -> torch.autocast | nullcontext[None]:
    """Under which a method embeds: ``train.precision``."""
    if options.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, PRECISIONS[options.precision])
