"""CXR-CLIP: two encoders, two projections into one space, one learnable scale; and its checkpoint on disk."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.atomic import replacing
from pipeline.encoders import ImageTower, TextTower, Tokenizer
from pipeline.params import RunConfig, read_run_config, write_run_config

MAX_LOG_SCALE = math.log(100)  # CLIP's bound; the paper and its release have none


class CxrClip(nn.Module):
    """Paper section 3.2. Projections are linear with bias; embeddings have unit norm."""

    def __init__(self, config: RunConfig, vocabulary: int, load_weights: bool = True) -> None:
        """Build the architecture of a run; ``load_weights`` fetches pretrained encoders where the run names them."""
        super().__init__()
        self.image_tower = ImageTower(config.image_encoder, config.image_size, load_weights)
        self.text_tower = TextTower(config.text_encoder, vocabulary, load_weights)
        self.image_projection = nn.Linear(self.image_tower.width, config.dim)
        self.text_projection = nn.Linear(self.text_tower.width, config.dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale)))

    @property
    def scale(self) -> Tensor:
        """The factor on the cosines."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Hold the scale at 100 or below; called after every step, so that the parameter can still come down."""
        self.log_scale.clamp_(max=MAX_LOG_SCALE)

    def encode_image(self, images: Tensor) -> Tensor:
        """Grey uint8 [B, S, S] -> unit-norm [B, dim]."""
        return F.normalize(self.image_projection(self.image_tower(images)).float(), dim=-1)

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, L] -> unit-norm [B, dim]."""
        return F.normalize(self.text_projection(self.text_tower(tokens, mask)).float(), dim=-1)

    def forward(self, images: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of images and texts, which need not pair up, and the scale."""
        return self.encode_image(images), self.encode_text(tokens, mask), self.scale


def save(model: CxrClip, tokenizer: Tokenizer, config: RunConfig, folder: Path) -> None:
    """Write model.safetensors, run.json, the tokenizer's files and a named BERT's config.json: all anyone needs."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as partial:
        save_file(weights, partial)
    write_run_config(folder / "run.json", config)
    tokenizer.save(folder)
    if config.text_encoder.name:
        model.text_tower.model.config.save_pretrained(folder)  # so that loading needs no hub


def load(folder: Path, device: torch.device | str = "cpu") -> tuple[CxrClip, Tokenizer, RunConfig]:
    """Read what ``save`` wrote, in eval mode; every key must match."""
    config = read_run_config(folder / "run.json")
    tokenizer = Tokenizer.load(folder, config.text_encoder.max_tokens)
    text = replace(config.text_encoder, name=str(folder)) if config.text_encoder.name else config.text_encoder
    model = CxrClip(replace(config, text_encoder=text), len(tokenizer), load_weights=False)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.to(device).eval(), tokenizer, config
