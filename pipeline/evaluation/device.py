"""The device that models are evaluated on."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from pipeline.config.devices import computes_bf16, cuda_device


def evaluation_device(threads: int) -> torch.device:
    """Where models are evaluated: on CUDA if there is one, else on the CPU in so many threads (0 = torch's choice).

    A fixed number of threads makes figures independent of the number of cores.

    Raises:
        ParamsError: torch cannot use the GPU (``cuda_device``).
    """
    if threads:
        torch.set_num_threads(threads)
    return cuda_device(0, "evaluate") if torch.cuda.is_available() else torch.device("cpu")


def evaluation_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Under which an evaluation trains: bfloat16 on a GPU that has it, else float32."""
    half = device.type == "cuda" and computes_bf16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=half)
