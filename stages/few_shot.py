"""Stage ``few_shot@run``: data/models/<run> and the labelled sets -> data/results/few_shot/<run>.json."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pipeline import evaluation, few_shot, model, protocols, tracking
from pipeline import params as config


def main(name: str) -> None:
    params = config.load()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tracking.stage_run("few_shot", name, params.evaluate, params.tracking.enabled) as record:
        net, _, run = model.load(Path("data/models") / name, device)
        found = few_shot.evaluate(
            net,
            run.image_size,
            params.augment,
            Path("data/index"),
            protocols.load(params.evaluate.protocols[0]),
            list(params.sources),
            params.evaluate.few_shot,
            params.evaluate.bootstrap,
            params.evaluate.batch_size,
            device,
            params.seed,
        )
        evaluation.write(Path("data/results/few_shot") / f"{name}.json", name, found)
        record.metrics(evaluation.values(found))
    evaluation.show("few_shot", name, found)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(f"few_shot {sys.argv[1]}: {error}")
