"""A model's checkpoint on disk, and the model that a run's parameters describe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from pipeline.config.places import without_places
from pipeline.config.run_config import RunConfig, read_run_config, write_run_config
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.mixed import MixedNet, build_mixed
from pipeline.models.weights_file import load_weights, save_weights
from pipeline.storage.atomic import write_text
from pipeline.text.tokenizer import MIN_PATIENTS, Tokenizer

WEIGHTS = "model.safetensors"
# What a folder of a model holds, and what whoever passes it on must know. The folder has nothing else.
NOTE = """# {name}

Trained on {datasets}. A model can remember what it was trained on: pass this folder on only as far as the terms of
these data sets allow it for the data themselves.

- `model.safetensors`: weights, with a digest
- `run.json`: parameters of the training
- `tokenizer.json`, `tokenizer_config.json` and, for some tokenizers, `vocab.txt` or `special_tokens_map.json`: the
  vocabulary. If it was learnt from reports, it has the words that reports of at least {patients} patients have, and
  single letters
- `config.json`: of a text encoder that was not built here
"""
Net = CxrClip | MixedNet  # what a run trains and evaluation reads: no other module asks which of them it has


def save_model(model: Net, tokenizer: Tokenizer, config: RunConfig, folder: Path) -> None:
    """Write model.safetensors, run.json, the tokenizer's files and a named BERT's config.json: all anyone needs; and
    README.md, which says so."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / WEIGHTS, model.state_dict())
    name = without_places(config.text_encoder.name)
    image = config.image_encoder and replace(config.image_encoder, weights=without_places(config.image_encoder.weights))
    text = replace(config.text_encoder, name=name)
    write_run_config(folder / "run.json", replace(config, text_encoder=text, image_encoder=image))
    tokenizer.save(folder)
    model.save_configs(folder)
    note = NOTE.format(name=config.name, datasets=", ".join(config.datasets), patients=MIN_PATIENTS)
    write_text(folder / "README.md", note)


def load_model(folder: Path, device: torch.device | str = "cpu") -> tuple[Net, Tokenizer, RunConfig]:
    """Read what ``save_model`` wrote, in eval mode; every key must match.

    Raises:
        DamagedWeights: the weights are not as they were written.
    """
    config = read_run_config(folder / "run.json")
    tokenizer = Tokenizer.load(folder, config.text_encoder.max_tokens)
    text = replace(config.text_encoder, name=str(folder)) if config.text_encoder.name else config.text_encoder
    config_here = replace(config, text_encoder=text)
    model: Net = (
        build_mixed(config_here, tokenizer)
        if config.mixed
        else CxrClip(config_here, len(tokenizer), load_weights=False)
    )
    model.load_state_dict(load_weights(folder / WEIGHTS), strict=True)
    return model.to(device).eval(), tokenizer, config
