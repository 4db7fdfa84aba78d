"""``python -m stages.describe LIST [FOLDER]``: what a list of images of your own holds, before anything is decoded.

FOLDER is what the list's images are named from, else the list's own folder. Shows no name and no text.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pipeline.config.archive_params import Headings
from pipeline.ingest.describe import card
from stages import run


def main(path: str, folder: str = "") -> None:
    if not Path(path).is_file():
        sys.exit(f"describe: {path}: not found")
    root = Path(folder) if folder else Path(path).parent
    if not Path(path).absolute().is_relative_to(root.absolute()):
        sys.exit(f"describe: {path}: not below {root}; the list has to be in the folder of its images")
    with tempfile.TemporaryDirectory() as cache:
        print(card(Path(path), root, Path(cache), Headings()))


if __name__ == "__main__":
    run("describe", main, "LIST [FOLDER]")
