"""The linear probe on cached features against the same probe that encodes every image anew in every epoch.

python -m benchmarks.probe [epochs]: phantom RSNA studies of the demo's size are drawn and ingested in a temporary
folder; the encoder is the demo's ResNet with weights of the seed. Both ways run whole, one after the other, on the same
subset (``SHARE`` of the training images), with the demo's recipe and ``epochs`` epochs (the paper's 300); encoding the
validation and test images, which both need once, is not counted. The last line is one JSON object: ``probe_ratio`` is
seconds of the uncached way over those with ``DRAWS`` cached draws, ``auc_cached`` and ``auc_uncached`` the test AUCs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.few_shot import cache_features, features_of, linear_probe
from pipeline.ingest import ingest
from pipeline.labelled import AugmentedViews, Labelled, batches, read_labelled, subset
from pipeline.metrics import weighted_auc
from pipeline.model import CxrClip
from pipeline.params import load, run_config
from pipeline.phantom import archives

STUDIES = 400  # of which 70 % train, as in the demo
SHARE = 0.1
DRAWS = 5
RUN = "resnet_mcc"


def measure(epochs: int = 300) -> dict[str, Any]:
    """Seconds and test AUCs of both ways, and their ratio."""
    settings = load()
    run = run_config(settings, RUN)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        prompts = here / settings.evaluate.zero_shot
        try:
            os.chdir(folder)  # shards are addressed relative to the working directory
            archives.write("rsna", Path("rsna"), STUDIES, settings.phantom.size, settings.seed)
            source = replace(settings.sources["rsna"], path="rsna", stamp="rsna/PHANTOM.json")
            options = replace(settings.ingest, workers=1)
            ingest("rsna", source, options, Path("data/shards/rsna"), Path("rsna.parquet"), Path("work"), settings.seed)
            data = read_labelled(Path(), prompts, "rsna")
            if data is None:
                raise ValueError("the phantom has an empty split")
            torch.manual_seed(settings.seed)
            embedder = features_of(CxrClip(run, 100).eval(), run.image_size, 256, torch.device("cpu"))
            recipe = replace(settings.evaluate.few_shot, draws=DRAWS)
            chosen = subset(data.labels["train"], SHARE, settings.seed, recipe.subset)
            labels = data.labels["train"][chosen]
            valid, test = (
                embedder.over(embedder.features, data.views(s), embedder.prepare_at) for s in ("valid", "test")
            )
            figures: dict[str, Any] = {"epochs": epochs, "draws": DRAWS, "images": len(chosen)}

            def anew(epoch: int) -> np.ndarray:
                items = [(epoch, int(i)) for i in chosen]
                pictures = AugmentedViews(
                    data.views("train"), items, run.image_size, settings.augment, settings.seed, embedder.prepare
                )
                with torch.inference_mode():
                    rows = [embedder.features(x).numpy() for x, _ in batches(pictures, [list(range(len(items)))], 0)]
                return np.concatenate(rows)

            for way in ("uncached", "cached"):
                start = time.perf_counter()
                features = anew
                if way == "cached":
                    cached = cache_features(
                        *(embedder, data, [(chosen, epochs)], run.image_size, settings.augment, DRAWS),
                        *(settings.seed, 0, Path("work")),
                    )

                    def features(epoch: int, cached: Any = cached) -> np.ndarray:
                        found: np.ndarray = cached.epoch(epoch, chosen)
                        return found

                layer = linear_probe(features, labels, valid, data.labels["valid"], epochs, recipe, settings.seed)
                figures[f"{way}_s"] = round(time.perf_counter() - start, 2)
                figures[f"auc_{way}"] = round(auc(layer, test, data), 4)
        finally:
            os.chdir(here)
    figures["probe_ratio"] = round(figures["uncached_s"] / figures["cached_s"], 1)
    return figures


def auc(layer: torch.nn.Linear, test: np.ndarray, data: Labelled) -> float:
    """Of the test split."""
    with torch.no_grad():
        scores = layer(torch.from_numpy(test))[:, 0].double().numpy()
    return float(weighted_auc(data.labels["test"][:, 0], scores, np.ones((1, len(scores))))[0])


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))
