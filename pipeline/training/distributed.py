"""The processes of a training: their devices, what they agree on, and sums and gathers that gradients flow through."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.config.devices import computes_bf16, cuda_device, own_device
from pipeline.config.params import Train
from pipeline.config.records import ParamsError


@dataclass(frozen=True)
class Process:
    """One of the ``world`` processes that train together, and the device it trains on."""

    device: torch.device
    rank: int = 0
    world: int = 1


def device_of(options: Train) -> torch.device:
    """The device this process trains on: under torchrun that of its rank, else one by ``own_device``.

    Raises:
        ParamsError: CUDA was asked for and there is none, or a precision that the CPU, or this GPU, does not have; or
            torch cannot use the GPU (``cuda_device``).
    """
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise ParamsError("train.device: cuda was asked for, but torch sees no CUDA device; set auto or cpu")
    if options.device == "cpu" or not cuda:
        if options.precision != "fp32":
            raise ParamsError(f"train.precision: {options.precision} needs CUDA, and this run is on the CPU; set fp32")
        return torch.device("cpu")
    device = cuda_device(int(os.environ.get("LOCAL_RANK", own_device())), "train.launcher")
    if options.precision == "bf16" and not computes_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise ParamsError(f"train.precision: {name} does not compute in bf16, which needs sm_80 or newer; set fp16")
    return device


def join(device: torch.device, options: Train, from_cpu: bool = False) -> Process:
    """Rank and number of processes as torchrun set them; outside it 0 and 1. A process that is waited for longer than
    ``train.timeout_minutes`` is an error of those who wait. ``from_cpu``: tensors on the CPU are sent, too."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        # torchrun's store outlives a restart: without a name of its own, a new attempt would meet the addresses of the
        # killed one there and wait for them
        store, rank, world = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        timeout = timedelta(minutes=options.timeout_minutes)
        own = device if device.type == "cuda" else None  # else NCCL guesses it at the first collective, or hangs
        dist.init_process_group(
            backend_of(device, from_cpu), store=store, rank=rank, world_size=world, timeout=timeout, device_id=own
        )
    return Process(device, int(os.environ.get("RANK", "0")), world)


def backend_of(device: torch.device, from_cpu: bool) -> str:
    """The backend that sends tensors on a device and, if ``from_cpu``, on the CPU without waiting for the device."""
    if device.type == "cpu":
        return "gloo"
    return "cpu:gloo,cuda:nccl" if from_cpu else "nccl"


def any_of(flags: list[bool], device: torch.device) -> list[bool]:
    """For each flag whether any rank raises it; all ranks get the same answer."""
    if not dist.is_initialized():
        return flags
    said = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return said.bool().tolist()


def gather_rows(row: Tensor, device: torch.device) -> Tensor:
    """The row [N] of every rank, [world, N] on the CPU; all ranks get all of them."""
    if not dist.is_initialized():
        return row[None].cpu()
    row = row.to(device)
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows).cpu()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.new_empty((dist.get_world_size(), *x.shape))
        dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        mine = torch.empty_like(grad[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(mine, grad.contiguous().flatten(0, 1))
        return mine


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


def gathered(x: Tensor) -> Tensor:
    """[b, ...] of each process -> [world, b, ...] in order of rank, on every process.

    The gradient of ``x`` is the sum of what all processes send back to it.
    """
    return _Gather.apply(x)


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, on every process; the gradient is the sum of all processes' gradients."""
    return _Sum.apply(x)
