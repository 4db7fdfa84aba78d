"""Other people's models as ``Embedder``s, one module a project; weights are in a local folder and no hub is asked.

docs/models.md says what each module expects, and where its facts come from.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from pipeline.config.params import Other
from pipeline.evaluation.embedder import Embedder
from pipeline.storage.model_folder import offline


def load_other(other: Other, device: torch.device | str = "cpu", batch_size: int = 256) -> Embedder:
    """The model of one entry of params ``others``, in eval mode.

    Raises:
        MissingWeights: a file it needs is not there; one line says which and where it goes.
        ValueError: a file is not what it should be; one line.
    """
    # By name: a stage depends on the module of its own adapter only, and each module is found by its name.
    module = import_module(f"pipeline.adapters.{other.adapter}")
    load = getattr(module, f"load_{other.adapter}")
    with offline():
        embedder: Embedder = load(Path(other.weights), torch.device(device))
    return replace(embedder, batch_size=batch_size)
