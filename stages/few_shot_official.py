"""Stage ``few_shot_official@run-seed``: as ``few_shot``, on ChestX-ray14's official lists -> data/results/official/."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.datasets import used_for
from pipeline.evaluation import embed, few_shot, protocols, store
from pipeline.evaluation.device import evaluation_device
from pipeline.evaluation.seen_images import load_seen_images
from pipeline.models.checkpoint import load_model
from pipeline.tracking import mlflow_runs


def main(name: str) -> None:
    params = load_params()
    (dataset,) = used_for("official_classification")
    device = evaluation_device(params.evaluate.threads)
    with mlflow_runs.stage_run("few_shot_official", name, params.evaluate, params.tracking.enabled) as record:
        net, tokenizer, run = load_model(Path("data/models") / name, device)
        options = few_shot.with_shares(params.evaluate.few_shot, params.evaluate.official.shares)
        found = few_shot.evaluate_few_shot(
            embed.embedder_of(net, tokenizer, run.image_size, params.evaluate.batch_size),
            net.image_tower if options.fine_tune.shares else None,
            run.datasets,
            params.augment,
            Path("data/index"),
            protocols.measuring(params.evaluate.protocols, dataset),
            list(params.sources),
            load_seen_images(Path("data/audit")),
            options,
            params.evaluate.bootstrap,
            params.seed,
            params.train.workers,
            Path("data/work/few_shot"),
            (dataset,),
        )
        store.write_result(Path("data/results/official") / f"{name}.json", name, found)
        record.metrics(store.metric_values(found))
    store.print_metrics("few_shot_official", name, found)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m stages.few_shot_official RUN SEED")
    try:
        main("/".join(sys.argv[1:3]))
    except (ValueError, OSError) as error:
        sys.exit(f"few_shot_official {'/'.join(sys.argv[1:3])}: {error}")
