"""``python -m stages.experiments [NAME ...]``: experiments -> data/experiments/index.{html,md,csv}, with baseline.

Not a stage of the graph: it reads what ``dvc exp run`` made, from git and DVC's cache, and changes none of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.reporting.experiment_commits import experiments_of
from pipeline.reporting.experiments_page import experiments_csv, experiments_html, experiments_markdown
from pipeline.storage.atomic import write_text
from stages import run

OUT = Path("data/experiments")


def main(*words: str) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="experiments to show (default: all of the baseline)")
    parser.add_argument("--baseline", default="HEAD", help="the commit they started from (default HEAD)")
    asked = parser.parse_args(words)
    baseline, others = experiments_of(asked.baseline, asked.names)
    for suffix, make in (("html", experiments_html), ("md", experiments_markdown), ("csv", experiments_csv)):
        write_text(OUT / f"index.{suffix}", make(baseline, others))
    print(f"experiments: {len(others)} on {baseline.revision[:7]}; see {OUT / 'index.html'}")


if __name__ == "__main__":
    run("experiments", main, "[NAME ...] [--baseline COMMIT]")
