"""Batches of mixed runs: pairs, lone images and lone texts side by side, each study with what it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pipeline.text.tokenizer import Tokenizer
from pipeline.training.batches import StudyDraw, padded


@dataclass(frozen=True)
class MixedBatch:
    """B draws of studies with I images and T texts, each study with one of each at most; both in order of the studies.

    Attributes:
        images: grey uint8 [I, S, S]; ``image_of``: int64 [I], the study of each, by its number in the batch.
        tokens, mask: int64 [T, L]; ``text_of``: int64 [T], the study of each.
        places: int64 [B], index of each study in its set.
        keys: int64 [B], of each draw.
    """

    images: Tensor
    image_of: Tensor
    tokens: Tensor
    mask: Tensor
    text_of: Tensor
    places: Tensor
    keys: Tensor

    @property
    def studies(self) -> int:
        """B."""
        return len(self.keys)

    def to(self, device: torch.device) -> MixedBatch:
        """A copy on a device; from pinned memory it is made while the device computes."""
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> MixedBatch:
        """A copy in pinned memory; torch's loader calls this where it was told to pin."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> MixedBatch:
        return MixedBatch(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


def collate_mixed(samples: Sequence[StudyDraw], tokenizer: Tokenizer, size: int) -> MixedBatch:
    """Stack the draws of B studies; ``size``: S, which a batch without images cannot tell."""
    images = [s.images[0] for s in samples if s.images]
    ids = tokenizer.encode([s.texts[0] for s in samples if s.texts])
    tokens, mask = padded(ids) if ids else (torch.zeros(0, 1, dtype=torch.int64),) * 2
    return MixedBatch(
        images=torch.from_numpy(np.stack(images) if images else np.empty((0, size, size), dtype=np.uint8)),
        image_of=torch.tensor([i for i, s in enumerate(samples) if s.images], dtype=torch.int64),
        tokens=tokens,
        mask=mask,
        text_of=torch.tensor([i for i, s in enumerate(samples) if s.texts], dtype=torch.int64),
        places=torch.tensor([s.place for s in samples]),
        keys=torch.tensor([s.key for s in samples]),
    )
