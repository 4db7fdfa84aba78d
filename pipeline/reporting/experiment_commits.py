"""Which commits ``dvc exp run`` made from a baseline, and what each changed, from git and DVC's cache."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from pipeline.reporting.experiments import Experiment, costs, read_experiment

OWN = ("reports", "dvc.lock", "params.yaml")  # what every experiment changes


def experiments_of(baseline: str, names: Sequence[str] = ()) -> tuple[Experiment, list[Experiment]]:
    """The results of a commit and of the experiments that started from it, oldest first.

    Args:
        baseline: any name of a commit that git knows.
        names: of experiments; none: all of them.

    Raises:
        ValueError: no such commit or experiment; one line.
    """
    from dvc.api import DVCFileSystem
    from dvc.repo import Repo

    revision = _git("rev-parse", "--verify", f"{baseline}^{{commit}}")
    with Repo() as repo:
        known = dict(found for listed in repo.experiments.ls(rev=revision).values() for found in listed)
    if not known:
        raise ValueError(
            f"{revision[:7]} has no experiments; dvc exp list --all shows those of other commits (--baseline)"
        )
    if lost := [name for name in names if name not in known]:
        raise ValueError(f"{lost[0]}: no experiment of {revision[:7]}; there are {', '.join(known)}")
    names = names or sorted(known, key=lambda name: int(_git("show", "-s", "--format=%ct", known[name])))
    spent, skipped = costs(names, revision), [f":!{path}" for path in OWN]
    others = []
    for name in names:
        changed = _git("diff", "--name-only", revision, known[name], "--", ".", *skipped).splitlines()
        other = read_experiment(DVCFileSystem(rev=known[name]), name, known[name], changed)
        other.cost = spent.get(name)
        others.append(other)
    return read_experiment(DVCFileSystem(rev=revision), "baseline", revision), others


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"git {words[0]} {words[-1]}: no such commit in this repository")
    return done.stdout.strip()
