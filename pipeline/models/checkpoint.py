"""A model's checkpoint on disk, and the model that a run's parameters describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from pipeline.config.run_config import RunConfig, read_run_config, write_run_config
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.mixed import MixedNet, build_mixed
from pipeline.storage.atomic import replacing
from pipeline.text.tokenizer import Tokenizer

Net = CxrClip | MixedNet  # what a run trains


def build_model(config: RunConfig, tokenizer: Tokenizer, load_weights: bool = True) -> Net:
    """The untrained model of a run; ``load_weights`` as in ``CxrClip``."""
    return build_mixed(config, tokenizer) if config.mixed else CxrClip(config, len(tokenizer), load_weights)


def save_model(model: Net, tokenizer: Tokenizer, config: RunConfig, folder: Path) -> None:
    """Write model.safetensors, run.json, the tokenizer's files and a named BERT's config.json: all anyone needs."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as partial:
        save_file(weights, partial)
    write_run_config(folder / "run.json", config)
    tokenizer.save(folder)
    if config.text_encoder.name and isinstance(model, CxrClip):
        model.text_tower.model.config.save_pretrained(folder)  # so that loading needs no hub


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[Net, Tokenizer, RunConfig]:
    """Read what ``save`` wrote, in eval mode; every key must match."""
    config = read_run_config(folder / "run.json")
    tokenizer = Tokenizer.load(folder, config.text_encoder.max_tokens)
    text = replace(config.text_encoder, name=str(folder)) if config.text_encoder.name else config.text_encoder
    model = build_model(replace(config, text_encoder=text), tokenizer, load_weights=False)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.to(device).eval(), tokenizer, config
