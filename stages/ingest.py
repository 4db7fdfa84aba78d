"""Stage ``ingest@dataset``: one archive -> data/shards/<dataset>, data/index/<dataset>.{parquet,json}."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config.settings import IngestSettings, load_machine, read_settings
from pipeline.ingest.build import ingest_archive
from pipeline.tracking import mlflow_runs
from stages import run


def main(dataset: str) -> None:
    settings, machine = read_settings(IngestSettings, f"ingest/{dataset}"), load_machine()
    with mlflow_runs.stage_run("ingest", dataset, settings.options, machine.tracking) as record:
        shards, index = Path("data/shards") / dataset, Path("data/index") / f"{dataset}.parquet"
        options = replace(settings.options, workers=machine.ingest_workers, scheduler=machine.scheduler)
        work = Path("data/work") / dataset
        summary = ingest_archive(dataset, settings.source, options, shards, index, work, settings.seed)
        counts = ("found_images", "written_images", "rejected_images")
        record.metrics({name: float(summary[name]) for name in counts})
        for split, listed in summary["listed"].items():
            record.metrics({f"{split}_{unit}": float(n) for unit, n in listed.items()})


if __name__ == "__main__":
    run("ingest", main, "DATASET")
