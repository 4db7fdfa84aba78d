"""Any model of open_clip in a local folder, such as one downloaded from a hub before (docs/models.md)."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.adapters.weights import Weights, fill, find_one
from pipeline.evaluation.embedder import Embedder
from pipeline.models.encoders import is_architecture
from pipeline.storage.foreign_weights import read_weights
from pipeline.storage.model_folder import (
    LARGEST_NUMBER,
    LARGEST_PICTURE,
    as_data,
    check_numbers,
    check_size,
    numbers_only,
    one_line,
    read_json,
)
from pipeline.storage.torch_archive import Refused

# What a configuration may state beside numbers. Keys with a word as value, and the words they may have. The names of
# transformers' models are read for whether there is one: model and tokenizer are those of the folder.
POOLERS = ("mean_pooler", "max_pooler", "cls_pooler", "cls_last_hidden_state_pooler")
VISION_WORDS = {
    "pool_type": ("tok", "avg", "none"),
    "attentional_pool": ("parallel", "cascade"),
    "pos_embed_type": ("learnable", "sin_cos_2d"),
    "block_type": ("default", "custom"),
    "timm_pool": ("", "avg", "max", "avgmax", "catavgmax", "map", "token", "abs_attn", "rot_attn"),
    "timm_proj": ("", "linear", "mlp", "none"),
}
TEXT_WORDS = {
    "pool_type": ("first", "last", "argmax", "eos", "none"),
    "proj_type": ("linear", "none"),
    "block_type": ("default", "custom"),
    "tokenizer_mode": ("clips",),
    "hf_proj_type": ("linear", "mlp"),
    "hf_pooler_type": POOLERS,
}
PICTURE_WORDS = {
    "mode": ("RGB",),
    "interpolation": ("bicubic", "bilinear", "nearest"),
    "resize_mode": ("shortest", "longest", "squash"),
}
# Keys whose value is a table of arguments, and the arguments it may have.
TABLES: dict[str, tuple[dict[str, tuple[str, ...]], tuple[str, ...]]] = {
    "act_kwargs": ({"approximate": ("none", "tanh")}, ()),
    "norm_kwargs": ({}, ("eps", "elementwise_affine")),
    "tokenizer_kwargs": ({"clean": ("canonicalize", "lower", "whitespace")}, ("strip_sep_token",)),
}
MODEL_KEYS = ("embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")


def load_open_clip(folder: Path, device: torch.device) -> Embedder:
    """open_clip_config.json (``model_cfg``, ``preprocess_cfg``) and the weights beside it.

    A text tower of transformers (``hf_model_name``) needs its config.json in ``text``; a tokenizer of transformers
    (``hf_tokenizer_name``) its files in the folder itself, as open_clip saves them.
    """
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    path = find_one(folder, "open_clip_config.json")
    weights = find_one(folder, "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "*.pt", "*.safetensors")
    config = read_config(path)
    text_cfg = config["model_cfg"]["text_cfg"]
    text = folder / "text"
    if text_cfg.get("hf_model_name"):
        find_one(folder, "text/config.json")
    try:
        logging.disable(logging.WARNING)  # "initialized randomly": the weights come below
        failure = one_line("", f"{path}: open_clip cannot build this model")
        with failure, as_data(folder) as clean, as_data(text) as clean_text:
            if text_cfg.get("hf_model_name"):
                text_cfg |= {"hf_model_name": str(clean_text), "hf_model_pretrained": False}
            (clean / path.name).write_text(json.dumps(config), encoding="utf-8")
            here = f"local-dir:{clean}"
            empty = {"load_weights": False, "pretrained_text": False}
            check_size(partial(open_clip.create_model, here, device="meta", **empty), 2 * weights.stat().st_size, path)
            model = open_clip.create_model(here, **empty)
            pictures = PreprocessCfg(**model.visual.preprocess_cfg)
            transform = image_transform_v2(pictures, is_train=False)
            tokenizer = open_clip.get_tokenizer(here)
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


def read_config(path: Path) -> dict[str, Any]:
    """open_clip_config.json: numbers in the keys that open_clip's own classes have, and listed words.

    Raises:
        Refused: a key is unknown or has another value; one line that names it.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.transform import PreprocessCfg

    config = read_json(path)
    pictures = config.setdefault("preprocess_cfg", {})
    model = config.get("model_cfg")
    if not isinstance(model, dict) or not isinstance(pictures, dict):
        raise Refused(f"{path}: not a configuration of open_clip with model_cfg and preprocess_cfg")
    check_numbers(model, LARGEST_NUMBER, f"{path}: model_cfg")
    check_numbers(pictures, LARGEST_PICTURE, f"{path}: preprocess_cfg")
    towers = [model.get(key) for key in ("vision_cfg", "text_cfg")]
    vision, text = (dict(tower) if isinstance(tower, dict) else {} for tower in towers)
    if not (vision and text):
        raise Refused(f"{path}: model_cfg: lacks vision_cfg or text_cfg")
    _check(config, f"{path}: ", {}, (), ("model_cfg", "preprocess_cfg"))
    _check(pictures, f"{path}: preprocess_cfg: ", PICTURE_WORDS, _keys(PreprocessCfg))
    _check(model, f"{path}: model_cfg: ", {}, MODEL_KEYS, ("vision_cfg", "text_cfg"))
    name = vision.pop("timm_model_name", None)
    if name is not None and not (isinstance(name, str) and is_architecture(name)):
        raise Refused(f"{path}: model_cfg: vision_cfg: timm_model_name: not an architecture of timm; refused")
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if not isinstance(text.pop(key, ""), str | None):
            raise Refused(f"{path}: model_cfg: text_cfg: {key}: not a name; refused")
    _check(vision, f"{path}: model_cfg: vision_cfg: ", VISION_WORDS, _keys(CLIPVisionCfg))
    _check(text, f"{path}: model_cfg: text_cfg: ", TEXT_WORDS, _keys(CLIPTextCfg))
    return config


def _keys(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _check(
    table: dict[str, Any],
    where: str,
    words: Mapping[str, tuple[str, ...]],
    numbers: tuple[str, ...],
    seen: tuple[str, ...] = (),
) -> None:
    """Raise ``Refused`` unless every key of the table is in ``words`` or ``numbers`` with what that allows; keys that
    are ``seen`` to elsewhere are left out."""
    for key, value in table.items():
        if key in seen:
            continue
        if key not in (*words, *numbers):
            raise Refused(f"{where}{key[:80]!r}: not a key that is known here; refused")
        if key in TABLES and isinstance(value, dict):
            _check(value, f"{where}{key}: ", *TABLES[key])
        elif not (value in words.get(key, ()) if isinstance(value, str) else numbers_only(value)):
            raise Refused(f"{where}{key}: has a value that is not known here; refused")


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
