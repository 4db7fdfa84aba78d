"""Damaged inputs of every format that is read: each is read, or refused in one line, in bounded memory and time.

python -m tests.fuzz NOTES [MINUTES [FORMAT ...]] goes on where NOTES, a JSON file, says it was, until there are as many
inputs of each format as ``FORMATS`` asks for or MINUTES (10) are over. Files that we wrote ourselves hold a digest: of
them a changed byte must never be read as something else. The mutations run in a process of their own, so that a codec
that crashes is counted and the rest goes on. The last line is one JSON object.
"""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.clones import ROOT
from tests.fuzz_formats import FORMATS

MEMORY = 1 << 30  # bytes of address space above what reading the seeds takes
LINE = 250  # characters of a message, the file's path left out
SLOW = 20.0  # seconds after which an input counts as a hang


def mutated(files: list[bytes], number: int) -> bytes:
    """Input ``number``, always the same: bits flipped, bytes set, cut, spliced, repeated, or a length overwritten."""
    rng = np.random.default_rng(number)
    data = bytearray(files[int(rng.integers(len(files)))])
    start = 128 if data[128:132] == b"DICM" and rng.random() < 0.9 else 0  # the preamble is empty
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(start, len(data))) if len(data) > start else 0
        kind = int(rng.integers(7))
        if not data:
            break
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF, int(rng.integers(256))]))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            other = files[int(rng.integers(len(files)))]
            data[at:] = other[int(rng.integers(len(other))) :]
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 200))]
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 60))]
        else:
            value = int(rng.choice([0, 1, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]))
            packed, size = struct.pack("<I" if rng.random() < 0.7 else ">I", value), int(rng.choice([2, 4]))
            data[at : at + size] = packed[:size]
    return bytes(data)


@contextmanager
def _room() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        yield Path(name)


def outcomes(kind: str, numbers: range, folder: Path, limit: bool = False) -> Iterator[tuple[int, str, float, str]]:
    """Of each input first its number alone, then again with what came out, the seconds, and what is wrong about it.

    Args:
        limit: keep this process's memory within ``MEMORY`` from now on.
    """
    form = FORMATS[kind]
    files, errors = form.seeds(), form.errors()
    truth = [form.read(data, folder) for data in files]
    if limit:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in numbers:
        yield number, "", 0.0, ""
        data, wrong = mutated(files, number), ""
        since = time.perf_counter()
        try:
            found = form.read(data, folder)
            outcome = "read"
            if form.whole and found not in truth:
                wrong = "read as something else"
        except errors as error:
            lines = str(error).replace(str(folder), "").splitlines()
            outcome = lines[0] if kind == "picture" else type(error).__name__
            if not lines or max(map(len, lines)) > LINE or (len(lines) > 1 and kind not in ("params", "protocol")):
                wrong = "message"
        except Exception as error:
            outcome = wrong = f"unexpected {type(error).__name__}"
        spent = time.perf_counter() - since
        yield number, outcome, spent, wrong or ("a hang" if spent > SLOW else "")


def work(kind: str, first: int, count: int) -> None:
    """Print what ``outcomes`` gives: a number before its input is read, the rest and the peak of memory in MB after."""
    with _room() as folder:
        for number, outcome, spent, wrong in outcomes(kind, range(first, first + count), folder, True):
            if not outcome:
                print(f"\n{number}", end="\t", flush=True)
                continue
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(outcome, f"{spent:.3f}", peak, wrong, sep="\t", end="", flush=True)


def fuzz(kind: str, first: int, count: int) -> dict[str, Any]:
    """All inputs, past crashes: ``wrong`` (number, what), numbers that ``crashed`` the process, ``outcomes``,
    ``slowest`` in seconds, ``peak`` in MB."""
    found: dict[str, Any] = {"wrong": [], "crashed": [], "outcomes": Counter(), "slowest": 0.0, "peak": 0}
    stop = first + count
    while first < stop:
        code = f"from tests.fuzz import work; work({kind!r}, {first}, {stop - first})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
        rows = [line.split("\t") for line in done.stdout.splitlines() if line]
        assert rows, done.stderr
        for row in rows:
            if len(row) < 5:
                found["crashed"].append(int(row[0]))
                continue
            found["outcomes"][row[1]] += 1
            found["slowest"], found["peak"] = max(found["slowest"], float(row[2])), max(found["peak"], int(row[3]))
            if row[4]:
                found["wrong"].append((int(row[0]), row[4]))
        first = int(rows[-1][0]) + 1
        assert done.returncode == 0 or len(rows[-1]) < 5, done.stderr
    return found


def main(notes: Path, minutes: float, *kinds: str) -> None:
    """See the head of the module."""
    until = time.monotonic() + 60 * minutes
    done: dict[str, Any] = json.loads(notes.read_text()) if notes.exists() else {}
    for kind in kinds or FORMATS:
        so_far = done.setdefault(kind, {"inputs": 0, "read": 0, "wrong": [], "crashed": [], "slowest": 0, "peak": 0})
        while so_far["inputs"] < FORMATS[kind].inputs and time.monotonic() < until:
            part = min(2000, FORMATS[kind].inputs - so_far["inputs"])
            found = fuzz(kind, 10_000 + so_far["inputs"], part)
            so_far["inputs"], so_far["read"] = so_far["inputs"] + part, so_far["read"] + found["outcomes"]["read"]
            for key in ("wrong", "crashed"):
                so_far[key] += found[key]
            for key in ("slowest", "peak"):
                so_far[key] = max(so_far[key], found[key])
            notes.write_text(json.dumps(done))
        print(kind, so_far, flush=True)
    total = {key: sum(one[key] for one in done.values()) for key in ("inputs", "read")}
    print(json.dumps(total | {key: sum(len(one[key]) for one in done.values()) for key in ("wrong", "crashed")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(float(word) for word in sys.argv[2:3] or ["10"]), *sys.argv[3:])
