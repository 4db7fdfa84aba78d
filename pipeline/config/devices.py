"""CUDA devices: whether torch can use the one that a process is to compute on, said in one line before it starts."""

from __future__ import annotations

import os
import re

import torch

from pipeline.config.records import ParamsError


def own_device() -> int:
    """The number of the CUDA device that this process takes; there is one at least. Processes that ``make repro`` runs
    side by side take them in turn, by the number that its Makefile gives them; a process by itself takes 0."""
    return int(os.environ.get("CXR_TURN") or 0) % torch.cuda.device_count()


def cuda_device(number: int, key: str) -> torch.device:
    """CUDA device ``number`` of this machine, checked, made the current one and set up; torch sees one at least.

    Products in float32 stay in float32; convolutions may use TF32, which is torch's default. Results on a GPU depend on
    the algorithms that were fastest, so they are not bit for bit the same every time.

    Args:
        key: of params.yaml that sends work there, for the errors.

    Raises:
        ParamsError: the machine has fewer devices, or torch was built without kernels for this one.
    """
    count = torch.cuda.device_count()
    if number >= count:
        raise ParamsError(
            f"{key}: process {number + 1} here has no CUDA device, torch sees {count}; start {count} at most "
            "(torchrun --nproc-per-node), or look at CUDA_VISIBLE_DEVICES"
        )
    built, capability = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(number)
    if torch.version.hip is None and built and not has_kernels(built, capability):  # AMD's devices count otherwise
        raise ParamsError(
            f"{key}: {torch.cuda.get_device_name(number)} is sm_{capability[0]}{capability[1]}, and torch "
            f"{torch.__version__} has kernels for {', '.join(built)} alone; use another card, the CPU, or a torch that "
            "has them (docs/scaling.md)"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True  # pictures come in few shapes: each one's algorithms are timed once
    return device


def computes_bf16(device: torch.device) -> bool:
    """Whether a CUDA device has units for bfloat16: those from sm_80 on."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def has_kernels(built: list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for these architectures (``torch.cuda.get_arch_list``) runs on a device.

    Machine code (sm_86, sm_100f) runs on its generation from its own revision on, that of one device (sm_90a) on no
    other, and PTX (compute_90) on everything from there on (NVIDIA, CUDA C++ programming guide, "Compatibility").
    """
    for name in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if not found:
            continue
        kind, suffix = found[1], found[4]
        version = int(found[2]), int(found[3])
        if suffix == "a":
            fits = capability == version
        elif kind == "sm":
            fits = capability[0] == version[0] and capability[1] >= version[1]
        else:
            fits = capability >= version
        if fits:
            return True
    return False
