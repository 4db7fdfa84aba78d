"""The study index at scale, against the usual recipe: python -m benchmarks.index [studies] [rows of the CSV recipe].

Writes an index of synthetic studies (two views with ids of 44 characters, 60 % with findings of some 300 characters and
85 % with an impression of some 150), reads it in a fresh process, and takes every study once in random order. The CSV
recipe keeps a row a study with the four lists that CXR-CLIP's loader reads (view, image, text, text_augment) as Python
literals, and takes each cell through pandas' ``iloc`` and ``ast.literal_eval``; its cost a row does not depend on the
number of rows, so fewer of them do. Times of an epoch are CPU seconds of one thread: others may use the machine, too.

The last line is one JSON object: seconds, growth of the peak resident memory in MB (10^6 bytes), microseconds a study.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from pipeline.storage.index import read_studies, write_studies
from pipeline.study import Study, View

WORDS = [
    *(
        "lungs",
        "clear",
        "without",
        "focal",
        "consolidation",
        "pleural",
        "effusion",
        "pneumothorax",
        "heart",
        "size",
        "is",
    ),
    *(
        "normal",
        "mediastinal",
        "contours",
        "unremarkable",
        "small",
        "left",
        "basal",
        "atelectasis",
        "mild",
        "edema",
        "the",
    ),
    *(
        "tube",
        "tip",
        "projects",
        "above",
        "carina",
        "no",
        "acute",
        "osseous",
        "abnormality",
        "compared",
        "prior",
        "and",
    ),
]


def synthetic(count: int) -> Iterator[Study]:
    """``count`` studies of a data set like MIMIC-CXR, the same ones every time."""
    rng = np.random.default_rng(0)

    def text(share: float, words: int) -> str | None:
        if rng.random() >= share:
            return None
        return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=words)).capitalize() + "."

    def name(n: int) -> str:
        digits = rng.bytes(20).hex()
        return "-".join(digits[i : i + 8] for i in range(0, 40, 8)) if n else ""

    offset = 0
    for n in range(count):
        views = []
        for position in ("PA", "LATERAL") if n % 3 else ("AP", ""):
            length = int(rng.integers(30_000, 90_000))
            shard = f"data/shards/mimic_cxr/mimic_cxr-{offset // 1_000_000_000:05}.tar"
            size = (512, int(rng.integers(512, 640)))
            views.append(
                View(name(1), position, "", shard, offset % 1_000_000_000, length, *size, digest=rng.bytes(8).hex())
            )
            offset += length
        split = ("valid", "test")[n % 2] if n % 50 == 0 else "train"
        patient, study = f"{10_000_000 + n // 3:08}", f"{50_000_000 + n:08}"
        yield Study("mimic_cxr", patient, study, split, tuple(views), text(0.6, 36), text(0.85, 18))


def memory_mb(what: str) -> float:
    """Resident memory of this process in MB, now ("VmRSS") or at its peak ("VmHWM"), as Linux counts it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{what}:")[1].split()[0]) * 1024 / 1e6


def measure(path: Path) -> dict[str, float]:
    """Read the index and take each study once, in this process, which must have done little before."""
    before = memory_mb("VmRSS")
    start = time.perf_counter()
    studies = read_studies(path)
    read = time.perf_counter() - start
    growth = memory_mb("VmHWM") - before
    order = np.random.default_rng(1).permutation(len(studies)).tolist()
    start = time.process_time()
    characters = 0
    for i in order:
        study = studies[i]
        characters += len(study.findings or "") + len(study.impression or "") + len(study.views[0].id)
    epoch = time.process_time() - start
    return {
        "studies": len(studies),
        "read_s": round(read, 2),
        "read_mb": round(growth),
        "epoch_s": round(epoch, 2),
        "epoch_us": round(epoch / len(studies) * 1e6, 2),
        "epoch_mb": round(memory_mb("VmHWM") - before),
        "characters": characters,
    }


def measure_csv(path: Path, rows: int) -> dict[str, float]:
    """Microseconds a row of the CSV recipe, over ``rows`` random rows of a csv written from the same studies: with each
    cell taken as ``frame.iloc[row][column]`` and as ``frame[column].iloc[row]``, which is faster."""
    lists = [
        {
            "image": [f"files/p{s.patient[:2]}/p{s.patient}/s{s.study}/{v.id}.jpg" for v in s.views],
            "view": [v.position for v in s.views],
            "text": [t for t in (s.findings, s.impression) if t],
            "text_augment": [t[::-1] for t in (s.findings, s.impression) if t],  # back-translations are as long
        }
        for s in read_studies(path)[:rows]
    ]
    pd.DataFrame([{name: str(cell) for name, cell in row.items()} for row in lists]).to_csv(path.with_suffix(".csv"))
    frame = pd.read_csv(path.with_suffix(".csv"), index_col=0)
    order = np.random.default_rng(1).permutation(len(frame)).tolist()
    columns = ("view", "image", "text", "text_augment")
    figures = {}
    for way in ("row", "column"):
        start = time.process_time()
        for i in order:
            for column in columns:
                ast.literal_eval(frame.iloc[i][column] if way == "row" else frame[column].iloc[i])
        figures[f"csv_by_{way}_us"] = round((time.process_time() - start) / len(frame) * 1e6, 2)
    return figures


def main(count: int, rows: int) -> None:
    """Print the figures; the index lives in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.parquet"
        before, start = memory_mb("VmRSS"), time.perf_counter()
        write_studies(path, synthetic(count))
        print(
            f"written: {count:,} studies, {path.stat().st_size / 1e6:.0f} MB, in {time.perf_counter() - start:.0f} s "
            f"(with drawing them), peak + {memory_mb('VmHWM') - before:.0f} MB"
        )
        child = [sys.executable, "-m", "benchmarks.index", "--measure", str(path)]  # a fresh process
        figures = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        csv = measure_csv(path, min(rows, count))
    figures |= csv
    for way in ("row", "column"):
        figures[f"ratio_by_{way}"] = round(csv[f"csv_by_{way}_us"] / figures["epoch_us"], 1)
    print(f"read: {figures['read_s']} s, peak + {figures['read_mb']} MB")
    print(f"one epoch in random order: {figures['epoch_s']} s, {figures['epoch_us']} us a study")
    for way in ("row", "column"):
        took, ratio = csv[f"csv_by_{way}_us"], figures[f"ratio_by_{way}"]
        print(f"CSV recipe, cells by {way}: {took} us a row, {ratio} times as long")
    print(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000, int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
