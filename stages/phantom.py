"""Stage ``phantom@archive``: nothing -> data/phantom/<archive>, a synthetic archive in its public layout."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.phantom import archives
from pipeline.tracking import mlflow_runs


def main(archive: str) -> None:
    params = load_params()
    root = Path("data/phantom") / archive
    with mlflow_runs.stage_run("phantom", archive, params.phantom, params.tracking.enabled) as record:
        mark = archives.write_archive(archive, root, params.phantom.archives[archive], params.phantom.size, params.seed)
        record.metrics({"studies": mark["studies"], "files": mark["files"]})
    print(f"phantom {archive}: {mark['studies']} studies, {mark['files']} files in {root}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"phantom {sys.argv[1]}: {error}")
