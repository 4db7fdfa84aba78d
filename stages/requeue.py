"""``python -m stages.requeue [NAME ...]``: queued experiments whose worker was killed are collected or queued again.

Not a stage of the graph. NAME: experiments that failed, to be tried again.
"""

from __future__ import annotations

from pipeline.tracking.requeue import requeue
from stages import run

SAYS = {
    "running": "still runs without its worker; when it has ended, type this again",
    "collected": "had ended, and is an experiment now",
    "queued": "is queued again; it starts with: dvc queue start",
}


def main(*names: str) -> None:
    from dvc.repo import Repo

    with Repo() as repo:
        found = requeue(repo, names)
    for name, outcome in found.items():
        print(f"{name}: {SAYS[outcome]}")
    if not found:
        print("requeue: no experiment was left by its worker")


if __name__ == "__main__":
    run("requeue", main, "[NAME ...]")
