"""CheXzero (Tiu et al., Nature BME 2022): CLIP ViT-B/32, one model or an ensemble of several (docs/models.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pipeline.adapters.weights import Weights, fill, find
from pipeline.evaluation.embedder import Embedder

MEAN, STD = 101.48761, 83.43944  # of grey in 0..255
SIDE = 320  # of a picture in pixels, before it becomes the encoder's input


def load_chexzero(folder: Path, device: torch.device) -> Embedder:
    """Every .pt file of the folder is a member. Keys are those of OpenAI's CLIP; its words come with open_clip.

    The members' unit-norm embeddings stand beside each other, over the root of their number, so that the cosine is the
    mean of the members' cosines. The published rule averages the members' softmax probabilities instead.
    """
    from open_clip import SimpleTokenizer

    members = [_Member(path).to(device) for path in find(folder, "*.pt")]
    tokenizer = SimpleTokenizer(context_length=members[0].context)
    for member in members:
        if (member.context, member.words) != (members[0].context, len(tokenizer.encoder)):
            raise ValueError(
                f"{member.path}: reads {member.words} words, {member.context} at a time; CLIP has "
                f"{len(tokenizer.encoder)}, and the other files of the folder {members[0].context} at a time"
            )
    share = len(members) ** -0.5

    def prepare(picture: np.ndarray) -> np.ndarray:
        return _prepare(picture, members[0].size)

    def features(inputs: Tensor) -> Tensor:
        return torch.cat([m.pooled(inputs) for m in members], dim=1)

    def encode_images(inputs: Tensor) -> Tensor:
        return torch.cat([share * F.normalize(m.pooled(inputs) @ m.projection, dim=1) for m in members], dim=1)

    def encode_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts).to(device)
        return torch.cat([share * F.normalize(m.clip.encode_text(tokens), dim=1) for m in members], dim=1)

    return Embedder(
        prepare=prepare,
        encode_images=encode_images,
        encode_texts=encode_texts,
        features=features,
        size=SIDE,
        scale=float(np.mean([float(m.clip.logit_scale.detach().exp()) for m in members])),
        device=device,
    )


class _Member(nn.Module):
    """A CLIP whose sizes are those of its tensors; heads of 64, as CLIP's are."""

    def __init__(self, path: Path) -> None:
        from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

        super().__init__()
        weights = Weights.of(path)
        for key in ("input_resolution", "context_length", "vocab_size"):  # numbers in OpenAI's own files
            weights.ignore(key)
        tensors = weights.take("")
        try:
            patch, places = tensors["visual.conv1.weight"], tensors["visual.positional_embedding"]
            width, dim = tensors["text_projection"].shape
            self.context, self.words = len(tensors["positional_embedding"]), len(tensors["token_embedding.weight"])
        except KeyError as error:
            raise ValueError(f"{path}: lacks {error.args[0]}; it is no CLIP with a vision transformer") from None
        self.path = path
        self.size: int = patch.shape[-1] * round((len(places) - 1) ** 0.5)  # side of its input in pixels
        layers = [_depth(tensors, prefix) for prefix in ("visual.transformer.resblocks.", "transformer.resblocks.")]
        vision = CLIPVisionCfg(layers=layers[0], width=len(patch), patch_size=patch.shape[-1], image_size=self.size)
        text = CLIPTextCfg(self.context, self.words, width=width, heads=max(1, width // 64), layers=layers[1])
        self.clip: Any = CLIP(dim, vision, text, quick_gelu=True)
        fill(self.clip, tensors, f"{path}: ")
        self.projection = self.clip.visual.proj
        self.clip.visual.proj = None  # so that its input is available, too
        self.eval()

    def pooled(self, inputs: Tensor) -> Tensor:
        """[B, S, S] -> [CLS] after the last norm, [B, width]."""
        rows: Tensor = self.clip.visual(inputs.float().unsqueeze(1).expand(-1, 3, -1, -1))
        return rows


def _depth(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def _prepare(picture: np.ndarray, size: int) -> np.ndarray:
    """Grey uint8 [H, W] -> float32 [S, S]: long side to 320 (Lanczos), black to a square, normalised, then bicubic to
    the encoder's size without antialiasing, as torchvision resized tensors when it was trained."""
    height, width = picture.shape
    factor = SIDE / max(height, width)
    height, width = max(1, int(height * factor)), max(1, int(width * factor))
    square = Image.new("L", (SIDE, SIDE))
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    square.paste(resized, ((SIDE - width) // 2, (SIDE - height) // 2))
    grey = torch.from_numpy((np.asarray(square, dtype=np.float32) - MEAN) / STD)
    return F.interpolate(grey[None, None], size=(size, size), mode="bicubic", align_corners=False)[0, 0].numpy()
