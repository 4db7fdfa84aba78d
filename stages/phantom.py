"""Stage: draw one phantom archive. Usage: python stages/phantom.py ARCHIVE."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import params
from pipeline.phantom import archives


def main() -> None:
    settings = params.load()
    archive = sys.argv[1]
    root = Path(settings.sources[archive].path)
    mark = archives.write(archive, root, settings.phantom.archives[archive], settings.phantom.size, settings.seed)
    print(f"phantom {archive}: {mark['studies']} studies, {mark['files']} files in {root}")


if __name__ == "__main__":
    main()
