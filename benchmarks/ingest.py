"""Decoding speed on one core, against the usual recipes: python -m benchmarks.ingest [rounds].

With "table" in place of rounds: what becomes of each file that pydicom ships, as the table of docs/dicom.md.

Makes a 2544 x 3056 12-bit uncompressed MONOCHROME1 DICOM with a window and JPEGs of the same content in a temporary
folder, and times, one after the other in each round so that a busy machine slows all alike:

DICOM baseline: pydicom, apply_modality_lut, apply_voi_lut, inversion, cv2.resize to a short side of 512, min-max.
JPEG baseline: cv2.imread in colour, cv2.resize to a short side of 512.
Ours: images.read_view(file's bytes, 512).
Floors: reading the file and averaging its words, or a JPEG's decoding at 1/8: entropy decoding, which no scale saves.

The last line is one JSON object. Files come from the page cache; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import io
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.ingest import images
from pipeline.storage import pictures
from pipeline.storage.memory import keep_memory

HEIGHT, WIDTH, SHORT_SIDE = 3056, 2544, 512
# Noise of the JPEGs, in parts of the full range, and quality: archives hold 1 to 2 MB for such a picture.
JPEGS = {
    "grey_q90": ("L", 90, 0.004),
    "grey_q95": ("L", 95, 0.004),
    "grey_q95_noisy": ("L", 95, 0.010),
    "colour_q90": ("RGB", 90, 0.004),
    "colour_q95": ("RGB", 95, 0.004),
}


def radiograph(noise: float, seed: int) -> NDArray[np.float32]:
    """Something chest-like, 0 to 1: mediastinum, lungs, ribs, texture and white noise of the given deviation."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    y, x = y / HEIGHT, x / WIDTH
    picture = 0.3 + 0.45 * np.exp(-(((x - 0.5) / 0.12) ** 2)) + 0.3 * np.exp(-(((y - 0.9) / 0.25) ** 2))
    for centre in (0.28, 0.72):
        picture -= 0.25 * np.exp(-(((x - centre) / 0.14) ** 2) - ((y - 0.45) / 0.25) ** 2)
    picture += 0.05 * np.sin(45 * y + 8 * (x - 0.5) ** 2) * np.exp(-(((x - 0.5) / 0.3) ** 2))
    coarse = rng.normal(0, 0.02, (HEIGHT // 8, WIDTH // 8)).astype(np.float32)
    picture += cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    picture += rng.normal(0, noise, picture.shape).astype(np.float32)
    return np.asarray(np.clip(picture, 0, 1), dtype=np.float32)


def write_dicom(path: Path, picture: NDArray[np.float32]) -> None:
    """12 bits in 16, stored inverted, with a rescale and a window that clips a little at both ends."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = picture.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME1"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.RescaleSlope, data.RescaleIntercept = 1, 0
    data.WindowCenter, data.WindowWidth = 2048, 3000
    data.PixelData = (4095 - np.rint(picture * 4095)).astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


def dicom_baseline(path: Path) -> pictures.Grey:
    """The recipe of most notebooks."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    data = pydicom.dcmread(path)
    values = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data)
    if data.PhotometricInterpretation == "MONOCHROME1":
        values = values.max() - values
    height, width = values.shape
    scale = SHORT_SIDE / min(height, width)
    values = cv2.resize(values, (round(width * scale), round(height * scale)))
    low, high = values.min(), values.max()
    return np.asarray((values - low) / (high - low) * 255, dtype=np.uint8)


def dicom_floor(path: Path) -> Any:
    """Read the file and average its words, nothing else."""
    words = np.frombuffer(path.read_bytes()[-2 * HEIGHT * WIDTH :], np.uint16).reshape(HEIGHT, WIDTH)
    return cv2.resize(words, pictures.target_size(HEIGHT, WIDTH, SHORT_SIDE), interpolation=cv2.INTER_AREA)


def jpeg_baseline(path: Path) -> Any:
    """Colour, then reduced."""
    picture: Any = cv2.imread(str(path))
    return cv2.resize(picture, pictures.target_size(picture.shape[0], picture.shape[1], SHORT_SIDE))


def jpeg_floor(path: Path) -> Any:
    """Entropy decoding and one value a block."""
    picture: Any = Image.open(io.BytesIO(path.read_bytes()))
    picture.draft("L", (picture.width // 8, picture.height // 8))
    return np.asarray(picture)


def ours(path: Path) -> pictures.Grey:
    """What ingest does before it encodes."""
    return images.read_view(path.read_bytes(), SHORT_SIDE)[0]


def psnr(one: pictures.Grey, two: pictures.Grey) -> float:
    """Decibels, of 8 bit."""
    return float(10 * np.log10(255**2 / max(1e-9, float(np.mean((one.astype(float) - two) ** 2)))))


def race(ways: dict[str, Callable[[Path], Any]], path: Path, rounds: int) -> dict[str, float]:
    """Milliseconds of each way (median) and the median over rounds of baseline / ours; one round to warm up.

    The baseline runs in a process as Python starts it, ours and the floor in one that is set up as ingest's are.
    """
    spent: dict[str, list[float]] = {name: [] for name in ways}
    spawn = get_context("spawn")
    with (
        ProcessPoolExecutor(1, spawn) as plain,
        ProcessPoolExecutor(1, spawn, initializer=keep_memory) as kept,
    ):
        for turn in range(rounds + 1):
            for name, way in ways.items():
                took = (plain if name == "baseline" else kept).submit(timed, way, path).result()
                if turn:
                    spent[name].append(took)
    figures: dict[str, float] = {f"{name}_ms": round(statistics.median(times), 1) for name, times in spent.items()}
    ratios = [a / b for a, b in zip(spent["baseline"], spent["ours"], strict=True)]
    return figures | {"ratio": round(statistics.median(ratios), 2)}


def timed(way: Callable[[Path], Any], path: Path) -> float:
    """Milliseconds of CPU that one way takes for one file."""
    since = time.process_time()
    way(path)
    return 1000 * (time.process_time() - since)


def table() -> None:
    """Print a row for each of pydicom's own test files; a folder of files of one outcome takes one row."""
    import pydicom

    root = Path(pydicom.__file__).parent / "data" / "test_files"
    print("| File | Outcome |\n|---|---|")
    folders: Counter[tuple[str, str]] = Counter()
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        try:
            image, position, *_ = images.read_view(path.read_bytes())
            outcome = f"read, {image.shape[1]} x {image.shape[0]}{position and f', {position}'}"
        except pictures.ImageError as error:
            outcome = str(error)
        if path.parent == root:
            print(f"| {path.name} | {outcome} |")
        else:
            folders[path.relative_to(root).parts[0], outcome] += 1
    for (folder, outcome), count in sorted(folders.items()):
        print(f"| {folder}/ ({count}) | {outcome} |")


def main(rounds: int) -> None:
    """Print a line a case and the JSON object."""
    result: dict[str, Any] = {"size": [HEIGHT, WIDTH], "short_side": SHORT_SIDE, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.dcm"
        write_dicom(path, radiograph(0.01, 0))
        result["dicom"] = race({"baseline": dicom_baseline, "ours": ours, "floor": dicom_floor}, path, rounds)
        slow = pictures.resize(images.read_view(path.read_bytes())[0], SHORT_SIDE)
        result["dicom"]["largest_difference"] = int(np.abs(slow.astype(int) - ours(path)).max())
        print("dicom", result["dicom"], flush=True)
        jpegs: dict[str, dict[str, float]] = {}
        for seed, (name, (mode, quality, noise)) in enumerate(JPEGS.items()):
            path = Path(folder) / f"{name}.jpg"
            drawn = np.rint(radiograph(noise, seed) * 255).astype(np.uint8)
            Image.fromarray(drawn).convert(mode).save(path, quality=quality)
            figures = race({"baseline": jpeg_baseline, "ours": ours, "floor": jpeg_floor}, path, rounds)
            figures["kilobytes"] = path.stat().st_size // 1024
            figures["psnr_db"] = round(
                psnr(ours(path), pictures.resize(images.read_view(path.read_bytes())[0], SHORT_SIDE)), 1
            )
            jpegs[name] = figures
            print(name, figures, flush=True)
    result["jpeg"] = jpegs
    result["dicom_ratio"] = result["dicom"]["ratio"]
    result["jpeg_ratio"] = round(statistics.median(f["ratio"] for f in jpegs.values()), 2)
    result["dicom_per_s"] = round(1000 / result["dicom"]["ours_ms"], 1)
    result["jpeg_per_s"] = round(1000 / statistics.median(f["ours_ms"] for f in jpegs.values()), 1)
    result["lowest_psnr_db"] = min(f["psnr_db"] for f in jpegs.values())
    print(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1:] == ["table"]:
        table()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
