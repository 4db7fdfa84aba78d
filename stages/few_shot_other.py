"""Stage ``few_shot_other@name``: somebody else's weights, labelled sets, audit -> data/results/few_shot/<name>."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import adapters
from pipeline.adapters.weights import MissingWeights
from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.evaluation import few_shot, protocols, store
from pipeline.evaluation.device import evaluation_device
from pipeline.evaluation.seen_images import load_seen_images
from pipeline.tracking import mlflow_runs


def main(name: str) -> None:
    params = load_params()
    try:
        other = params.others[name]
    except KeyError:
        raise ParamsError(f"others.{name}: no such model in params.yaml") from None
    device = evaluation_device(params.evaluate.threads)
    with mlflow_runs.stage_run("few_shot_other", name, params.evaluate, params.tracking.enabled) as record:
        try:
            found = few_shot.evaluate_few_shot(
                adapters.load_other(other, device, params.evaluate.batch_size),
                None,
                other.trained_on,
                params.augment,
                Path("data/index"),
                protocols.load_protocol(params.evaluate.protocols[0]),
                list(params.sources),
                load_seen_images(Path("data/audit")),
                params.evaluate.few_shot,
                params.evaluate.bootstrap,
                params.seed,
                params.train.workers,
                Path("data/work/few_shot"),
            )
        except MissingWeights as error:  # no failure: its cells show —
            found = few_shot.nothing(str(error))
        store.write_result(Path("data/results/few_shot") / f"{name}.json", name, found)
        record.metrics(store.metric_values(found))
    store.print_metrics("few_shot_other", name, found)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"few_shot_other {sys.argv[1]}: {error}")
