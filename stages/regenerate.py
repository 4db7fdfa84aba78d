"""Stage ``regenerate@run-seed``: data/models/<run>/<seed>, test images and reports -> data/results/regeneration/."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.config.load import load_params
from pipeline.evaluation import protocols, regenerate, store
from pipeline.evaluation.device import evaluation_device
from pipeline.evaluation.seen_images import clean_images, load_seen_images
from pipeline.models.checkpoint import load_model
from pipeline.storage.memory import keep_memory
from pipeline.tracking import mlflow_runs


def main(name: str) -> None:
    keep_memory()
    params = load_params()
    device = evaluation_device(params.evaluate.threads)
    index, out = Path("data/index"), Path("data/results/regeneration") / f"{name}.json"
    ratios, most = params.evaluate.regeneration.ratios, params.evaluate.regeneration.images
    first = protocols.load_protocol(params.evaluate.protocols[0])
    sets = regenerate.rules(protocols.retrieval_sets(first, params.sources), params.sources)
    with mlflow_runs.stage_run("regenerate", name, params.evaluate, params.tracking.enabled) as record:
        net, tokenizer, run = load_model(Path("data/models") / name, device)
        filler = regenerate.of_network(net, tokenizer, device)
        found = regenerate.evaluate_regeneration(
            filler,
            run.image_size,
            params.evaluate.batch_size,
            index,
            sets,
            ratios,
            most,
            params.evaluate.bootstrap,
            params.seed,
            partial(clean_images, load_seen_images(Path("data/audit")), trained_on=run.datasets),
        )
        store.write_result(out, name, found)
        shown = regenerate.may_be_shown(index, sets, params.report.show_patient_data)
        examples = regenerate.regeneration_examples(filler, run.image_size, index, shown, ratios, most, params.seed)
        np.savez_compressed(out.with_suffix(".pictures.npz"), allow_pickle=False, **examples)
        record.metrics(store.metric_values(found))
    for line in regenerate.regeneration_lines(found):
        print(f"regenerate {name}: {line}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m stages.regenerate RUN SEED")
    try:
        main("/".join(sys.argv[1:3]))
    except (ValueError, OSError) as error:
        sys.exit(f"regenerate {'/'.join(sys.argv[1:3])}: {error}")
