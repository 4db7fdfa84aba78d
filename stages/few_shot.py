"""Stage ``few_shot@run-seed``: data/models/<run>/<seed>, labelled sets, audit -> data/results/few_shot/<run>/<seed>."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import embed, evaluation, few_shot, model, protocols, tracking
from pipeline import params as config
from pipeline.clean import load_seen


def main(name: str) -> None:
    params = config.load()
    device = evaluation.device(params.evaluate.threads)
    with tracking.stage_run("few_shot", name, params.evaluate, params.tracking.enabled) as record:
        net, tokenizer, run = model.load(Path("data/models") / name, device)
        options = params.evaluate.few_shot
        found = few_shot.evaluate(
            embed.of_model(net, tokenizer, run.image_size, params.evaluate.batch_size),
            net.image_tower if run.name in options.fine_tune.runs else None,
            run.datasets,
            params.augment,
            Path("data/index"),
            protocols.load(params.evaluate.protocols[0]),
            list(params.sources),
            load_seen(Path("data/audit")),
            options,
            params.evaluate.bootstrap,
            params.seed,
            params.train.workers,
            Path("data/work/few_shot"),
        )
        evaluation.write(Path("data/results/few_shot") / f"{name}.json", name, found)
        record.metrics(evaluation.values(found))
    evaluation.show("few_shot", name, found)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m stages.few_shot RUN SEED")
    try:
        main("/".join(sys.argv[1:3]))
    except (ValueError, OSError) as error:
        sys.exit(f"few_shot {'/'.join(sys.argv[1:3])}: {error}")
