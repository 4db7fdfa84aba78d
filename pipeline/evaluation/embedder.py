"""Any vision-language model as evaluation sees it: pictures and sentences go in, unit-norm rows come out.

Our own checkpoints and everybody else's (``pipeline.adapters``) are loaded as one ``Embedder``; nothing after it knows
whose model it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.storage.shards import load_view
from pipeline.study import View

Prepare = Callable[[np.ndarray], np.ndarray]


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

    def embed_images(self, views: Sequence[View], label: str = "") -> np.ndarray:
        """Unit-norm embeddings of views in order, float32 [N, D]."""
        return _unit(self.over(self.encode_images, views, self.prepare_at, label))

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
        return self.over(lambda inputs: score(inputs, sentences), views, self.prepare_at, label)

    def prepare_at(self, picture: np.ndarray, _: int) -> np.ndarray:
        """``prepare``, whatever the position of the picture."""
        return self.prepare(picture)

    @torch.inference_mode()
    def over(
        self,
        encode: Callable[[Tensor], Tensor],
        views: Sequence[View],
        prepare: Callable[[np.ndarray, int], np.ndarray],
        label: str = "",
    ) -> np.ndarray:
        """``encode`` over views in order, float32 [N, ...].

        Args:
            prepare: (decoded uint8 [H, W], position in ``views``) -> one input of the image encoder.
        """
        parts = []
        starts = range(0, len(views), self.batch_size)
        for start in tqdm(starts, desc=label, unit="batch", mininterval=1, leave=False):
            part = views[start : start + self.batch_size]
            inputs = np.stack([prepare(load_view(v), start + i) for i, v in enumerate(part)])
            parts.append(encode(torch.from_numpy(inputs).to(self.device)).float().cpu().numpy())
        return np.concatenate(parts)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.maximum(length, 1e-12)).astype(np.float32)
