"""The model of mixed runs: one transformer over image tokens of several scales and words (after arXiv 2103.16022).

What a study does not have is absent from the sequence, so images alone, texts alone and pairs are all its inputs:

    the image's tokens from the finest scale to the coarsest, then [CLS], words, [SEP]

Scale k is the picture averaged over 2**k x 2**k pixels, in patches of ``patch`` x ``patch`` of *its* pixels. Regions
are hidden by cells of the coarsest scale's grid, and with a cell every token of every scale that is in it: no patch
and no average reaches over a cell's edge, so no scale says anything of what another one has to guess.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig
from pipeline.models.masked_tokens import MaskedWords
from pipeline.models.temperature import WithTemperature
from pipeline.models.vectors import at_least_float32, unit
from pipeline.storage.model_folder import MOST_NUMBERS
from pipeline.text.tokenizer import Tokenizer

MEAN, STD = 0.5, 0.25  # of grey in [0, 1], for what goes in and what is regenerated


class MixedNet(WithTemperature):
    """The transformer, its heads for hidden regions and words, and two projections into the shared space.

    ``grid``: cells a side of the coarsest scale; ``mask_ratio``: the share of them that training hides (see
    ``pipeline.models.hidden_cells``). Embeddings and ``encode_*`` are as in ``CxrClip``.
    """

    cell_of: Tensor
    scale_of: Tensor
    image_positions: Tensor
    text_positions: Tensor

    def __init__(self, config: RunConfig, vocabulary: int) -> None:
        """``vocabulary``: number of token ids.

        Raises:
            ParamsError: the run is no mixed one.
        """
        shape = config.mixed
        if shape is None:
            raise ParamsError(f"runs.{config.name}: no mixed run")
        numbers = shape.layers * 12 * shape.width**2 + shape.width * (vocabulary + 2 * shape.scales * shape.patch**2)
        if numbers > MOST_NUMBERS:
            raise ParamsError(f"model.mixed: its sizes are a model of {numbers:,} numbers, more than {MOST_NUMBERS:,}")
        super().__init__(config.temperature, config.loss.scale_limits)
        self.patch, self.scales, self.width = shape.patch, shape.scales, shape.width
        self.mask_ratio = shape.mask_ratio
        self.grids = [config.image_size // (shape.patch * 2**k) for k in range(shape.scales)]
        self.grid = self.grids[-1]
        wide, pixels = shape.width, shape.patch**2

        def learned(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size) * 0.02)

        self.pieces_in = nn.ModuleList(nn.Linear(pixels, wide) for _ in self.grids)
        self.pieces_out = nn.ModuleList(nn.Linear(wide, pixels) for _ in self.grids)
        self.hidden_tokens = learned(shape.scales, wide)  # in the place of what is hidden
        self.scale_embeddings = learned(shape.scales, wide)
        self.modalities = learned(2, wide)  # image, text
        self.word_embeddings = nn.Embedding(vocabulary, wide)
        nn.init.normal_(self.word_embeddings.weight, std=wide**-0.5)
        layer = nn.TransformerEncoderLayer(
            *(wide, shape.heads, 4 * wide, 0.0), activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, shape.layers, nn.LayerNorm(wide), enable_nested_tensor=False)
        for block in self.encoder.layers:  # torch starts all copies alike
            for p in block.parameters():
                if p.dim() > 1:
                    nn.init.xavier_uniform_(p)
        self.words = MaskedWords(wide, self.word_embeddings)
        self.image_projection = nn.Linear(wide, config.dim)
        self.text_projection = nn.Linear(wide, config.dim)

        def keep(name: str, value: Tensor) -> None:
            self.register_buffer(name, value, persistent=False)

        places = [_centres(self.patch * 2**k, g) for k, g in enumerate(self.grids)]
        keep("scale_of", torch.repeat_interleave(torch.arange(self.scales), torch.tensor([g * g for g in self.grids])))
        side = self.patch * 2 ** (self.scales - 1)
        keep("cell_of", torch.cat([(p[:, 0] // side) * self.grid + p[:, 1] // side for p in places]).long())
        # From one patch to the next up to twice the picture: slower waves would be alike at all places.
        lengths = 2.0, 4.0 * self.grids[0]
        keep("image_positions", torch.cat([_waves(p / self.patch, wide, *lengths) for p in places]))
        words = torch.arange(config.text_encoder.max_tokens).unsqueeze(1).double()
        keep("text_positions", _waves(words, wide, 2 * math.pi, 2 * math.pi * 10000))

    @property
    def image_tower(self) -> ImagePart:
        """What a linear probe or fine-tuning takes for the image encoder."""
        return ImagePart(self)

    def compile_towers(self) -> None:
        """Let torch compile the transformer on its first pass; names of parameters stay."""
        self.encoder.compile(dynamic=True)

    def save_configs(self, folder: Path) -> None:
        """Write nothing: the run's parameters describe the whole model."""

    def pieces(self, images: Tensor) -> list[Tensor]:
        """Grey uint8 [B, S, S] -> of each scale its patches, row by row, float [B, g * g, patch * patch]: grey in
        [0, 1] less 0.5, over 0.25. They are what goes in and what is regenerated."""
        grey = (images.to(self.image_positions.dtype) / 255 - MEAN) / STD
        found = []
        for k, g in enumerate(self.grids):
            x = F.avg_pool2d(grey.unsqueeze(1), 2**k).squeeze(1) if k else grey
            x = x.unflatten(2, (g, self.patch)).unflatten(1, (g, self.patch))  # [B, g, patch, g, patch]
            found.append(x.transpose(2, 3).flatten(3).flatten(1, 2))
        return found

    def covered(self, hidden: Tensor) -> list[Tensor]:
        """Which tokens hidden cells (bool [B, G, G]) take with them: of each scale bool [B, g * g]."""
        tokens = hidden.flatten(1)[:, self.cell_of]
        return list(tokens.split([g * g for g in self.grids], dim=1))

    def forward(
        self,
        images: Tensor | None = None,
        hidden: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """States of the tokens of images, of texts, or of both together.

        Args:
            images: uint8 [B, S, S]; ``hidden``: bool [B, G, G], cells that are not to be seen. None: all is.
            tokens, mask: int64 [B, L], padded on the right.

        Returns:
            [B, N, width], all scales, and [B, L, width]; of what is absent, of length 0.
        """
        parts, seen = [], []
        if images is not None:
            parts.append(self._image_tokens(images, hidden))
            seen.append(parts[0].new_ones(parts[0].shape[:2], dtype=torch.bool))
        if tokens is not None and mask is not None:
            words = self.word_embeddings(tokens) * math.sqrt(self.width)
            parts.append(words + self.text_positions[: tokens.shape[1]] + self.modalities[1])
            seen.append(mask.bool())
        padding = None if tokens is None else ~torch.cat(seen, dim=1)
        states = self.encoder(torch.cat(parts, dim=1), src_key_padding_mask=padding)
        return states.tensor_split([0 if images is None else parts[0].shape[1]], dim=1)

    def _image_tokens(self, images: Tensor, hidden: Tensor | None) -> Tensor:
        found = [embed(p) for embed, p in zip(self.pieces_in, self.pieces(images), strict=True)]
        x = torch.cat(found, dim=1)
        if hidden is not None:
            covered = torch.cat(self.covered(hidden), dim=1).unsqueeze(2)
            x = torch.where(covered, self.hidden_tokens[self.scale_of].to(x.dtype), x)
        return x + self.image_positions + self.scale_embeddings[self.scale_of] + self.modalities[0]

    def guess(self, states: Tensor) -> list[Tensor]:
        """States of images [B, N, width] -> what each scale's patches look like, as ``pieces`` gives them."""
        parts = states.split([g * g for g in self.grids], dim=1)
        return [head(part) for head, part in zip(self.pieces_out, parts, strict=True)]

    def image_features(self, images: Tensor) -> Tensor:
        """Grey uint8 [B, S, S] -> the mean state of the image's tokens before projection, [B, width]."""
        return self(images=images)[0].mean(dim=1)

    def encode_image(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Grey uint8 [B, S, S] -> unit-norm [B, dim], from the image alone; ``keys`` change nothing."""
        return unit(self.image_projection(self.image_features(images)))

    def encode_text(self, tokens: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Token ids and mask, int64 [B, L] -> unit-norm [B, dim], from the text alone; ``keys`` change nothing."""
        states, seen = self(tokens=tokens, mask=mask)[1], mask.unsqueeze(2)
        return unit(self.text_projection((states * seen).sum(dim=1) / seen.sum(dim=1)))

    def encode_places(self, images: Tensor) -> Tensor | None:
        """None: no place of a map adds up to the embedding, as it does in ``CxrClip``."""
        return None

    def regenerate_scales(
        self, images: Tensor, mask: Tensor, tokens: Tensor | None = None, text_mask: Tensor | None = None
    ) -> list[Tensor]:
        """As ``regenerate``, of every scale: float [B, S / 2**k, S / 2**k]."""
        states, _ = self(images, mask, tokens, text_mask)
        found = []
        for guess, given, covered, g in zip(
            self.guess(states), self.pieces(images), self.covered(mask), self.grids, strict=True
        ):
            x = torch.where(covered.unsqueeze(2), at_least_float32(guess), given)
            x = x.unflatten(2, (self.patch, self.patch)).unflatten(1, (g, g)).transpose(2, 3)
            found.append((x.flatten(3).flatten(1, 2) * STD + MEAN).clamp(0, 1))
        return found

    def regenerate(
        self, images: Tensor, mask: Tensor, tokens: Tensor | None = None, text_mask: Tensor | None = None
    ) -> Tensor:
        """Fill hidden cells of images, with what the text says where there is one.

        Args:
            images: uint8 [B, S, S]; ``mask``: bool [B, G, G], True where a cell is hidden.
            tokens, text_mask: int64 [B, L].

        Returns:
            Grey in [0, 1], float [B, S, S]: hidden pixels from the finest scale's guess, the others as they were given.
        """
        return self.regenerate_scales(images, mask, tokens, text_mask)[0]


class ImagePart(nn.Module):
    """The image side of a ``MixedNet`` as an image encoder: its copy is a network of its own."""

    def __init__(self, net: MixedNet) -> None:
        super().__init__()
        self.net = net
        self.width = net.width

    @property
    def mean(self) -> Tensor:
        """A tensor on the device that the encoder is on."""
        return self.net.image_positions

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Grey uint8 [B, S, S] -> features [B, width]; ``keys`` change nothing."""
        return self.net.image_features(images)


def build_mixed(config: RunConfig, tokenizer: Tokenizer) -> MixedNet:
    """The untrained model of a mixed run.

    Raises:
        ParamsError: the tokenizer has no [MASK].
    """
    if tokenizer.tokenizer.mask_token_id is None:
        raise ParamsError("model.text_encoder: its tokenizer has no [MASK], which mixed runs need; name another one")
    return MixedNet(config, len(tokenizer))


def _centres(side: int, count: int) -> Tensor:
    """Centres (row, column) in pixels of count x count squares of this side, row by row, float64 [count * count, 2]."""
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) * side
    return torch.cartesian_prod(middle, middle)


def _waves(places: Tensor, width: int, shortest: float, longest: float) -> Tensor:
    """Sines and cosines (Vaswani et al., NeurIPS 2017) of each coordinate of ``places``, float64 [N, 1 or 2], side by
    side: float32 [N, width]. Wavelengths are a geometric series from ``shortest``; ``longest`` would be its next one.
    """
    each = width // (2 * places.shape[1])
    rates = 2 * math.pi / shortest * (shortest / longest) ** (torch.arange(each, dtype=torch.float64) / each)
    angles = places.unsqueeze(2) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()
