"""Stage ``retrieval``: data/embeddings -> data/results/retrieval/<run>/<seed>.json and .npz of every row."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.config.settings import RetrievalSettings, load_machine, read_settings
from pipeline.evaluation import protocols, store
from pipeline.evaluation.retrieval import evaluate_retrieval
from pipeline.evaluation.seen_images import clean_images, load_seen_images
from pipeline.tracking import mlflow_runs
from stages import run


def main() -> None:
    settings, machine = read_settings(RetrievalSettings, "retrieval"), load_machine()
    out = Path("data/results/retrieval")
    out.mkdir(parents=True, exist_ok=True)  # an output of the stage even if there is no run
    sets = protocols.retrieval_sets(protocols.first_protocol(settings.protocols, settings.own), settings.sources)
    seen = load_seen_images(Path("data/audit"))
    for name, trained_on in settings.rows.items():
        with mlflow_runs.stage_run("retrieval", name, settings.bootstrap, machine.tracking) as record:
            found = evaluate_retrieval(
                store.embeddings_of(name),
                Path("data/index"),
                settings.sources,
                sets,
                settings.k,
                settings.bootstrap,
                settings.seed,
                partial(clean_images, seen, trained_on=trained_on),
            )
            store.write_result(out / f"{name}.json", name, found)
            record.metrics(store.metric_values(found))
        store.print_metrics("retrieval", name, found)


if __name__ == "__main__":
    run("retrieval", main)
