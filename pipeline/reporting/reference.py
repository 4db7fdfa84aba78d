"""The figures of a run beside the committed reference: what an unchanged checkout gives on another kind of CPU."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

from pipeline.storage.atomic import write_text

Figures = Mapping[str, Mapping[str, float]]  # run -> metric -> value, as reports/metrics.json
CPU = "cpu.txt"
VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}  # a flag of /proc/cpuinfo, the widest first


def cpu_name() -> str:
    """The model of this machine's CPU, as the system gives it, and its widest vectors: these decide how sums round."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    vectors = next((f" with {name}" for flag, name in VECTORS.items() if flag in flags), "")
    return next(names, platform.processor() or platform.machine()) + vectors


def write_reference(reports: Path, reference: Path) -> None:
    """Keep metrics.json and the tables in Markdown of ``reports`` as the reference, with the name of the CPU."""
    for file in (reports / "metrics.json", *sorted(reports.glob("table*.md"))):
        write_text(reference / file.name, file.read_text(encoding="utf-8"))
    write_text(reference / CPU, f"{cpu_name()}\n")


def compared_with_reference(reports: Path, reference: Path) -> str:
    """In a few lines: how many figures are those of the reference, how far the others are, and what to make of it.

    Raises:
        ValueError: one of both has no metrics.json, or it is not JSON.
    """
    ours, theirs = _figures(reports), _figures(reference)
    cpu = (reference / CPU).read_text(encoding="utf-8").strip()
    names = [(run, key) for run, values in theirs.items() for key in values]
    both = [(run, key) for run, key in names if key in ours.get(run, {})]
    differences = {(run, key): abs(ours[run][key] - theirs[run][key]) for run, key in both}
    if not any(differences.values()) and len(both) == len(names):
        return f"All {len(names):,} figures are those of {reference} ({cpu})."
    changed = [d for d in differences.values() if d]
    auc = [value for (_, key), value in differences.items() if key.endswith("_auc")]
    lines = [
        f"{len(changed):,} of {len(names):,} figures are not those of {reference} ({cpu}; this is {cpu_name()}). The "
        f"AUCs differ by {100 * max(auc, default=0.0):.1f} points at most.",
        "Another kind of CPU rounds otherwise, and training enlarges it: compare with the intervals in the tables. "
        "`git status` shows dvc.lock for the same reason: commit it, or `git checkout dvc.lock`.",
    ]
    if missing := len(names) - len(both):
        lines.insert(1, f"{missing:,} figures of the reference were not computed.")
    return "\n".join(lines)


def _figures(folder: Path) -> Figures:
    path = folder / "metrics.json"
    try:
        found: Figures = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run: dvc repro") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON; run: dvc repro -f tables") from None
    return found
