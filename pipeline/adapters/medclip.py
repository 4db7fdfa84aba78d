"""MedCLIP (Wang et al., EMNLP 2022) with ResNet-50 or Swin-Tiny (docs/models.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.adapters.towers import Bert, Swin, linear, normalise_input, resnet50, wordpieces
from pipeline.adapters.weights import Weights, find_one
from pipeline.evaluation.embedder import Embedder

MAX_TOKENS = 77
SIDE = 224  # of a picture, in pixels
MEAN, STD = 0.5862785803043838, 0.27950088968644304
MAX_LOG_SCALE = 4.6052


def load_medclip(folder: Path, device: torch.device) -> Embedder:
    """pytorch_model.bin of the folder, with BioClinicalBERT's words in ``tokenizer``.

    Keys: ``vision_model.model.*`` (torchvision's ResNet, whose ``fc`` is the projection, or Hugging Face's Swin with
    ``vision_model.projection_head.weight``), ``text_model.model.*``, ``text_model.projection_head.weight``,
    ``logit_scale`` (a logarithm).
    """
    path = find_one(folder, "pytorch_model.bin", "*.bin", "*.pt")
    weights = Weights.of(path)
    at = "vision_model.model."
    if weights.has("vision_model.projection_head."):
        swin = Swin(weights.take(at), f"{path}: {at}").to(device)
        head = linear(weights.take("vision_model.projection_head."), f"{path}: vision_model.projection_head.")
    else:
        tensors = weights.take(at)
        fc = {key.removeprefix("fc."): tensors.pop(key) for key in list(tensors) if key.startswith("fc.")}
        head = linear(fc, f"{path}: {at}fc.")
        swin, net = None, resnet50(tensors, f"{path}: {at}").to(device)
    image_projection = head.to(device)
    bert = Bert(weights.take("text_model.model."), f"{path}: text_model.model.").to(device)
    at = "text_model.projection_head."
    text_projection = linear(weights.take(at), f"{path}: {at}").to(device)
    scale = float(weights.one("logit_scale").float().clamp(0, MAX_LOG_SCALE).exp())
    weights.finish()
    tokenizer = wordpieces(folder, bert, MAX_TOKENS)

    def features(inputs: Tensor) -> Tensor:
        x = normalise_input(inputs, ((MEAN,) * 3, (STD,) * 3))
        return net(x) if swin is None else swin(x).mean(dim=1)

    def encode_texts(texts: list[str]) -> Tensor:
        tokens, mask = (t.to(device) for t in tokenizer(texts))
        layers = bert(tokens, mask)
        # Its mean takes padding along, up to the longest text of the call. A text alone has none, and has no company
        # that would change its embedding.
        weight = mask.unsqueeze(2) / mask.sum(dim=1)[:, None, None]
        return text_projection(((layers[1] + layers[2] + layers[-1]) / 3 * weight).sum(dim=1))

    return Embedder(
        prepare=medclip_input,
        encode_images=lambda inputs: image_projection(features(inputs)),
        encode_texts=encode_texts,
        features=features,
        size=SIDE,
        scale=scale,
        device=device,
    )


def medclip_input(picture: np.ndarray) -> np.ndarray:
    """Grey uint8 [H, W] -> uint8 [224, 224]: black to a square of at least 224, then bicubic."""
    height, width = picture.shape
    side = max(SIDE, height, width)
    square = Image.new("L", (side, side))
    square.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
