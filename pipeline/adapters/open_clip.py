"""Any model of open_clip in a local folder, such as one downloaded from a hub before (docs/models.md)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.adapters.weights import Weights, fill, find_one, read_weights
from pipeline.evaluation.embedder import Embedder


def load_open_clip(folder: Path, device: torch.device) -> Embedder:
    """open_clip_config.json (``model_cfg``, ``preprocess_cfg``) and the weights beside it.

    A text tower of transformers (``hf_model_name``) needs its config.json in ``text``; a tokenizer of transformers
    (``hf_tokenizer_name``) its files in the folder itself, as open_clip saves them.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    path = find_one(folder, "open_clip_config.json")
    weights = find_one(folder, "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.pt", "*.safetensors")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        text_cfg: dict[str, Any] = config["model_cfg"]["text_cfg"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a configuration of open_clip with model_cfg and text_cfg") from None
    if text_cfg.get("hf_model_name"):
        find_one(folder, "text/config.json")
        text_cfg = {**text_cfg, "hf_model_name": str(folder / "text"), "hf_model_pretrained": False}
    try:
        logging.disable(logging.WARNING)  # "initialized randomly": the weights come below
        model = open_clip.create_model(
            f"local-dir:{folder}", load_weights=False, pretrained_text=False, text_cfg=text_cfg
        )
        pictures = PreprocessCfg(**model.visual.preprocess_cfg)
        transform = image_transform_v2(pictures, is_train=False)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:  # of any class, and with texts that advise to ask a hub
        raise ValueError(f"{path}: open_clip cannot build this model ({type(error).__name__})") from None
    finally:
        logging.disable(logging.NOTSET)
    fill(model, _tensors(weights), f"{weights}: ")
    model.to(device).eval()

    def encode_images(inputs: Tensor) -> Tensor:
        return model.encode_image(inputs)

    return Embedder(
        prepare=partial(_prepared, transform=transform),
        encode_images=encode_images,
        encode_texts=lambda texts: model.encode_text(tokenizer(texts).to(device)),
        features=encode_images,
        size=pictures.size if isinstance(pictures.size, int) else min(pictures.size),
        scale=float(model.logit_scale.exp()),
        device=device,
    )


def _prepared(picture: np.ndarray, transform: Callable[[Image.Image], Tensor]) -> np.ndarray:
    """uint8 [H, W] -> float32 [3, size, size], by the model's own preprocessing."""
    return transform(Image.fromarray(picture).convert("RGB")).numpy()


def _tensors(path: Path) -> dict[str, Tensor]:
    """A flat table of tensors, or open_clip's own checkpoint, which has it under ``state_dict``."""
    found = read_weights(path)
    if isinstance(found.get("state_dict"), dict):
        weights = Weights.of(path, "state_dict", ("epoch", "name", "optimizer", "scaler"))
    else:
        weights = Weights(found, path)
    return weights.take("module." if weights.has("module.") else "")
