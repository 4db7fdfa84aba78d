"""Retrieval, intervals and linear probes against the usual recipes, turn by turn in one run.

    python -m benchmarks.evaluate [n] [--rounds 3] [--large] [--no-probe]

Retrieval: ``n`` images and as many texts of 512 dimensions (20,000 unless told), made so that about a third of the
images find their text among the first ten. The usual recipe holds the whole matrix of cosines, sorts each row and looks
each text up in a list; ours is ``candidates`` and ``ranks``. Both must give the same recall. Each runs in a process of
its own, which reports by how much its memory grew beyond imports and embeddings. Bootstrap: 1,000 resamples of 3,000
images and 18 classes, against scikit-learn's roc_auc_score for each class and resample (timed on a fiftieth of the
resamples). ``--large`` ranks 200,000 images among 200,000 texts, once. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.index import memory_mb
from pipeline.config.params import Bootstrap
from pipeline.evaluation import protocols
from pipeline.evaluation.candidates import candidate_texts
from pipeline.evaluation.exact_ranks import ranks
from pipeline.evaluation.metrics import classes_with_intervals, resamples
from pipeline.study import Study, View

DIM = 512  # of the paper
NEAR = 0.13  # cosine of an image and its own text, on average; of the others 0, with a deviation of .044
SKLEARN_SHARE = 50  # the loop is timed on one in so many resamples


def embeddings(n: int, near: float) -> tuple[np.ndarray, np.ndarray]:
    """Unit-norm float32 [n, DIM] of images and of their texts, made in parts that need little memory."""
    rng = np.random.default_rng(0)
    images, texts = np.empty((n, DIM), np.float32), np.empty((n, DIM), np.float32)
    for start in range(0, n, 4096):
        part = slice(start, min(start + 4096, n))
        images[part] = rng.standard_normal((part.stop - start, DIM), dtype=np.float32)
        images[part] /= np.linalg.norm(images[part], axis=1, keepdims=True)
        noise = rng.standard_normal((part.stop - start, DIM), dtype=np.float32) / np.float32(np.sqrt(DIM))
        texts[part] = near * images[part] + np.sqrt(1 - near**2) * noise
        texts[part] /= np.linalg.norm(texts[part], axis=1, keepdims=True)
    return images, texts


def reports(n: int) -> list[str]:
    """Texts of reports as long as reports are, all different and alike at the start, as reports are."""
    return ["No focal consolidation, pleural effusion or pneumothorax. " * 4 + str(i) for i in range(n)]


def usual_recall(images: np.ndarray, texts: np.ndarray, said: list[str]) -> float:
    """R@10 from the whole matrix: each row sorted, each text looked up in a list of those before it."""
    distinct: list[str] = []
    for text in said:
        if text not in distinct:
            distinct.append(text)
    cosines = images @ texts.T
    hits = 0
    for i in range(len(images)):
        hits += i in np.argsort(-cosines[i])[:10]
    return hits / len(images)


def our_recall(images: np.ndarray, texts: np.ndarray, studies: list[Study]) -> float:
    """R@10 by the pipeline's own functions."""
    rule = protocols.load_protocol("paper").retrieval["mimic_cxr"]
    return float((ranks(images, texts, candidate_texts(studies, rule).targets) <= 10).mean())


def retrieval_child(way: str, n: int, near: float) -> dict[str, Any]:
    """One way's seconds, on the clock and of all cores, growth of memory beyond imports and input, and recall."""
    images, texts = embeddings(n, near)
    said = reports(n)
    studies = [Study("openi", str(i), str(i), "test", (View(str(i)),), t) for i, t in enumerate(said)]
    usual_recall(images[:300], texts[:300], said[:300])  # libraries load what they need at the first call
    our_recall(images[:5000], texts[:5000], studies[:5000])
    before, peak, done = memory_mb("VmRSS"), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], memory_mb("VmRSS"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, work = time.perf_counter(), time.process_time()
    recall = usual_recall(images, texts, said) if way == "usual" else our_recall(images, texts, studies)
    seconds, work = time.perf_counter() - start, time.process_time() - work
    done.set()
    watcher.join()
    return {"seconds": seconds, "cpu_seconds": work, "grown_mb": peak[0] - before, "peak_mb": peak[0], "r10": recall}


def child(way: str, n: int, near: float = NEAR) -> dict[str, Any]:
    """``retrieval_child`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.evaluate", str(n), "--child", way, "--near", str(near)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    return dict(json.loads(answer.stdout.splitlines()[-1]))


def retrieval(n: int, rounds: int) -> dict[str, Any]:
    """Both ways turn by turn; also ours on embeddings at chance, where rounding settles least."""
    turns = []
    for _ in range(rounds):
        usual, ours = child("usual", n), child("ours", n)
        if abs(usual["r10"] - ours["r10"]) * n > 3:  # single precision may turn a near tie of the usual recipe
            raise SystemExit(f"R@10 differs: {usual['r10']} and {ours['r10']}")
        print(json.dumps({"usual": usual, "ours": ours}), flush=True)
        turns.append((usual, ours))
    chance = child("ours", n, near=0.0)
    return {
        "retrieval_n": n,
        "retrieval_r10": turns[0][0]["r10"],
        "retrieval_ratio": round(median(u["seconds"] / o["seconds"] for u, o in turns), 2),
        "retrieval_cpu_ratio": round(median(u["cpu_seconds"] / o["cpu_seconds"] for u, o in turns), 2),
        "retrieval_seconds": [round(median(t[i]["seconds"] for t in turns), 2) for i in (0, 1)],
        "retrieval_mb": [round(max(t[i]["grown_mb"] for t in turns)) for i in (0, 1)],
        "retrieval_seconds_at_chance": round(chance["seconds"], 2),
    }


def bootstrap(rounds: int) -> dict[str, Any]:
    """Macro AUC of 18 classes with its interval, and the loop over resamples and classes."""
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    options = Bootstrap()
    labels = rng.random((18, 3000)) < np.geomspace(0.005, 0.2, 18)[:, None]  # VinDr-CXR's range of prevalences
    scores = rng.normal(size=labels.shape) + labels
    groups = [str(i) for i in range(3000)]
    some = options.samples // SKLEARN_SHARE
    ratios, times = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        weights = resamples(groups, options, 0)
        named = {str(c): labels[c] for c in range(18)}, {str(c): scores[c] for c in range(18)}
        macro, _, _ = classes_with_intervals(*named, weights, options)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        for b in range(some):
            drawn = np.repeat(np.arange(3000), weights[b])
            found = [
                roc_auc_score(labels[c, drawn], scores[c, drawn])
                for c in range(18)
                if 0 < labels[c, drawn].sum() < 3000
            ]
            if macro is None or macro.samples is None or abs(np.mean(found) - macro.samples[b]) > 1e-12:
                raise SystemExit("the macro AUC of a resample differs from scikit-learn's")
        usual = (time.perf_counter() - start) * SKLEARN_SHARE
        ratios.append(usual / ours)
        times.append((usual, ours))
    return {
        "bootstrap_ratio": round(median(ratios), 1),
        "bootstrap_seconds": [round(median(t[i] for t in times), 3) for i in (0, 1)],
    }


def gflops() -> dict[str, float]:
    """What this machine multiplies in float32 and in bfloat16, in GFLOP/s: the best of five."""
    found: dict[str, float] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(2048, DIM).to(dtype), torch.randn(4096, DIM).to(dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            a @ b.T
            times.append(time.perf_counter() - start)
        found[name] = round(2 * 2048 * 4096 * DIM / min(times) / 1e9)
    return found


def main() -> None:
    """Print what is measured; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("n", type=int, nargs="?", default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--no-probe", action="store_true")
    parser.add_argument("--child", choices=("usual", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--near", type=float, default=NEAR, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(retrieval_child(chosen.child, chosen.n, chosen.near)))
        return
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "gflops": gflops()}
    figures |= bootstrap(chosen.rounds)
    print(json.dumps(figures))
    figures |= retrieval(chosen.n, chosen.rounds)
    if chosen.large:
        large = child("ours", 200_000)
        figures |= {"large_seconds": round(large["seconds"]), "large_peak_mb": round(large["peak_mb"])}
    if not chosen.no_probe and importlib.util.find_spec("benchmarks.probe"):
        figures |= importlib.import_module("benchmarks.probe").measure()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
