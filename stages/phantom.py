"""Stage ``phantom``: nothing -> data/phantom/<archive>, synthetic archives in public layouts, and their stamps."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.settings import PhantomSettings, load_machine, read_settings
from pipeline.phantom.archives import MARK, is_whole, write_archive
from pipeline.storage.atomic import emptied, write_text
from pipeline.storage.unchanged import NOTE, inputs_digest, is_current, mark_current
from pipeline.tracking import mlflow_runs
from stages import code_of, run

ROOT = Path("data/phantom")


def main() -> None:
    settings, machine = read_settings(PhantomSettings, "phantom"), load_machine()
    stamps = emptied(ROOT / "stamps")
    for archive, studies in settings.archives.items():
        root, how = ROOT / archive, (studies, settings.size, settings.seed)
        digest = inputs_digest(code_of("phantom"), repr(how))
        if is_current(root, digest) and is_whole(root, NOTE):
            print(f"phantom {archive}: as it was")
        else:
            with mlflow_runs.stage_run("phantom", archive, settings, machine.tracking) as record:
                mark = write_archive(archive, root, *how)
                mark_current(root, digest)
                record.metrics({"studies": mark["studies"], "files": mark["files"]})
            print(f"phantom {archive}: {mark['studies']} studies, {mark['files']} files in {root}")
        write_text(stamps / f"{archive}.json", (root / MARK).read_text(encoding="utf-8"))


if __name__ == "__main__":
    run("phantom", main)
