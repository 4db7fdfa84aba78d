"""One training step of any method: its loss and gradients, the same on any number of processes; and what methods'
steps have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.params import Train
from pipeline.models.checkpoint import Net
from pipeline.training.batch_norm import synchronise_batch_norm
from pipeline.training.batches import B
from pipeline.training.distributed import Process
from pipeline.training.method import Method, Scaled

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD = 64  # studies that validation sends through a model at a time, on any number of processes
Learner = TypeVar("Learner", bound=nn.Module)


class Computed(NamedTuple):
    """What a step has computed, alike on all processes and without a graph: loss and terms of the whole batch, scalars,
    and ``raised`` [F], above 0 for each flag that some process raised."""

    loss: Tensor
    parts: dict[str, Tensor]
    raised: Tensor


def compute_gradients(
    method: Method[B], batch: B, scaler: torch.amp.GradScaler | None = None, flags: Callable[[], list[bool]] = list
) -> Computed:
    """The loss of a step and, in ``.grad`` of every parameter, its gradient averaged over processes. Nothing waits for
    the device.

    Args:
        batch: this process's share, on any device.
        scaler: of fp16; gradients are then multiplied by its factor, as after ``scaler.scale(loss).backward()``.
        flags: asked at the end, what this process has to say to all; it travels with the loss.
    """
    scaled: Scaled = scaler.scale if scaler is not None else lambda loss: loss
    loss, parts = method.gradients(batch, scaled)
    process, count = method.process, 1 + len(parts)
    said = torch.tensor([float(flag) for flag in flags()], pin_memory=process.device.type == "cuda")
    said = said.to(process.device, loss.dtype, non_blocking=True)
    numbers = torch.cat([torch.stack([loss, *parts.values()]).detach(), said])
    if process.world > 1:
        dist.all_reduce(numbers)
        numbers /= process.world
    return Computed(numbers[0], dict(zip(parts, numbers[1:count], strict=True)), numbers[count:])


def apply_gradients(
    learner: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, loss: Tensor
) -> Tensor:
    """The optimizer's step, left out where it would spoil the weights. Nothing waits for the device.

    In fp16 the scaler leaves it out where gradients are too large for the type, and lowers its factor. In other widths
    it is left out where loss or gradients are not finite, which nothing mends.

    Args:
        optimizer: a fused one, which looks at ``found_inf`` on the device.
        loss: of the whole batch.

    Returns:
        [2]: above 0 where the training cannot go on; fp16's factor after the step (1 in other widths).
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
        return torch.stack([(~loss.isfinite()).to(loss.dtype), scaler.scale(torch.ones_like(loss))])
    grads = [p.grad for p in learner.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads, norm_type=math.inf)  # squares of large gradients are too large
    broken = (~(loss + norm).isfinite()).float()
    optimizer.found_inf = broken  # type: ignore[attr-defined]  # as GradScaler says it to a fused optimizer
    optimizer.step()
    return torch.stack([broken, torch.ones_like(broken)]).to(loss.dtype)


class Later:
    """Numbers of a step, copied from the device while it begins the next one."""

    def __init__(self, numbers: Tensor) -> None:
        """``numbers``: [N], on any device."""
        self._copied: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The numbers, once the device has computed them."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._numbers.tolist()


def made_ready(learner: Learner, net: Net, options: Train, process: Process) -> Learner:
    """A method's ``learner`` on its device, with BatchNorm over all processes and ``net`` compiled where the run asks
    for it; changed in place."""
    learner.to(process.device)
    if process.world > 1:
        synchronise_batch_norm(learner, process.device)
    if options.compile:
        net.compile_towers()
    return learner


def distributed_module(learner: nn.Module, process: Process) -> nn.Module:
    """The learner, whose gradients become averages over processes in the backward pass. Its buffers are not sent:
    BatchNorm over all processes keeps them alike, and DeCLIP's queue is filled alike everywhere."""
    return DistributedDataParallel(learner, broadcast_buffers=False) if process.world > 1 else learner


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
