"""Other people's models as ``Embedder``s, one module a project; weights are in a local folder and no hub is asked.

docs/models.md says what each module expects, and where its facts come from.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch

from pipeline.config.params import Other
from pipeline.evaluation.embedder import Embedder
from pipeline.storage.model_folder import offline, one_line
from pipeline.storage.torch_archive import Refused

LARGEST_INPUT = 3 * 1024**2  # numbers of a picture as a model takes it


def load_other(other: Other, device: torch.device | str = "cpu", batch_size: int = 256) -> Embedder:
    """The model of one entry of params ``others``, in eval mode.

    Raises:
        MissingWeights: a file it needs is not there; one line says which and where it goes.
        ValueError: a file is not what it should be; one line.
    """
    # By name: a stage depends on the module of its own adapter only, and each module is found by its name.
    module = import_module(f"pipeline.adapters.{other.adapter}")
    load = getattr(module, f"load_{other.adapter}")
    folder = Path(other.weights)
    with offline():
        embedder: Embedder = load(folder, torch.device(device))
        with one_line(f"{folder}: ", "the model embeds no picture and text", kind=ValueError):
            _try(embedder)
    return replace(embedder, batch_size=batch_size)


def _try(embedder: Embedder) -> None:
    """Embed a picture and a text: what a configuration states wrongly shows here, before anything large is read.

    Raises:
        Refused: inputs are larger than any model's. Others: of any class.
    """
    inputs = embedder.prepare(np.tile(np.arange(64, dtype=np.uint8), (80, 1)))
    if inputs.size > LARGEST_INPUT:
        raise Refused("pictures are prepared larger than any model's")
    with torch.inference_mode():
        rows = embedder.encode_images(torch.from_numpy(inputs[None]).to(embedder.device))
        texts = embedder.encode_texts(["Clear lungs."])
    if rows.ndim != 2 or rows.shape != texts.shape or not (rows.isfinite().all() and texts.isfinite().all()):
        raise Refused("a picture and a text do not become rows of one space")
