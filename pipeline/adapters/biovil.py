"""BioViL (Boecking et al., ECCV 2022): a ResNet-50 and CXR-BERT, both projected to 128 (docs/models.md)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.adapters.towers import Bert, resnet50, resnet_maps, short_side, wordpieces
from pipeline.adapters.weights import Weights, fill, find_one
from pipeline.evaluation.embedder import Embedder

MAX_TOKENS = 512
SIDE, CENTRE = 512, 480  # of a picture, in pixels
SCALE = 1.0  # its files name none


def load_biovil(folder: Path, device: torch.device) -> Embedder:
    """The image model's .pt and the text model's pytorch_model.bin or model.safetensors; CXR-BERT's words in
    ``tokenizer``.

    Keys of the image: ``encoder.encoder.*`` (torchvision), ``projector.model.{0,1,3}.*`` (1 x 1 convolutions with a
    batch norm between them); of the text: ``bert.*``, ``cls_projection_head.*``.
    """
    path = find_one(folder, "*.pt")
    weights = Weights.of(path)
    weights.ignore("encoder.encoder.fc.")  # ImageNet's classifier, which stays in the encoder and is not used
    net = resnet50(weights.take("encoder.encoder."), f"{path}: encoder.encoder.").to(device)
    projector = _projector(weights.take("projector.model."), f"{path}: projector.model.").to(device)
    weights.finish()
    path = find_one(folder, "pytorch_model.bin", "model.safetensors")
    weights = Weights.of(path)
    weights.ignore("cls.")  # of masked language modelling
    bert = Bert(weights.take("bert."), f"{path}: bert.").to(device)
    head = _Head(weights.take("cls_projection_head."), f"{path}: cls_projection_head.").to(device)
    weights.finish()
    tokenizer = wordpieces(folder, bert, MAX_TOKENS)

    def encode_images(inputs: Tensor) -> Tensor:
        # The projector is not linear: first every place, then their mean.
        return projector(resnet_maps(net, _channels(inputs))).mean(dim=(2, 3))

    def encode_texts(texts: list[str]) -> Tensor:
        tokens, mask = (t.to(device) for t in tokenizer(texts))
        return head(bert(tokens, mask)[-1][:, 0])

    return Embedder(
        prepare=biovil_input,
        encode_images=encode_images,
        encode_texts=encode_texts,
        features=lambda inputs: net(_channels(inputs)),
        size=SIDE,
        scale=SCALE,
        device=device,
    )


def biovil_input(picture: np.ndarray) -> np.ndarray:
    """Grey uint8 [H, W] -> uint8 [480, 480]: stretched to 0..255, short side to 512, centre."""
    grey = picture.astype(np.float64)
    grey -= grey.min()
    if grey.max() > 0:
        grey *= 255 / grey.max()
    return np.asarray(short_side(Image.fromarray(grey.astype(np.uint8)), SIDE, CENTRE))


def _channels(inputs: Tensor) -> Tensor:
    """Grey uint8 [B, S, S] -> float32 [B, 3, S, S] in [0, 1]: the encoder takes no other normalisation."""
    return inputs.float().div(255).unsqueeze(1).expand(-1, 3, -1, -1)


def _projector(tensors: dict[str, Tensor], where: str) -> nn.Module:
    width = tensors["3.weight"].shape[0] if "3.weight" in tensors else 128
    layers = (nn.Conv2d(2048, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1))
    projector = nn.Sequential(*layers)
    fill(projector, tensors, where)
    return projector.eval()


class _Head(nn.Module):
    """The head on the [CLS] of CXR-BERT."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        super().__init__()
        if "dense_to_hidden.weight" not in tensors or tensors["dense_to_hidden.weight"].dim() != 2:
            raise ValueError(f"{where}dense_to_hidden.weight: missing or no matrix")
        width, hidden = tensors["dense_to_hidden.weight"].shape
        self.dense_to_hidden = nn.Linear(hidden, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.dense_to_output = nn.Linear(width, width)
        fill(self, tensors, where)
        self.eval()

    def forward(self, cls: Tensor) -> Tensor:
        """[B, hidden] -> [B, width]."""
        return self.dense_to_output(self.LayerNorm(nn.functional.gelu(self.dense_to_hidden(cls))))
