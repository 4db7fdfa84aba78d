"""Any model of transformers that embeds images and texts (CLIP, SigLIP ...) in a local folder (docs/models.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipeline.adapters.weights import POSITIONS, find
from pipeline.evaluation.embedder import Embedder
from pipeline.storage.model_folder import as_data, one_line
from pipeline.storage.torch_archive import Refused
from pipeline.text.tokenizer import tried


def load_hf_clip(folder: Path, device: torch.device) -> Embedder:
    """config.json, model.safetensors or pytorch_model.bin, preprocessor_config.json and the tokenizer's files."""
    from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    for needed in (("config.json",), ("preprocessor_config.json", "processor_config.json")):
        find(folder, *needed)
    find(folder, "model.safetensors", "pytorch_model.bin", "model-*.safetensors")
    local = {"local_files_only": True, "trust_remote_code": False}
    with one_line("", f"{folder}: transformers cannot load this model"), as_data(folder, weights=True) as clean:
        config = AutoConfig.from_pretrained(clean, **local)
        kind = MODEL_MAPPING.get(type(config), object)
        if not (hasattr(kind, "get_image_features") and hasattr(kind, "get_text_features")):
            raise Refused(f"{folder / 'config.json'}: model_type: does not embed images and texts")
        model, report = AutoModel.from_pretrained(
            clean, config=config, output_loading_info=True, dtype=torch.float32, weights_only=True, **local
        )
        processor = AutoImageProcessor.from_pretrained(clean, use_fast=False, **local)
        tokenizer = tried(AutoTokenizer.from_pretrained(clean, **local))
        side = _side(processor, folder)
    _check(report, folder)
    model.to(device).eval()
    length = _context(model, tokenizer)
    # SigLIP was trained with every text padded to the full length
    padding: bool | str = "max_length" if str(model.config.model_type).startswith("siglip") else True

    def prepare(picture: np.ndarray) -> np.ndarray:
        found = processor(images=Image.fromarray(picture).convert("RGB"), return_tensors="np")
        return np.asarray(found["pixel_values"][0], dtype=np.float32)

    def encode_images(inputs: Tensor) -> Tensor:
        return _rows(model.get_image_features(pixel_values=inputs))

    def encode_texts(texts: list[str]) -> Tensor:
        found = tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt").to(device)
        names = ("input_ids", "attention_mask")
        return _rows(model.get_text_features(**{name: found[name] for name in names if name in found}))

    return Embedder(
        prepare=prepare,
        encode_images=encode_images,
        encode_texts=encode_texts,
        features=encode_images,
        size=side,
        scale=float(model.logit_scale.exp()) if hasattr(model, "logit_scale") else 1.0,
        device=device,
    )


def _rows(found: Any) -> Tensor:
    """[B, D]; transformers gives the tensor itself before version 5, an output with ``pooler_output`` since."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _side(processor: Any, folder: Path) -> int:
    """What the processor resizes the short side of a picture to, or both sides."""
    stated = dict(processor.size)
    for name in ("shortest_edge", "height"):
        if stated.get(name):
            return int(stated[name])
    raise Refused(f"{folder}/preprocessor_config.json: size: neither shortest_edge nor height and width")


def _context(model: Any, tokenizer: Any) -> int:
    """The longest text in tokens."""
    stated = getattr(getattr(model.config, "text_config", None), "max_position_embeddings", None)
    return min(int(tokenizer.model_max_length), int(stated or 512), 512)


def _check(report: dict[str, Any], folder: Path) -> None:
    """Nothing may be missing, left over or of another shape."""
    unknown = [key for key in report.get("unexpected_keys", ()) if not POSITIONS.search(key)]
    other = [key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys", ())]
    for kind, keys in (("missing", report.get("missing_keys", ())), ("unknown", unknown), ("of another shape", other)):
        if keys:
            raise ValueError(f"{folder}: {kind}: {', '.join(sorted(map(str, keys))[:3])}")
