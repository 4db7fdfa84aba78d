"""Stage ``back_translate``: data/index/<dataset>.parquet -> data/back_translation, training reports in other words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pipeline.config.settings import BackTranslationSettings, load_machine, read_settings
from pipeline.text.back_translation import back_translate
from pipeline.tracking import mlflow_runs
from stages import run


def main() -> None:
    settings, machine = read_settings(BackTranslationSettings, "back_translate"), load_machine()
    options = replace(settings.options, workers=machine.translation_workers, device=machine.translation_device)
    with mlflow_runs.stage_run("back_translate", "all", settings.options, machine.tracking) as record:
        indexes = [Path("data/index") / f"{dataset}.parquet" for dataset in settings.sources]
        out, work = Path("data/back_translation"), Path("data/work/back_translation")
        summary = back_translate(options, settings.seed, indexes, out, work, settings.captioned)
        note = summary.pop("note", "")
        record.metrics({key: float(value) for key, value in summary.items()})
    print("back_translate: " + (note or ", ".join(f"{key} {value}" for key, value in summary.items())))


if __name__ == "__main__":
    run("back_translate", main)
