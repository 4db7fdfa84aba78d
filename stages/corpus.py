"""Stage ``corpus``: indexes, prompts, translations -> data/corpus/<run>/ of every run, all its training depends on."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.settings import FOLDER, CorpusSettings, load_machine, read_settings
from pipeline.tracking import mlflow_runs
from pipeline.training.corpus import write_corpus
from stages import run


def main() -> None:
    out = Path("data/corpus")
    out.mkdir(parents=True, exist_ok=True)  # an output of the stage even if there is no run
    for name in sorted(path.stem for path in (FOLDER / "corpus").glob("*.json")):
        settings = read_settings(CorpusSettings, f"corpus/{name}")
        with mlflow_runs.stage_run("corpus", name, settings.config, load_machine().tracking) as record:
            prompts, translations = Path("data/prompts") / settings.prompts, Path("data/back_translation")
            counts = write_corpus(settings.config, Path("data/index"), prompts, out / name, translations)
            record.metrics({key: float(value) for key, value in counts.items()})
        print(f"corpus {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    run("corpus", main)
