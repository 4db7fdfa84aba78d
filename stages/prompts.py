"""Stage ``prompts``: data/index/<dataset>.parquet -> data/prompts/{file,ablation}/<dataset>.json, its sentences."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.settings import PromptSettings, load_machine, read_settings
from pipeline.storage.index import label_classes
from pipeline.text.prompts import PromptError, load_templates
from pipeline.tracking import mlflow_runs
from stages import run

OUT = Path("data/prompts")


def main() -> None:
    settings = read_settings(PromptSettings, "prompts")
    OUT.mkdir(parents=True, exist_ok=True)  # an output of the stage even if no label data set is among sources
    with mlflow_runs.stage_run("prompts", "all", settings, load_machine().tracking) as record:
        for kind, file in (("file", settings.file), ("ablation", settings.ablation)):
            templates = load_templates(Path(file))
            for dataset in settings.datasets:
                classes = label_classes(Path("data/index") / f"{dataset}.parquet")
                try:
                    pools = (templates.with_defaults(classes) if dataset in settings.own else templates).subset(classes)
                except PromptError as error:
                    raise PromptError(f"{dataset}: {error}") from None
                pools.write_pools(OUT / kind / f"{dataset}.json")
                count = sum(len(pool) for values in pools.pools.values() for pool in values.values())
                record.metrics({f"{kind}.{dataset}.classes": len(pools.pools), f"{kind}.{dataset}.sentences": count})
                print(f"prompts {kind} {dataset}: {len(pools.pools)} classes, {count} sentences")


if __name__ == "__main__":
    run("prompts", main)
