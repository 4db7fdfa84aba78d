"""Weights on disk: safetensors that hold a digest of their tensors, since the format itself has no checksum."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.storage.atomic import replacing

KEY = "blake2b"


class DamagedWeights(ValueError):
    """A file of weights that is not as it was written; one line with its path."""


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors, on whatever device they are, to ``path``, whole or not at all. Same tensors, same bytes."""
    held = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with replacing(path) as partial:
        save_file(held, partial, {KEY: _digest(held)})


def load_weights(path: Path) -> dict[str, Tensor]:
    """What ``save_weights`` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file. DamagedWeights: it is not as it was written.
    """
    try:
        with safe_open(path, "pt") as file:
            stated = (file.metadata() or {}).get(KEY)
        held = load_file(path)
    except (SafetensorError, ValueError):  # the latter of a header that is no text
        held, stated = {}, None
    if stated is None or stated != _digest(held):
        raise DamagedWeights(f"{path}: damaged, or not written by this pipeline; train again (dvc repro -f)")
    return held


def _digest(weights: Mapping[str, Tensor]) -> str:
    """blake2b-128 in hex of names, types, shapes and numbers."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        value = weights[name]
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
