"""The linear probe on cached features against the same probe that encodes every image anew in every epoch.

python -m benchmarks.probe [epochs]: after `make repro`, on its trained ResNet and its RSNA studies. Both ways run
whole, one after the other, on one subset (``SHARE`` of the images), with the demo's recipe and ``epochs`` epochs
(the paper's 300); encoding the validation and test images, which both need once, is not counted. The last line is one
JSON object: ``probe_ratio`` is seconds of the uncached way over those with ``DRAWS`` cached draws, ``auc_cached`` and
``auc_uncached`` the test AUCs.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import embed, protocols
from pipeline.few_shot import cache_features, linear_probe
from pipeline.labelled import AugmentedViews, Labelled, batches, read_labelled, subset
from pipeline.metrics import weighted_auc
from pipeline.params import load, run_config

SHARE = 0.1
DRAWS = 10
RUN = "resnet_mcc"


def measure(epochs: int = 300) -> dict[str, Any]:
    """Seconds and test AUCs of both ways, and their ratio."""
    settings = load()
    if not (Path("data/models") / RUN / "model.safetensors").is_file():
        raise SystemExit(f"data/models/{RUN}: not found; run: make repro")
    size, seed = run_config(settings, RUN).image_size, settings.seed
    data = read_labelled(Path("data/index"), protocols.load(settings.evaluate.protocols[0]), "rsna")
    if data is None:
        raise SystemExit("data/index/rsna.parquet: a split has no study; run: make repro")
    embedder = embed.from_checkpoint(Path("data/models") / RUN)
    recipe = replace(settings.evaluate.few_shot, draws=DRAWS)
    chosen = subset(data.labels["train"], SHARE, seed, recipe.subset)
    valid, test = (embedder.over(embedder.features, data.views(s), embedder.prepare_at) for s in ("valid", "test"))
    figures: dict[str, Any] = {"epochs": epochs, "draws": DRAWS, "images": len(chosen)}

    def anew(epoch: int) -> np.ndarray:
        items = [(epoch, int(i)) for i in chosen]
        pictures = AugmentedViews(data.views("train"), items, size, settings.augment, seed, embedder.prepare)
        with torch.inference_mode():
            rows = [embedder.features(x).numpy() for x, _ in batches(pictures, [list(range(len(items)))], 0)]
        return np.concatenate(rows)

    for way in ("uncached", "cached"):
        start = time.perf_counter()
        features = anew
        if way == "cached":
            cached = cache_features(
                *(
                    embedder,
                    data,
                    [(chosen, epochs)],
                    size,
                    settings.augment,
                    DRAWS,
                    seed,
                    0,
                    Path("data/work/few_shot"),
                )
            )

            def features(epoch: int, cached: Any = cached) -> np.ndarray:
                found: np.ndarray = cached.epoch(epoch, chosen)
                return found

        labels = data.labels["train"][chosen]
        layer = linear_probe(features, labels, valid, data.labels["valid"], epochs, recipe, seed)
        figures[f"{way}_s"] = round(time.perf_counter() - start, 2)
        figures[f"auc_{way}"] = round(auc(layer, test, data), 4)
    figures["probe_ratio"] = round(figures["uncached_s"] / figures["cached_s"], 1)
    return figures


def auc(layer: torch.nn.Linear, test: np.ndarray, data: Labelled) -> float:
    """Of the test split."""
    with torch.no_grad():
        scores = layer(torch.from_numpy(test))[:, 0].double().numpy()
    return float(weighted_auc(data.labels["test"][:, 0], scores, np.ones((1, len(scores))))[0])


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))
