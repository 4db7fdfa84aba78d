"""Stages ``embed``, all of our models in one process, and ``embed_other``: test images -> data/embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.adapters import load_other
from pipeline.adapters.weights import MissingWeights
from pipeline.config.settings import EmbedOtherSettings, EmbedSettings, load_machine, read_settings
from pipeline.evaluation import embed, store
from pipeline.evaluation.device import evaluation_device
from pipeline.storage.unchanged import inputs_digest, is_current, mark_current
from pipeline.tracking import mlflow_runs
from stages import code_of, run

INDEX = Path("data/index")


def main(rows: str, name: str = "") -> None:
    machine, device = (found := load_machine()), evaluation_device(found.threads)
    if rows == "other":
        settings = read_settings(EmbedOtherSettings, f"embed/other/{name}")
        with mlflow_runs.stage_run("embed_other", name, settings.other, machine.tracking) as record:
            try:
                other = load_other(settings.other, device, machine.batch_size)
                other = replace(other, workers=machine.loader_workers)
                record.metrics(embed.embed_other(other, settings, INDEX, store.embeddings_of(name)))
            except MissingWeights as error:  # no failure: its cells show —
                store.write_missing(store.embeddings_of(name), str(error))
                print(f"embed_other {name}: skipped: {error}")
        return
    ours = read_settings(EmbedSettings, "embed/runs")
    store.forget_other_runs(ours.runs)
    for row in ours.runs:
        model, out = Path("data/models") / row, store.embeddings_of(row)
        inputs = [model, *(INDEX / f"{d}.parquet" for d in ours.test_sets), *code_of("embed")]
        if is_current(
            out, digest := inputs_digest(inputs, repr((ours.test_sets, ours.map_sets, ours.protocols, ours.own)))
        ):
            print(f"embed {row}: as it was")
            continue
        with mlflow_runs.stage_run("embed", row, {"protocols": ours.protocols}, machine.tracking) as record:
            record.metrics(embed.embed_run(model, ours, INDEX, out, device, machine.batch_size, machine.loader_workers))
            mark_current(out, digest)
        print(f"embed {row}: " + (f"skipped: {why}" if (why := store.why_missing(out)) else "done"))


if __name__ == "__main__":
    run("embed", main, "runs | other NAME")
