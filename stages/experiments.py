"""``python -m stages.experiments [NAME ...]``: experiments -> reports/experiments.{html,md,csv}, beside their baseline.

Not a stage of the graph: it reads what ``dvc exp run`` made, from git and DVC's cache, and changes none of it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from pipeline.reporting import experiments, experiments_page

OUT = Path("reports")
OWN = ("reports", "dvc.lock", "params.yaml")  # what every experiment changes


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {words[0]} {words[-1]}: no such commit in this repository")
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="experiments to show (default: all of the baseline)")
    parser.add_argument("--baseline", default="HEAD", help="the commit they started from (default HEAD)")
    asked = parser.parse_args()
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

    revision = git("rev-parse", "--verify", f"{asked.baseline}^{{commit}}")
    with Repo() as repo:
        known = dict(found for listed in repo.experiments.ls(rev=revision).values() for found in listed)
    if not known:
        raise ValueError(
            f"{revision[:7]} has no experiments; dvc exp list --all shows those of other commits (--baseline)"
        )
    if lost := [name for name in asked.names if name not in known]:
        raise ValueError(f"{lost[0]}: no experiment of {revision[:7]}; there are {', '.join(known)}")
    names = asked.names or sorted(known, key=lambda name: int(git("show", "-s", "--format=%ct", known[name])))

    baseline = experiments.read_experiment(DVCFileSystem(rev=revision), "baseline", revision)
    costs = experiments.costs(names, revision)
    others = []
    for name in names:
        skipped = [f":!{path}" for path in OWN]
        changed = git("diff", "--name-only", revision, known[name], "--", ".", *skipped).splitlines()
        other = experiments.read_experiment(DVCFileSystem(rev=known[name]), name, known[name], changed)
        other.cost = costs.get(name)
        others.append(other)
    OUT.mkdir(exist_ok=True)
    for suffix, text in (
        ("html", experiments_page.experiments_html(baseline, others)),
        ("md", experiments_page.experiments_markdown(baseline, others)),
        ("csv", experiments_page.experiments_csv(baseline, others)),
    ):
        (OUT / f"experiments.{suffix}").write_text(text, encoding="utf-8", newline="\n")
    print(f"experiments: {len(others)} on {revision[:7]}; see {OUT / 'experiments.html'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"experiments: {error}")
