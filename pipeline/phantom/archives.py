"""Write a phantom archive: plan, draw in worker processes, write the tables, mark it, and move it into place."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import joblib  # type: ignore[import-untyped]
from tqdm import tqdm

from pipeline.phantom import with_labels as wl
from pipeline.phantom import with_reports as wr
from pipeline.phantom.cases import Case
from pipeline.phantom.with_labels import Rows
from pipeline.storage.atomic import emptied
from pipeline.storage.faults import FULL

ArchivePlan = Callable[[int, int], list[Case]]
Write = Callable[[Case, Path, int], Rows]
Tables = Callable[[Path, Sequence[Case], Rows], None]

LAYOUTS: dict[str, tuple[ArchivePlan, Write, Tables]] = {
    "mimic_cxr": (wr.mimic_cxr_plan, wr.mimic_cxr_case, wr.mimic_cxr_tables),
    "chexpert": (wr.chexpert_plan, wr.chexpert_case, wr.chexpert_tables),
    "chestxray14": (wl.chestxray14_plan, wl.chestxray14_case, wl.chestxray14_tables),
    "vindr_cxr": (wl.vindr_cxr_plan, wl.vindr_cxr_case, wl.vindr_cxr_tables),
    "rsna": (wl.rsna_plan, wl.rsna_case, wl.rsna_tables),
    "siim": (wl.siim_plan, wl.siim_case, wl.siim_tables),
    "openi": (wr.openi_plan, wr.openi_case, wr.openi_tables),
}
MARK, NAMED = "PHANTOM.json", "PHANTOM.txt"


def write_archive(archive: str, root: Path, studies: int, size: int, seed: int, workers: int = 0) -> dict[str, Any]:
    """Draw one archive in its public on-disk layout; returns what ``PHANTOM.json`` holds.

    ``studies`` examinations are drawn with a short side of ``size`` pixels by ``workers`` processes (0: one a core);
    the bytes depend on ``seed``, not on ``workers``. The archive is built beside ``root`` and moved there when it is
    complete, replacing an earlier phantom. Raises ``ValueError`` for an unknown archive, fewer than 20 studies or a
    size under 64, ``FileExistsError`` where ``root`` holds anything that is not a phantom, and ``OSError``, in one line
    that says what to do, where the archive cannot be written, such as on a full disk; nothing is left of it then.
    """
    if archive not in LAYOUTS:
        raise ValueError(f"no phantom of an archive {archive!r}; there are {', '.join(LAYOUTS)}")
    if studies < 20 or size < 64:
        raise ValueError(f"phantom {archive}: at least 20 studies and 64 pixels are needed, got {studies} and {size}")
    if root.exists() and any(root.iterdir()) and not ((root / MARK).is_file() or (root / NAMED).is_file()):
        raise FileExistsError(f"{root} holds files that are no phantom; give another place for the phantom archive")
    plan, write_case, write_tables = LAYOUTS[archive]
    cases = plan(studies, seed)
    partial_root = root.with_name(root.name + ".partial")
    try:
        emptied(partial_root)
        rows: Rows = []
        drawings = _draw_all(
            write_case, partial_root.absolute(), size, cases, workers
        )  # wherever a process was started
        for drawn in tqdm(drawings, total=len(cases), desc=f"phantom {archive}", unit="study", mininterval=1):
            rows += drawn
        write_tables(partial_root, cases, rows)
        (partial_root / NAMED).write_text(
            "PHANTOM: every image and every text in this folder is synthetic, drawn by a program. No patient is shown."
            "\n",
            encoding="utf-8",
        )
        mark = {"phantom": True, "archive": archive, "seed": seed, "studies": studies, **_digest(partial_root)}
        (partial_root / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
        if root.exists():  # moved away first: the rest of a phantom without its mark would be taken for other files
            shutil.rmtree(earlier := root.with_name(root.name + ".earlier"), ignore_errors=True)
            root.rename(earlier)
        partial_root.rename(root)
        shutil.rmtree(root.with_name(root.name + ".earlier"), ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial_root, ignore_errors=True)
        if error.errno not in FULL:
            raise OSError(error.errno, error.strerror, str(root)) from None
        raise OSError(
            f"{root}: cannot be written ({error.strerror}); make room there, or draw less "
            f"(phantom.archives.{archive}, phantom.size), and run again"
        ) from None
    return mark


def _draw_all(write_case: Write, root: Path, size: int, cases: Sequence[Case], workers: int) -> Iterator[Rows]:
    """Draw every case, in order. The processes are kept for the next archive."""
    pool = joblib.Parallel(n_jobs=workers or -1, return_as="generator", batch_size=8)
    yield from pool(joblib.delayed(_draw)(write_case, case, root, size) for case in cases)


def _draw(write_case: Write, case: Case, root: Path, size: int) -> Rows:
    cv2.setNumThreads(1)  # a process a core draws
    return write_case(case, root, size)


def is_whole(root: Path, note: str = "") -> bool:
    """Whether a phantom is there, and every file of it as it was drawn; ``note``: a file that was added to them."""
    try:
        mark = json.loads((root / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and _digest(root, note).items() <= mark.items()


def _digest(root: Path, note: str = "") -> dict[str, Any]:
    """Number of files and SHA-256 over their sorted relative names and contents, mark and ``note`` left out."""
    whole = hashlib.sha256()
    files = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    files = [name for name in files if name not in (MARK, note)]
    for name in files:
        whole.update(name.encode() + b"\0")
        whole.update(hashlib.sha256((root / name).read_bytes()).digest())
    return {"files": len(files), "sha256": whole.hexdigest()}
