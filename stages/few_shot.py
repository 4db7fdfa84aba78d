"""Stages ``few_shot``, ``few_shot_official`` and ``few_shot_other``: linear probe and fine-tuning of one model.

Model, labelled test sets, audit -> data/results/few_shot/<run>/<seed> (or <name>), official/<run>/<seed>: .json, .npz
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.adapters import load_other
from pipeline.adapters.weights import MissingWeights
from pipeline.config.settings import FewShotSettings, load_machine, read_settings
from pipeline.evaluation import few_shot, store
from pipeline.evaluation.device import evaluation_device
from pipeline.evaluation.embed import embedder_of
from pipeline.evaluation.protocols import probed
from pipeline.evaluation.seen_images import load_seen_images
from pipeline.models.checkpoint import load_model
from pipeline.tracking import mlflow_runs
from stages import run

RESULTS = {"main": "few_shot", "official": "official", "other": "few_shot"}  # folders below data/results


def main(rows: str, name: str, seed: str = "") -> None:
    settings, machine = read_settings(FewShotSettings, f"few_shot/{rows}/{name}"), load_machine()
    device, place = evaluation_device(machine.threads), f"{name}/{seed}".rstrip("/")
    stage = "few_shot" if rows == "main" else f"few_shot_{rows}"
    with mlflow_runs.stage_run(stage, place, settings.options, machine.tracking) as record:
        try:
            if settings.other:
                tower, embedder = None, load_other(settings.other, device, machine.batch_size)
            else:
                net, tokenizer, config = load_model(Path("data/models") / place, device)
                embedder = embedder_of(net, tokenizer, config.image_size, machine.batch_size)
                tower = net.image_tower if settings.options.fine_tune.shares else None
            protocol = probed(settings.protocols, settings.test_sets, settings.own)
            places = Path("data/index"), load_seen_images(Path("data/audit")), Path("data/work/few_shot")
            ready = replace(embedder, workers=machine.loader_workers)
            found = few_shot.evaluate_few_shot(ready, tower, protocol, settings, *places)
        except MissingWeights as error:  # no failure: its cells show —
            found = few_shot.nothing(str(error))
        store.write_result(Path("data/results") / RESULTS[rows] / f"{place}.json", place, found)
        record.metrics(store.metric_values(found))
    store.print_metrics(stage, place, found)


if __name__ == "__main__":
    run("few_shot", main, "main RUN SEED | official RUN SEED | other NAME")
