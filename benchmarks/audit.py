"""Recall, precision and time of the search for duplicates on phantoms.

    python -m benchmarks.audit [studies] [side] [seed] [--no-time]

``studies`` phantom studies are drawn (two a patient and several views a study, which are no duplicates), changed copies
of some of their pictures are planted, and the search runs on the shard of all. Then it is timed on ``TIMED`` and on ten
times as many studies without copies, which takes minutes. The last line is one JSON object: recall, that of each kind
of change, precision, seconds at both sizes and their ratio.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import joblib  # type: ignore[import-untyped]
import numpy as np
import pyarrow.parquet as pq

from pipeline.audit.copies import find_pairs, images_of
from pipeline.phantom.cases import EVERYTHING, plan
from pipeline.phantom.picture import render_picture
from pipeline.storage import pictures
from pipeline.storage.pictures import Grey
from pipeline.storage.shards import EncodedPicture, ShardWriter
from pipeline.study import Study, View

VIEWS = {("PA",): 0.3, ("AP",): 0.2, ("PA", "LATERAL"): 0.3, ("PA", "PA"): 0.1, ("AP", "PA"): 0.1}
PER_PATIENT = 2  # studies
COPIES = 5  # of so many studies one gets a changed copy, and one a copy that is cropped widely
MIN_CORRELATION = 0.8
TIMED_SIDE = 128  # pixels; drawing is what takes longest
TIMED = 1000  # studies, and ten times as many
Change = Callable[[Grey, np.random.Generator], Grey]


def jpeg(image: Grey, rng: np.random.Generator) -> Grey:
    """Encoded again at quality 50 to 95."""
    return pictures.decode(pictures.encode(image, int(rng.integers(50, 96))))


def shrink(image: Grey, rng: np.random.Generator) -> Grey:
    """Reduced to between a quarter and nine tenths of the side."""
    scale = rng.uniform(0.25, 0.9)
    size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _curve(image: Grey, values: np.ndarray) -> Grey:
    return cv2.LUT(image, np.rint(values.clip(0, 1) * 255).astype(np.uint8))


def gamma(image: Grey, rng: np.random.Generator) -> Grey:
    """Gamma of 0.5 to 2."""
    return _curve(image, np.linspace(0, 1, 256) ** np.exp2(rng.uniform(-1, 1)))


def window(image: Grey, rng: np.random.Generator) -> Grey:
    """The darkest and the brightest 2 to 15 % of the pixels clipped, the rest stretched."""
    low, high = np.quantile(image, [rng.uniform(0.02, 0.15), 1 - rng.uniform(0.02, 0.15)])
    return _curve(image, (np.arange(256) - low) / max(high - low, 1))


def contrast(image: Grey, rng: np.random.Generator) -> Grey:
    """Contrast of 0.4 to 0.9, brightness moved by up to a tenth."""
    return _curve(image, 0.5 + (np.linspace(0, 1, 256) - 0.5) * rng.uniform(0.4, 0.9) + rng.uniform(-0.1, 0.1))


def clahe(image: Grey, rng: np.random.Generator) -> Grey:
    """Contrast-limited adaptive histogram equalisation, limit 1 to 4."""
    return cv2.createCLAHE(float(rng.uniform(1, 4)), (8, 8)).apply(image)


def invert(image: Grey, rng: np.random.Generator) -> Grey:
    """Black for white."""
    return 255 - image


def crop(image: Grey, rng: np.random.Generator, least: float = 0, most: float = 0.05) -> Grey:
    """Up to 5 % cut off each side."""
    h, w = image.shape
    top, bottom, left, right = rng.uniform(least, most, 4)
    return np.ascontiguousarray(
        image[round(top * h) : round((1 - bottom) * h), round(left * w) : round((1 - right) * w)]
    )


def wide(image: Grey, rng: np.random.Generator) -> Grey:
    """5 to 25 % cut off each side."""
    return crop(image, rng, 0.05, 0.25)


CHANGES: dict[str, Change] = {f.__name__: f for f in (jpeg, shrink, gamma, window, contrast, clahe, invert, crop, wide)}
MIXED = [name for name in CHANGES if name != "wide"]  # which is planted by itself, as often as all the others
KINDS = [(name,) for name in MIXED] + list(combinations(MIXED, 2))


def change(image: Grey, kind: Sequence[str], rng: np.random.Generator) -> Grey:
    """One changed copy of uint8 [H, W]."""
    for name in kind:
        image = CHANGES[name](image, rng)
    return image


def draw(number: int, side: int, seed: int) -> list[tuple[str, Grey]]:
    """Position and picture of every view of study ``number``; ``PER_PATIENT`` studies in a row are one patient's."""
    return _draw_study(_planned(number // 1000, seed), number % 1000, side)


_plans: dict[tuple[int, int], list] = {}


def _planned(block: int, seed: int) -> list:
    if (block, seed) not in _plans:
        _plans[block, seed] = plan(f"audit {block}", 1000, seed, EVERYTHING, VIEWS, normal=0.4)
    return _plans[block, seed]


def _draw_study(cases: list, number: int, side: int) -> list[tuple[str, Grey]]:
    case, patient = cases[number], cases[number - number % PER_PATIENT].patient
    aspect = 1.0 if number // PER_PATIENT % 2 else 1.2
    drawn = []
    for n, view in enumerate(case.views):
        image = render_picture(patient, case.findings, view, side, case.view_seed(n), aspect).image
        drawn.append((view, np.round(image * 255).astype(np.uint8)))
    return drawn


def _draw_with_copies(number: int, side: int, seed: int, planted: bool) -> list[tuple[str, EncodedPicture]]:
    """A study's views as shards hold them, and the changed copy of its first view where one is planted."""
    drawn = draw(number, side, seed)
    found = [(view, _picture(image)) for view, image in drawn]
    if planted and number % COPIES < 2:
        kind = KINDS[number // COPIES % len(KINDS)] if number % COPIES == 0 else ("wide",)
        found.append(
            ("copy " + "+".join(kind), _picture(change(drawn[0][1], kind, np.random.default_rng([seed, number]))))
        )
    return found


def _picture(image: Grey) -> EncodedPicture:
    return EncodedPicture(pictures.encode(image, 95), image.shape[1], image.shape[0])


def write_studies(tar: Path, count: int, side: int, seed: int, planted: bool) -> Iterator[tuple[Study, str]]:
    """Write a shard of ``count`` studies; yields each placed study, and the kind of change where it is a copy."""
    job = partial(_draw_with_copies, side=side, seed=seed, planted=planted)
    workers = joblib.cpu_count()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool, ShardWriter(tar) as writer:
        for number, drawn in enumerate(pool.map(job, range(count), chunksize=16)):
            own = [(view, picture) for view, picture in drawn if not view.startswith("copy")]
            views = tuple(View(f"v{number}-{n}", view) for n, (view, _) in enumerate(own))
            study = Study("chestxray14", f"p{number // PER_PATIENT}", f"s{number}", "train", views)
            yield writer.write(study, [p for _, p in own]), ""
            for view, picture in drawn[len(own) :]:
                copy = Study("rsna", f"c{number}", f"c{number}", "test", (View(f"c{number}"),))
                yield writer.write(copy, [picture]), view.removeprefix("copy ")


def score(placed: Sequence[tuple[Study, str]], pairs: Path) -> dict[str, Any]:
    """Recall of the planted copies, whole and by change, and precision of the pairs that were reported."""
    truth = {study.study: kind for study, kind in placed if kind}
    rows = pq.read_table(pairs).to_pylist()
    right = {row["study_b"] for row in rows if _is_planted(row)}
    by_change = {name: [s in right for s, kind in truth.items() if name in kind.split("+")] for name in CHANGES}
    wrong = [row for row in rows if not _is_planted(row)]
    same = sum(row["patient_a"] == _patient(row) for row in wrong)
    return {
        "planted": len(truth),
        "distinct": sum(len(study.views) for study, kind in placed if not kind),
        "pairs": len(rows),
        "recall": round(len(right) / len(truth), 4),
        "precision": round(1 - len(wrong) / max(len(rows), 1), 4),
        "wrong_of_the_same_patient": same,
        "missed": sorted(kind for study, kind in truth.items() if study not in right),
        "recall_by_change": {name: [sum(found), len(found)] for name, found in by_change.items()},
    }


def _patient(row: dict[str, Any]) -> str:
    """Whose picture the second of a pair is; a copy is of its original's patient."""
    study = str(row["study_b"])
    return f"p{int(study[1:]) // PER_PATIENT}"


def _is_planted(row: dict[str, Any]) -> bool:
    number = str(row["study_a"])[1:]
    return (row["view_a"], row["study_b"]) == (f"v{number}-0", f"c{number}")


def main(count: int, side: int, seed: int, timed: bool) -> None:
    """Print what is measured; the last line is JSON."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # shards are addressed relative to the working directory
        placed = list(write_studies(Path("planted.tar"), count, side, seed, True))
        start = time.perf_counter()
        counts = find_pairs(images_of([s for s, _ in placed]), Path("pairs.parquet"), MIN_CORRELATION)
        figures = {"side": side, "seed": seed, **counts, **score(placed, Path("pairs.parquet"))}
        figures["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps(figures))
        if timed:
            many = images_of([s for s, _ in write_studies(Path("many.tar"), 10 * TIMED, TIMED_SIDE, seed + 1, False)])
            seconds = {}
            for size in (len(many) // 10, len(many)):
                start = time.perf_counter()
                counts = find_pairs(many[:size], Path("timed.parquet"), MIN_CORRELATION)
                seconds[size] = round(time.perf_counter() - start, 1)
                print(json.dumps({"seconds": seconds[size], **counts}))
            small, large = seconds.values()
            figures.update(timed_images=list(seconds), timed_seconds=[small, large], time_ratio=round(large / small, 2))
        print(json.dumps(figures))


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if not word.startswith("-")]
    count, side, seed = numbers + [2000, 256, 1][len(numbers) :]
    main(count, side, seed, timed="--no-time" not in sys.argv)
