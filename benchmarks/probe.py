"""The linear probe on cached features against the same probe that encodes every image anew in every epoch.

python -m benchmarks.probe [epochs]: after `make repro`, on its trained ResNet and its VinDr-CXR training images, as
phantoms are too few for a tenth of them. Both ways run whole, with the demo's recipe and ``epochs`` epochs (the paper's
300); each of ``REPETITIONS`` has its own seed. Encoding the validation and test images, which both need once, is not
counted. The last line is one JSON object: ``probe_ratio`` is seconds of the uncached way over those with ``DRAWS``
cached draws, ``auc_cached`` and ``auc_uncached`` the mean test AUCs.
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

from pipeline.config.load import load_params
from pipeline.evaluation import embed, protocols
from pipeline.evaluation.augmented import AugmentedViews
from pipeline.evaluation.labelled import Labelled, read_labelled
from pipeline.evaluation.linear_probe import CachedFeatures, cache_features, linear_probe
from pipeline.evaluation.metrics import aucs
from pipeline.evaluation.pictures import batches

DRAWS = 12
REPETITIONS = 3
RUN = "resnet_mcc"
MODEL = Path("data/models") / RUN / "0"


def measure(epochs: int = 300) -> dict[str, Any]:
    """Seconds and test AUCs of both ways, and their ratio."""
    settings = load_params()
    if not (MODEL / "model.safetensors").is_file():
        raise SystemExit(f"{MODEL}: not found; run: make repro")
    seed = settings.seed
    data = read_labelled(Path("data/index"), protocols.load_protocol(settings.evaluate.protocols[0]), "vindr_cxr")
    if data is None:
        raise SystemExit("data/index/vindr_cxr.parquet: a split has no study; run: make repro")
    embedder = embed.from_checkpoint(MODEL)
    recipe = replace(settings.evaluate.few_shot, draws=DRAWS)
    chosen = np.arange(len(data.labels["train"]))
    labels = data.labels["train"]
    valid, test = (embedder.over(embedder.features, data.views(s)) for s in ("valid", "test"))
    seconds: dict[str, list[float]] = {"uncached": [], "cached": []}
    found: dict[str, list[float]] = {"uncached": [], "cached": []}
    for repetition in range(REPETITIONS):
        own = seed + repetition

        def anew(epoch: int, own: int = own) -> np.ndarray:
            items = [(epoch, int(i)) for i in chosen]
            pictures = AugmentedViews(data.views("train"), embedder.size, settings.augment, own, embedder.prepare)
            with torch.inference_mode():
                parts = [items[i : i + 256] for i in range(0, len(items), 256)]
                return np.concatenate([embedder.features(x).numpy() for x, _ in batches(pictures, parts, 0, 256)])

        for way in ("uncached", "cached"):
            start = time.perf_counter()
            features = anew
            if way == "cached":
                work = Path("data/work/few_shot")
                cached = cache_features(*(embedder, data, [(chosen, epochs)], settings.augment, DRAWS, own, work))

                def features(epoch: int, own: int = own, cached: CachedFeatures = cached) -> np.ndarray:
                    return cached.epoch(epoch, chosen)

            layer = linear_probe(features, labels, valid, data.labels["valid"], epochs, recipe, own)
            seconds[way].append(time.perf_counter() - start)
            found[way].append(auc(layer, test, data))
    figures: dict[str, Any] = {"epochs": epochs, "draws": DRAWS, "images": len(chosen), "repetitions": REPETITIONS}
    for way in seconds:
        figures |= {f"{way}_s": round(sum(seconds[way]), 2), f"auc_{way}": round(float(np.mean(found[way])), 4)}
    figures["probe_ratio"] = round(sum(seconds["uncached"]) / sum(seconds["cached"]), 1)
    return figures


def auc(layer: torch.nn.Linear, test: np.ndarray, data: Labelled) -> float:
    """Of the test split, the mean over the classes that have one."""
    with torch.no_grad():
        scores = layer(torch.from_numpy(test)).double().numpy()
    truth = data.labels["test"]
    known = truth.any(axis=0) & ~truth.all(axis=0)
    return float(aucs(truth[:, known].T, scores[:, known].T, np.ones((1, len(scores)), dtype=np.uint16)).mean())


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))
