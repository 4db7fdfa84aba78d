"""The device that models are evaluated on."""

from __future__ import annotations

import torch


def evaluation_device(threads: int) -> torch.device:
    """Where models are evaluated: on CUDA if there is one, else on the CPU in so many threads (0 = torch's choice).

    A fixed number of threads makes figures independent of the number of cores.
    """
    if threads:
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
