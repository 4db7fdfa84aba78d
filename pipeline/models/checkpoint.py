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

Net = CxrClip | MixedNet  # what a run trains and evaluation reads: no other module asks which of them it has


def save_model(model: Net, tokenizer: Tokenizer, config: RunConfig, folder: Path) -> None:
    """Write model.safetensors, run.json, the tokenizer's files and a named BERT's config.json: all anyone needs."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as partial:
        save_file(weights, partial)
    write_run_config(folder / "run.json", config)
    tokenizer.save(folder)
    model.save_configs(folder)


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[Net, Tokenizer, RunConfig]:
    """Read what ``save_model`` wrote, in eval mode; every key must match."""
    config = read_run_config(folder / "run.json")
    tokenizer = Tokenizer.load(folder, config.text_encoder.max_tokens)
    text = replace(config.text_encoder, name=str(folder)) if config.text_encoder.name else config.text_encoder
    config_here = replace(config, text_encoder=text)
    model: Net = (
        build_mixed(config_here, tokenizer)
        if config.mixed
        else CxrClip(config_here, len(tokenizer), load_weights=False)
    )
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.to(device).eval(), tokenizer, config
