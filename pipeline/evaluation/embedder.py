"""Any vision-language model as evaluation sees it: pictures and sentences go in, unit-norm rows come out.

Our own checkpoints and everybody else's (``pipeline.adapters``) are loaded as one ``Embedder``; nothing after it knows
whose model it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.evaluation.pictures import Pictures, Prepare, PreparedViews, batches, cut
from pipeline.study import View


@dataclass(frozen=True)
class Embedder:
    """A model with its own preprocessing, tokenisation and pooling.

    Attributes:
        prepare: decoded grey picture, uint8 [H, W] -> one input of the image encoder, any fixed shape and dtype.
        encode_images: stacked inputs on ``device`` -> [B, D] in the shared space (any length; made unit-norm here).
        encode_texts: sentences -> [B, D]; tokenises, pads and truncates as its project does.
        features: stacked inputs on ``device`` -> [B, W], the input of a linear probe.
        size: side in pixels to which ``prepare`` first resizes a square picture. Augmented crops are made at this size,
            so that they are not resized twice.
        scale: factor on the cosines that the model was trained with, for probabilities.
        batch_size: images, or texts, encoded at a time.
        workers: processes that read and prepare images; 0: this one.
        local_scores: (stacked inputs, sentences) -> [B, M] scores that need more than one row an image (GLoRIA's words
            against regions); None for everybody else. The same sentences come with every batch.
    """

    prepare: Prepare
    encode_images: Callable[[Tensor], Tensor]
    encode_texts: Callable[[list[str]], Tensor]
    features: Callable[[Tensor], Tensor]
    size: int
    scale: float
    device: torch.device
    batch_size: int = 256
    local_scores: Callable[[Tensor, list[str]], Tensor] | None = None
    workers: int = 0

    def embed_images(self, views: Sequence[View], label: str = "") -> np.ndarray:
        """Unit-norm embeddings of views in order, float32 [N, D]."""
        return _unit(self.over(self.encode_images, views, label))

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-norm embeddings of texts in order, float32 [M, D]; batched by length so that little is padding."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        rows: list[np.ndarray] = [np.empty(0)] * len(texts)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            with torch.inference_mode():
                found = self.encode_texts([texts[i] for i in part]).float().cpu().numpy()
            for i, row in zip(part, found, strict=True):
                rows[i] = row
        return _unit(np.stack(rows))

    def embed_local(self, views: Sequence[View], texts: Sequence[str], label: str = "") -> np.ndarray:
        """``local_scores`` of views in order with texts, float32 [N, M].

        Raises:
            ValueError: the model has none.
        """
        score = self.local_scores
        if score is None:
            raise ValueError("this model has no local scores")
        sentences = list(texts)
        return self.over(lambda inputs: score(inputs, sentences), views, label)

    def over(self, encode: Callable[[Tensor], Tensor], views: Sequence[View], label: str = "") -> np.ndarray:
        """``encode`` over views in order, float32 [N, ...]."""
        pictures = PreparedViews(views, self.prepare)
        parts = cut(range(len(views)), self.batch_size)
        return np.concatenate(list(self.encoded(encode, pictures, parts, label)))

    @torch.inference_mode()
    def encoded(
        self, encode: Callable[[Tensor], Tensor], pictures: Pictures, parts: Sequence[list[Any]], label: str = ""
    ) -> Iterator[np.ndarray]:
        """``encode`` over the items of each part, float32 [B, ...], while the next ones are prepared."""
        loader = batches(pictures, parts, self.workers, self.batch_size, self.device.type == "cuda")
        for inputs, _ in tqdm(loader, total=len(parts), desc=label, unit="batch", mininterval=1, leave=False):
            yield encode(inputs.to(self.device, non_blocking=True)).float().cpu().numpy()


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(length, 1e-12)).astype(np.float32)
