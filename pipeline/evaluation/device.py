"""The device that models are evaluated on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from pipeline.config.devices import computes_bf16, cuda_device, own_device


def evaluation_device(threads: int) -> torch.device:
    """Where models are evaluated: on CUDA if there is any (``own_device``), else on the CPU in so many threads (0: as
    many as torch chooses).

    A fixed number of threads makes figures independent of the number of cores.

    Raises:
        ParamsError: torch cannot use the GPU (``cuda_device``).
    """
    if threads:
        torch.set_num_threads(threads)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return cuda_device(own_device(), "evaluate")


def evaluation_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Under which our models are evaluated and fine-tuned: bfloat16 on a GPU that has it, else float32."""
    half = device.type == "cuda" and computes_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)
