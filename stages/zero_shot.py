"""Stage ``zero_shot``: data/embeddings -> data/results/zero_shot/<run>/<seed>.json and .npz of every row."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.settings import ZeroShotSettings, load_machine, read_settings
from pipeline.evaluation import store
from pipeline.evaluation.protocols import load_protocols
from pipeline.evaluation.seen_images import load_seen_images
from pipeline.evaluation.zero_shot import evaluate_zero_shot
from pipeline.tracking import mlflow_runs
from stages import run


def main() -> None:
    settings, machine = read_settings(ZeroShotSettings, "zero_shot"), load_machine()
    out = Path("data/results/zero_shot")
    out.mkdir(parents=True, exist_ok=True)  # an output of the stage even if there is no run
    protocols, seen = load_protocols(settings.protocols, settings.own), load_seen_images(Path("data/audit"))
    for name, trained_on in settings.rows.items():
        with mlflow_runs.stage_run("zero_shot", name, settings.bootstrap, machine.tracking) as record:
            found = evaluate_zero_shot(
                store.embeddings_of(name),
                Path("data/index"),
                settings.sources,
                protocols,
                settings.bootstrap,
                settings.seed,
                seen,
                trained_on,
            )
            store.write_result(out / f"{name}.json", name, found)
            record.metrics(store.metric_values(found))
        store.print_metrics("zero_shot", name, found)


if __name__ == "__main__":
    run("zero_shot", main)
