"""Stage ``phantom@archive``: nothing -> data/phantom/<archive>, a synthetic archive in its public layout."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.settings import PhantomSettings, load_machine, read_settings
from pipeline.phantom.archives import write_archive
from pipeline.tracking import mlflow_runs
from stages import run


def main(archive: str) -> None:
    settings = read_settings(PhantomSettings, f"phantom/{archive}")
    root = Path("data/phantom") / archive
    with mlflow_runs.stage_run("phantom", archive, settings, load_machine().tracking) as record:
        mark = write_archive(archive, root, settings.studies, settings.size, settings.seed)
        record.metrics({"studies": mark["studies"], "files": mark["files"]})
    print(f"phantom {archive}: {mark['studies']} studies, {mark['files']} files in {root}")


if __name__ == "__main__":
    run("phantom", main, "ARCHIVE")
