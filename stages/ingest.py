"""Stage ``ingest@dataset``: one archive -> data/shards/<dataset>, data/index/<dataset>.{parquet,json}."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.checks import check_stamps
from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.ingest.build import IngestError, ingest_archive
from pipeline.ingest.sources import SourceError
from pipeline.tracking import mlflow_runs


def main(dataset: str) -> None:
    try:
        settings = load_params()
        if dataset not in settings.sources:
            raise ParamsError(f"sources.{dataset}: missing; add where the archive lies to params.yaml")
        check_stamps({dataset: settings.sources[dataset]})
        with mlflow_runs.stage_run("ingest", dataset, settings.ingest, enabled=settings.tracking.enabled) as run:
            shards, index = Path("data/shards") / dataset, Path("data/index") / f"{dataset}.parquet"
            work = Path("data/work") / dataset
            source = settings.sources[dataset]
            summary = ingest_archive(dataset, source, settings.ingest, shards, index, work, settings.seed)
            counts = ("found_images", "written_images", "rejected_images")
            run.metrics({name: float(summary[name]) for name in counts})
            for split, listed in summary["listed"].items():
                run.metrics({f"{split}_{unit}": float(n) for unit, n in listed.items()})
    except (ParamsError, SourceError, IngestError) as error:
        sys.exit(f"ingest: {error}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m stages.ingest DATASET")
    main(sys.argv[1])
