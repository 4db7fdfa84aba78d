"""Stage ``regenerate@run-seed``: data/models/<run>/<seed>, test images and reports -> data/results/regeneration/."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.config.settings import RegenerateSettings, load_machine, read_settings
from pipeline.evaluation import protocols, regenerate, store
from pipeline.evaluation.device import evaluation_device
from pipeline.evaluation.seen_images import clean_images, load_seen_images
from pipeline.models.checkpoint import load_model
from pipeline.storage.memory import keep_memory
from pipeline.tracking import mlflow_runs
from stages import run


def main(run_name: str, seed: str) -> None:
    keep_memory()
    settings, machine, name = read_settings(RegenerateSettings, "regenerate"), load_machine(), f"{run_name}/{seed}"
    index, out = Path("data/index"), Path("data/results/regeneration") / f"{name}.json"
    how = settings.ratios, settings.images
    first = protocols.first_protocol(settings.protocols, settings.own)
    sets = regenerate.rules(protocols.retrieval_sets(first, settings.sources), settings.test_sets)
    with mlflow_runs.stage_run("regenerate", name, settings, machine.tracking) as record:
        net, tokenizer, config = load_model(Path("data/models") / name, device := evaluation_device(machine.threads))
        filler, size = regenerate.of_network(net, tokenizer, device), config.image_size
        clean = partial(clean_images, load_seen_images(Path("data/audit")), trained_on=config.datasets)
        found = regenerate.evaluate_regeneration(
            filler, size, machine.batch_size, index, sets, *how, settings.bootstrap, settings.seed, clean
        )
        store.write_result(out, name, found)
        shown = regenerate.may_be_shown(index, sets, settings.show_patient_data)
        examples = regenerate.regeneration_examples(filler, size, index, shown, *how, settings.seed)
        store.write_arrays(out.with_suffix(".pictures.npz"), examples)
        record.metrics(store.metric_values(found))
    for line in regenerate.regeneration_lines(found):
        print(f"regenerate {name}: {line}")


if __name__ == "__main__":
    run("regenerate", main, "RUN SEED")
