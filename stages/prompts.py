"""Stage ``prompts``: data/index/<dataset>.parquet -> data/prompts/{file,ablation}/<dataset>.json, its sentences."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.datasets import captioned
from pipeline.text import prompts
from pipeline.tracking import mlflow_runs

INDEX = Path("data/index")
OUT = Path("data/prompts")


def main() -> None:
    params = load_params()
    OUT.mkdir(parents=True, exist_ok=True)  # an output of the stage even where no label data set is among sources
    with mlflow_runs.stage_run("prompts", "all", params=params.prompts, enabled=params.tracking.enabled) as run:
        for kind, file in (("file", params.prompts.file), ("ablation", params.prompts.ablation)):
            templates = prompts.load_templates(Path(file))
            for dataset in [name for name in captioned() if name in params.sources]:
                try:
                    pools = templates.subset(label_classes(INDEX / f"{dataset}.parquet"))
                except prompts.PromptError as error:
                    raise prompts.PromptError(f"{dataset}: {error}") from None
                pools.write_pools(OUT / kind / f"{dataset}.json")
                count = sum(len(pool) for values in pools.pools.values() for pool in values.values())
                run.metrics({f"{kind}.{dataset}.classes": len(pools.pools), f"{kind}.{dataset}.sentences": count})
                print(f"prompts {kind} {dataset}: {len(pools.pools)} classes, {count} sentences")


def label_classes(index: Path) -> set[str]:
    """Names of all classes that any study of an index has a label for."""
    if not index.exists():
        raise prompts.PromptError(f"{index} not found; the ingest stage writes it (dvc repro ingest)")
    labels = pq.read_table(index, columns=["labels"])["labels"]
    return {name for chunk in labels.chunks for name in chunk.keys.unique().to_pylist()}


if __name__ == "__main__":
    try:
        main()
    except (ParamsError, prompts.PromptError) as error:
        sys.exit(f"prompts: {error}")
