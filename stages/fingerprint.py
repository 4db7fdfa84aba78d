"""``python -m stages.fingerprint [DATASET ...]``: archives -> the stamps that DVC watches instead of them.

Not a stage of the graph: looking through millions of files on every ``dvc repro`` would take longer than what it saves.
Run it once before the first ``dvc repro`` and again after an archive has changed. Stamps outside data/fingerprints are
files of the archives themselves, and left alone.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.config.checks import STAMPS, check_stamps
from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.ingest import sources
from pipeline.storage.atomic import write_text
from stages import run


def main(*datasets: str) -> None:
    settings = load_params()
    for dataset in datasets or list(settings.sources):
        if dataset not in settings.sources:
            raise ParamsError(f"sources.{dataset}: no such source")
        source = settings.sources[dataset]
        stamp = Path(source.stamp)
        if stamp.parent != STAMPS:
            continue
        text = json.dumps(sources.archive_fingerprint(dataset, source), indent=1) + "\n"
        new = not stamp.is_file()
        changed = new or stamp.read_bytes() != text.encode()
        if changed:
            write_text(stamp, text)
        print(f"fingerprint {dataset}: {'new' if new else 'changed' if changed else 'the same'}")
    if not datasets:
        check_stamps(settings.sources)  # those that are files of an archive


if __name__ == "__main__":
    run("fingerprint", main, "[DATASET ...]")
