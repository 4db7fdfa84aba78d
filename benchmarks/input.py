"""CPU time of making a study ready for training, against the release's recipe: python -m benchmarks.input [rounds].

Draws synthetic radiographs as benchmarks.ingest does, as grey JPEGs of 512 x 624 pixels and about 64 KB, and reports of
sentences from the prompt file; two images and two texts a study. In each round three processes, one after the other so
that a busy machine slows all alike, make the same studies ready in batches of 32:

Release: for each image PIL in RGB, RandomResizedCrop, CLAHE (p = 0.5, on the lightness), ColorJitter, CenterCrop,
ToTensor, Normalize; texts tokenised anew and padded to 256.
Ours: ``training_batches``; and another epoch in which the image tower normalises each batch as well, which takes CPU
time only where there is no GPU.
Floor: decoding our JPEGs at half of their size, nothing else.

Then crops of the same rectangle are compared, made our way, the release's, and ours from the full picture.

The last line is one JSON object: CPU-ms a study of each (median of the rounds, after two to warm up), ``input_ratio``
(median of the rounds' ratios of release to ours; the release's normalisation is in it, ours is the device's work),
the same with our normalisation on the CPU, and the mean absolute differences of grey values.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision import transforms
from torchvision.transforms import functional

from benchmarks.ingest import radiograph
from pipeline.config.params import Augment, ImageEncoder, Loss, Sampling, TextEncoder, Train
from pipeline.config.run_config import RunConfig
from pipeline.models.encoders import ImageTower
from pipeline.storage.index import Studies, read_studies, write_studies
from pipeline.storage.pictures import encode
from pipeline.storage.shards import EncodedPicture, ShardWriter, load_view
from pipeline.study import Study, View
from pipeline.text.prompts import load_templates
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.augment import cut_and_resize, draw_crop
from pipeline.training.batches import TrainingSet, collator, training_batches

WIDTH, HEIGHT, QUALITY, SIZE = 512, 624, 92, 224
STUDIES, BATCH, PICTURES = 128, 32, 12
# What the towers' constants are does not matter here; the smallest ResNet that timm builds.
ENCODER = ImageEncoder("resnet18", False, args={"layers": [1] * 4, "channels": [8] * 4})
TEXT = TextEncoder("", 8000, {}, 256)
CONFIG = RunConfig(
    *("input", 0, ("mimic_cxr",), ENCODER, TEXT, 512, 0.07, SIZE, Sampling(), Augment(), Loss()),
    train=Train(batch_size=BATCH),
)


def make(folder: Path) -> None:
    """Write a shard, the same pictures as files, the index and the tokenizer."""
    rng = np.random.default_rng(0)
    pictures = []
    for seed in range(PICTURES):
        drawn = cv2.resize(radiograph(0.004, seed), (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        pictures.append(encode(np.rint(drawn * 255).astype(np.uint8), QUALITY))
    prompts = load_templates(Path("pipeline/text/prompts.yaml"))
    sentences = [s for pools in prompts.pools.values() for pool in pools.values() for s in pool]

    def prose(low: int, high: int) -> str:
        return " ".join(rng.choice(sentences, int(rng.integers(low, high + 1))))

    studies = []
    with ShardWriter(folder / "mimic_cxr-000000.tar") as writer:
        for n in range(STUDIES):
            views = (View(f"{n}.0", "PA"), View(f"{n}.1", "LATERAL"))
            study = Study("mimic_cxr", f"p{n}", f"s{n}", "train", views, prose(6, 10), prose(2, 4))
            data = [pictures[(2 * n + i) % PICTURES] for i in range(2)]
            studies.append(writer.write(study, [EncodedPicture(d, WIDTH, HEIGHT) for d in data]))
            for view, jpeg in zip(views, data, strict=True):
                (folder / f"{view.id}.jpg").write_bytes(jpeg)
    write_studies(folder / "studies.parquet", studies)
    Tokenizer.build(TEXT, [t for s in studies for t in (s.findings, s.impression) if t] + sentences).save(folder)


def set_up() -> None:
    """One thread a process; OpenCV has none of its own already."""
    torch.set_num_threads(1)


@cache
def studies_of(folder: Path) -> tuple[Studies, Tokenizer]:
    """What ``make`` wrote."""
    return read_studies(folder / "studies.parquet", ("train",)), Tokenizer.load(folder, TEXT.max_tokens)


def lightness_clahe(image: np.ndarray) -> np.ndarray:
    """CLAHE of a colour picture, uint8 [H, W, 3], on the lightness of CIELAB: clip 4, 8 x 8 tiles."""
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    lab[..., 0] = cv2.createCLAHE(4.0, (8, 8)).apply(lab[..., 0])
    return cv2.cvtColor(lab, cv2.COLOR_LAB2RGB)


def release(folder: Path, turn: int) -> dict[str, float]:
    """The recipe of the release, in steps of its own libraries."""
    studies, tokenizer = studies_of(folder)
    torch.manual_seed(turn)
    crop = transforms.RandomResizedCrop(SIZE, scale=(0.8, 1.1))
    jitter = transforms.ColorJitter(0.1, 0.2, 0.2, 0.1)
    centre, to_tensor = transforms.CenterCrop(SIZE), transforms.ToTensor()
    normalise = transforms.Normalize(ENCODER.mean, ENCODER.std)
    since = time.process_time()
    for start in range(0, STUDIES, BATCH):
        images, texts = [], []
        for study in studies[start : start + BATCH]:
            for view in study.views:
                array = np.array(crop(Image.open(folder / f"{view.id}.jpg").convert("RGB")))  # what CLAHE works on
                if torch.rand(()) < 0.5:
                    array = lightness_clahe(array)
                images.append(normalise(to_tensor(centre(jitter(Image.fromarray(array))))))
            texts += [study.findings or "", study.impression or ""]
        torch.stack(images)
        tokenizer.tokenizer(texts, padding="max_length", truncation=True, max_length=256, return_tensors="pt")
    return {"release": 1000 * (time.process_time() - since) / STUDIES}


@cache
def tower() -> ImageTower:
    """An image tower that hands on what its model would get."""
    result = ImageTower(ENCODER, SIZE, False)
    result.model = nn.Identity()
    return result


@torch.inference_mode()
def ours(folder: Path, turn: int) -> dict[str, float]:
    """Two epochs of training batches. Those of the first are handed on, as a loader does that feeds a GPU; those of the
    second are normalised here, as a training without one does."""
    studies, tokenizer = studies_of(folder)
    data, normalise = TrainingSet(studies, {}, CONFIG), tower()
    collate = collator(tokenizer, CONFIG)
    since = time.process_time()
    for _ in training_batches(data, collate, 2 * turn, 0, 1, 0):
        pass
    between = time.process_time()
    for batch in training_batches(data, collate, 2 * turn + 1, 0, 1, 0):
        normalise(batch.images)
    spent = {"ours": between - since, "ours_normalised": time.process_time() - between}
    return {name: 1000 * seconds / STUDIES for name, seconds in spent.items()}


def floor(folder: Path, turn: int) -> dict[str, float]:
    """Reading and decoding alone."""
    studies, _ = studies_of(folder)
    since = time.process_time()
    for study in studies:
        for view in study.views:
            load_view(view, 2)
    return {"floor": 1000 * (time.process_time() - since) / STUDIES}


def differences(folder: Path) -> dict[str, float]:
    """Mean absolute differences of grey values, of 255, over crops of the same rectangle."""
    studies, _ = studies_of(folder)
    clahe = cv2.createCLAHE(4.0, (8, 8))
    found: dict[str, list[float]] = {"to_release": [], "to_full_scale": [], "to_full_scale_after_clahe": []}
    halves = 0
    for number, study in enumerate(studies):
        view = study.views[number % 2]
        crop = draw_crop(view.height, view.width, SIZE, CONFIG.augment.crop_scale, np.random.default_rng(number))
        halves += crop.reduce == 2
        mine = cut_and_resize(load_view(view, crop.reduce), crop, SIZE, crop.reduce)
        full = cut_and_resize(load_view(view), crop, SIZE)
        picture = Image.open(folder / f"{view.id}.jpg").convert("RGB")
        theirs = functional.resized_crop(picture, crop.y, crop.x, crop.height, crop.width, [SIZE, SIZE])
        for name, one, two in (
            ("to_release", mine, np.asarray(theirs)[..., 0]),
            ("to_full_scale", mine, full),
            ("to_full_scale_after_clahe", clahe.apply(mine), clahe.apply(full)),
        ):
            found[name].append(float(np.abs(one.astype(int) - two).mean()))
    result = {f"difference_{name}": round(statistics.mean(values), 2) for name, values in found.items()}
    largest = max(max(found["to_release"]), max(found["to_full_scale"]))
    return result | {"largest_difference_of_a_crop": round(largest, 2), "share_at_half": round(halves / STUDIES, 3)}


def main(rounds: int) -> None:
    """Print a line a round and the JSON object."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spent: dict[str, list[float]] = {}
    ways: list[Callable[[Path, int], dict[str, float]]] = [release, ours, floor]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        pools = [ProcessPoolExecutor(1, get_context("spawn"), initializer=set_up) for _ in ways]
        for turn in range(-2, rounds):
            figures: dict[str, float] = {}
            for way, pool in zip(ways, pools, strict=True):
                figures |= pool.submit(way, folder, turn + 2).result()
            print(" ".join(f"{k} {v:.2f}" for k, v in figures.items()), "" if turn >= 0 else "(warm-up)", flush=True)
            for key, value in figures.items():
                spent.setdefault(key, []).extend([value] if turn >= 0 else [])
        for pool in pools:
            pool.shutdown()
        kilobytes = statistics.mean(p.stat().st_size for p in folder.glob("*.jpg")) / 1024
        result: dict[str, Any] = {"rounds": rounds, "studies": STUDIES, "kilobytes": round(kilobytes, 1)}
        result |= {f"{key}_ms": round(statistics.median(values), 2) for key, values in spent.items()}
        result |= differences(folder)
    for key, name in (("ours_normalised", "input_ratio_normalised_on_cpu"), ("ours", "input_ratio")):
        result[name] = round(statistics.median(a / b for a, b in zip(spent["release"], spent[key], strict=True)), 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
