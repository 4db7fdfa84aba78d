"""CXR-CLIP's released checkpoints: ResNet-50, and Swin-Tiny pooled by its first token (docs/models.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.adapters.towers import (
    HALF,
    IMAGENET,
    Bert,
    Swin,
    linear,
    normalise_input,
    resnet50,
    short_side,
    wordpieces,
)
from pipeline.adapters.weights import Weights, find_one
from pipeline.evaluation.embedder import Embedder

OF_TRAINING = ("optimizer", "scheduler", "config", "epoch", "train_loss")
MAX_TOKENS = 256
SIDE = 224  # of a picture, in pixels


def load_cxr_clip(folder: Path, device: torch.device) -> Embedder:
    """The .tar file of the folder, with BioClinicalBERT's words in ``tokenizer``.

    Keys: ``image_encoder.resnet.*`` (torchvision) or ``image_encoder.image_encoder.*`` (Hugging Face's Swin),
    ``text_encoder.text_encoder.*``, ``{image,text}_projection.projection.{weight,bias}``, ``logit_scale`` (a log).
    """
    path = find_one(folder, "*.tar")
    weights = Weights.of(path, "model", OF_TRAINING)
    bert = Bert(weights.take("text_encoder.text_encoder."), f"{path}: text_encoder.text_encoder.").to(device)
    tokenizer = wordpieces(folder, bert, MAX_TOKENS)
    statistics = IMAGENET if weights.has("image_encoder.resnet.") else HALF
    if statistics is IMAGENET:
        image = resnet50(weights.take("image_encoder.resnet."), f"{path}: image_encoder.resnet.").to(device)
    else:
        image = Swin(weights.take("image_encoder.image_encoder."), f"{path}: image_encoder.image_encoder.").to(device)
    image_projection, text_projection = (
        linear(weights.take(f"{kind}_projection.projection."), f"{path}: {kind}_projection.projection.").to(device)
        for kind in ("image", "text")
    )
    scale = float(weights.one("logit_scale").float().exp())
    weights.finish()

    def features(inputs: Tensor) -> Tensor:
        found: Tensor = image(normalise_input(inputs, statistics))
        return found if found.dim() == 2 else found[:, 0]  # Swin has no [CLS]: this is its upper left patch

    def encode_texts(texts: list[str]) -> Tensor:
        tokens, mask = (t.to(device) for t in tokenizer(texts))
        hidden = bert(tokens, mask)[-1]
        return text_projection(hidden[torch.arange(len(hidden), device=device), mask.sum(dim=1) - 1])

    return Embedder(
        prepare=cxr_clip_input,
        encode_images=lambda inputs: image_projection(features(inputs)),
        encode_texts=encode_texts,
        features=features,
        size=SIDE,
        scale=scale,
        device=device,
    )


def cxr_clip_input(picture: np.ndarray) -> np.ndarray:
    """Grey uint8 [H, W] -> uint8 [224, 224]: short side to 224, centre."""
    return np.asarray(short_side(Image.fromarray(picture), SIDE, SIDE))
