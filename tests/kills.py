"""Stages killed at random moments, over and over: python -m tests.kills FOLDER [MINUTES [KIND ...]]

FOLDER is a clone in which the micro profile has run; it is made if it is not there. A stage is started as DVC starts
it, in a process forked from one that has loaded the libraries, and killed; after every ``FEW`` kills it may end, and
must leave byte for byte what the undisturbed run left. The drill goes on where it was, until there are ``KILLS`` of
each kind or MINUTES (10) are over. The last line is one JSON object.
"""

from __future__ import annotations

import filecmp
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.clones import make_clone, run

KILLS, FEW = 200, 5
SECONDS = 4.0  # within which a stage is killed before any has ended here
RESULTS = Path("data/results")
# Of each kind its stages: script, arguments, and what they write.
KINDS = {
    "ingest": [
        ("ingest", name, [Path(f"data/shards/{name}"), *(Path(f"data/index/{name}.{s}") for s in ("parquet", "json"))])
        for name in ("mimic_cxr", "siim")
    ],
    "training": [
        ("pretrain", f"{name} 0", [Path(f"data/models/{name}/0"), RESULTS / f"pretrain/{name}/0.csv"])
        for name in ("resnet_mcc", "mixed")
    ],
    "scoring": [
        ("zero_shot", "", [RESULTS / "zero_shot"]),
        ("retrieval", "", [RESULTS / "retrieval"]),
        ("few_shot", "main resnet_mcc 0", [RESULTS / f"few_shot/resnet_mcc/0.{s}" for s in ("json", "npz")]),
        ("regenerate", "mixed 0", [RESULTS / f"regeneration/mixed/0.{s}" for s in ("json", "npz", "pictures.npz")]),
    ],
    "tables": [("tables", "", [Path("reports")])],
}
# What Python itself says in a child that it was starting when its parent was killed: none of its lines is ours.
UNBORN = re.compile(
    r'Traceback \(most recent call last\):\n  File "<string>", line 1, in <module>\n'
    r'(?:  File "[^"]*/multiprocessing/.*\n(?:    .*\n)+)+\S+: .*\n'
)
_fork = multiprocessing.get_context("fork")


def drill(folder: Path, kind: str, kills: int, seconds: float = float("inf"), few: int = FEW) -> dict[str, float]:
    """Kill the stages of a kind in a clone until there were so many kills, or the time is over; after every ``few`` of
    them let one end.

    Returns:
        Counts since the clone was made: ``kills``, and ``ends``, runs that ended and left the right bytes.

    Raises:
        AssertionError: a run did not end, left something else, or said "Traceback".
    """
    until, notes = time.monotonic() + seconds, folder / f"drill-{kind}.json"
    counts = json.loads(notes.read_text()) if notes.exists() else {"kills": 0, "ends": 0}
    truth = folder / "undisturbed"
    (folder / "drill.log").unlink(missing_ok=True)  # of a drill that was ended from outside
    for stage, _, outputs in KINDS[kind]:
        importlib.import_module(f"stages.{stage}")
        for path in outputs:
            if not (truth / path).exists():
                _copy(folder / path, truth / path)
    took: dict[str, float] = {}
    while counts["kills"] < kills and time.monotonic() < until:
        rng = random.Random(f"{kind} {counts['ends']}")
        stage, words, outputs = KINDS[kind][counts["ends"] % len(KINDS[kind])]
        done = 0
        while done < few:
            if rng.random() < 0.5:  # as DVC does; a stage run by hand finds what was left
                _remove(folder, outputs)
            done += _start(folder, stage, words, rng.uniform(0, took.get(stage, SECONDS)), rng.random() < 0.5) is None
        # The last one's: after one that was slow, as the first is, most would end before they were killed.
        took[stage] = _end(folder, stage, words, outputs, truth)
        counts["kills"], counts["ends"] = counts["kills"] + done, counts["ends"] + 1
        notes.write_text(json.dumps(counts))
    return counts


def _end(folder: Path, stage: str, words: str, outputs: list[Path], truth: Path) -> float:
    """Let a stage end, and hold what it leaves against the truth; the seconds it took."""
    _remove(folder, outputs)
    begun = time.monotonic()
    assert _start(folder, stage, words) == 0, (folder / "drill.log").read_text()[-3000:]
    took = time.monotonic() - begun
    for path in outputs:
        assert _same(folder / path, truth / path), f"{stage} {words}: {path} is not what the undisturbed run left"
    said = UNBORN.sub("", (folder / "drill.log").read_text())
    assert "Traceback" not in said, said[-3000:]
    (folder / "drill.log").unlink()
    return took


def _start(folder: Path, stage: str, words: str, seconds: float | None = None, all_of_it: bool = False) -> int | None:
    """Run a stage; its exit status, or None if it was killed after ``seconds``: the process alone, or ``all_of_it``,
    its children too."""
    process = _fork.Process(target=_stage, args=(folder, stage, words))
    process.start()
    process.join(seconds)
    if process.exitcode is not None:
        return process.exitcode
    pid = process.pid or 0
    os.killpg(pid, signal.SIGKILL) if all_of_it and os.getpgid(pid) == pid else process.kill()
    process.join()
    return None


def _stage(folder: Path, stage: str, words: str) -> None:
    """What the forked process does."""
    from stages import run as run_stage

    os.setpgid(0, 0)
    os.chdir(folder)
    log = os.open("drill.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = [stage, *words.split()]
    run_stage(stage, importlib.import_module(f"stages.{stage}").main)


def _remove(folder: Path, outputs: list[Path]) -> None:
    for path in outputs:
        if (folder / path).is_dir():
            shutil.rmtree(folder / path)
        else:
            (folder / path).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)


def _same(one: Path, other: Path) -> bool:
    """Whether two files or folders hold the same names and bytes."""
    if one.is_file() and other.is_file():
        return filecmp.cmp(one, other, shallow=False)
    names = {p.relative_to(one) for p in one.rglob("*")}
    return names == {p.relative_to(other) for p in other.rglob("*")} and all(
        filecmp.cmp(one / name, other / name, shallow=False) for name in names if (one / name).is_file()
    )


def main(folder: Path, minutes: float, *kinds: str) -> None:
    """See the head of the module."""
    if not (folder / "dvc.yaml").exists():
        make_clone(folder)
        run(folder, "dvc", "repro")
    until, found = time.monotonic() + 60 * minutes, {}
    for kind in kinds or KINDS:
        found[kind] = drill(folder, kind, KILLS, until - time.monotonic())
        print(kind, found[kind], flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *(float(word) for word in sys.argv[2:3] or ["10"]), *sys.argv[3:])
