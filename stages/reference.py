"""``python -m stages.reference [--write]``: reports/ beside docs/reference, the figures of the committed demo.

Not a stage of the graph. ``--write`` makes the figures at hand the reference, after a change that is meant to change
them.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.reporting.reference import compared_with_reference, write_reference
from stages import run

REPORTS, REFERENCE = Path("reports"), Path("docs/reference")


def main(option: str = "") -> None:
    if option not in ("", "--write"):
        raise ValueError(f"{option}: no such option; there is --write")
    if option:
        write_reference(REPORTS, REFERENCE)
    elif Path("params.yaml").read_bytes() != Path("profiles/demo.yaml").read_bytes():
        print("params.yaml is not the demo's, so its figures are not compared with docs/reference.")
    else:
        print(compared_with_reference(REPORTS, REFERENCE))


if __name__ == "__main__":
    run("reference", main, "[--write]")
