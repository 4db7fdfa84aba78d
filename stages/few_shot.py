"""Stage ``few_shot@run-seed``: data/models/<run>/<seed>, labelled sets, audit -> data/results/few_shot/<run>/<seed>."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.evaluation import embed, few_shot, protocols, store
from pipeline.evaluation.device import evaluation_device
from pipeline.evaluation.seen_images import load_seen_images
from pipeline.models.checkpoint import load_model
from pipeline.tracking import mlflow_runs


def main(name: str) -> None:
    params = load_params()
    device = evaluation_device(params.evaluate.threads)
    with mlflow_runs.stage_run("few_shot", name, params.evaluate, params.tracking.enabled) as record:
        net, tokenizer, run = load_model(Path("data/models") / name, device)
        options = params.evaluate.few_shot
        found = few_shot.evaluate_few_shot(
            embed.embedder_of(net, tokenizer, run.image_size, params.evaluate.batch_size),
            net.image_tower if run.name in options.fine_tune.runs else None,
            run.datasets,
            params.augment,
            Path("data/index"),
            protocols.load_protocol(params.evaluate.protocols[0]),
            list(params.sources),
            load_seen_images(Path("data/audit")),
            options,
            params.evaluate.bootstrap,
            params.seed,
            params.train.workers,
            Path("data/work/few_shot"),
        )
        store.write_result(Path("data/results/few_shot") / f"{name}.json", name, found)
        record.metrics(store.metric_values(found))
    store.print_metrics("few_shot", name, found)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m stages.few_shot RUN SEED")
    try:
        main("/".join(sys.argv[1:3]))
    except (ValueError, OSError) as error:
        sys.exit(f"few_shot {'/'.join(sys.argv[1:3])}: {error}")
