"""CXR-CLIP: two encoders, two projections into one space, one learnable scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig
from pipeline.models.encoders import ImageTower, TextTower
from pipeline.models.temperature import WithTemperature
from pipeline.models.vectors import unit


class CxrClip(WithTemperature):
    """Paper section 3.2. Projections are linear with bias; embeddings have unit norm."""

    def __init__(self, config: RunConfig, vocabulary: int, load_weights: bool = True) -> None:
        """Build the architecture of a run; ``load_weights`` fetches pretrained encoders where the run names them."""
        if config.image_encoder is None:
            raise ParamsError(f"runs.{config.name}.image_encoder: missing")
        super().__init__(config.temperature, config.loss.scale_limits)
        self.image_tower = ImageTower(config.image_encoder, config.image_size, load_weights)
        self.text_tower = TextTower(config.text_encoder, vocabulary, load_weights)
        self.image_projection = nn.Linear(self.image_tower.width, config.dim)
        self.text_projection = nn.Linear(self.text_tower.width, config.dim)

    def compile_towers(self) -> None:
        """Let torch compile both encoders on their first pass; names of parameters stay."""
        self.image_tower.model.compile()
        self.text_tower.model.compile(dynamic=True)  # the padded length changes from group to group

    def save_configs(self, folder: Path) -> None:
        """Write the encoders' files beside the weights: a BERT's config.json, so that loading needs no hub."""
        if self.text_tower.named:
            self.text_tower.model.config.save_pretrained(folder)

    def encode_image(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Grey uint8 [B, S, S] -> unit-norm [B, dim]; ``keys`` as in ``ImageTower.forward``."""
        return unit(self.image_projection(self.image_tower(images, keys)))

    def encode_text(self, tokens: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Token ids and mask, int64 [B, L] -> unit-norm [B, dim]; ``keys`` as in ``TextTower.forward``."""
        return unit(self.text_projection(self.text_tower(tokens, mask, keys)))

    def encode_places(self, images: Tensor) -> Tensor | None:
        """Embeddings of every place of the last feature map: uint8 [B, S, S] -> unit-norm [B, h, w, dim].

        The image projection is linear, so it commutes with the global average pool: the mean of the projected places is
        the image's embedding before it gets unit norm. Hence a place's cosine with a text says what it contributes.
        None for an encoder that is not pooled by an average over a map.
        """
        places = self.image_tower.places(images)
        return None if places is None else unit(self.image_projection(places))

    def forward(
        self,
        images: Tensor,
        tokens: Sequence[Tensor],
        mask: Sequence[Tensor],
        image_keys: Tensor | None = None,
        text_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of images and texts, which need not pair up, and the scale.

        Args:
            images: uint8 [N, S, S].
            tokens, mask: int64 [g, L_g] for each length group.
            image_keys, text_keys: int64 [N] and [M], needed in training where a tower drops anything; texts are
                counted through the groups.

        Returns:
            [N, dim], [M, dim] (texts in the order of the groups) and a scalar.
        """
        keys = [None] * len(tokens) if text_keys is None else text_keys.split([len(t) for t in tokens])
        embedded = self.encode_image(images, image_keys)  # first: the texts' many small operations queue up behind it
        texts = [self.encode_text(*group) for group in zip(tokens, mask, keys, strict=True)]
        return embedded, torch.cat(texts), self.scale
