"""How ingest scales with processes and with the archive: python -m benchmarks.ingest_scale [images ...].

An archive of DICOM files (1024 x 1024, 12 bit, one file under many names) is ingested by one and by two processes, and
at several sizes by two. The last line is one JSON object: ``speedup`` of two processes over one, and per size the
seconds and the peak memory, in MB, of the parent and of the largest child.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

RUN = """
import sys
from pathlib import Path
from pipeline.ingest.build import ingest_archive
from pipeline.config.archive_params import Ingest, Source

if __name__ == "__main__":
    root, out, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    options = Ingest(short_side=512, shard_size=100, workers=workers)
    ingest_archive("rsna", Source("rsna", root, ""), options, out / "shards", out / "index.parquet", out / "work", 0)
"""


def dicom() -> bytes:
    """A smooth 12-bit picture with noise, as an uncompressed DICOM."""
    import io

    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset

    rows, columns = np.mgrid[0:1024, 0:1024]
    smooth = 1800 + 900 * np.sin(rows / 170) * np.cos(columns / 140)
    values = (smooth + np.random.default_rng(0).normal(0, 30, smooth.shape)).clip(0, 4095).astype(np.uint16)
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns, data.SamplesPerPixel = values.shape[0], values.shape[1], 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.WindowCenter, data.WindowWidth = 1800, 2400
    data.PixelData = values.tobytes()
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def archive(folder: Path, images: int, content: bytes) -> Path:
    """An RSNA of ``images`` hard links to one file."""
    root = folder / f"rsna-{images}"
    (root / "stage_2_train_images").mkdir(parents=True)
    (folder / "one.dcm").write_bytes(content)
    names = [f"{n:08}" for n in range(images)]
    for name in names:
        (root / "stage_2_train_images" / f"{name}.dcm").hardlink_to(folder / "one.dcm")
    rows = "".join(f"{name},,,,,0\n" for name in names)
    (root / "stage_2_train_labels.csv").write_text(f"patientId,x,y,width,height,Target\n{rows}")
    return root


def run(folder: Path, root: Path, workers: int) -> tuple[float, float, float]:
    """Seconds from start to end, and the peaks of the parent's and the largest child's memory in MB."""
    script, out = folder / "run.py", folder / "out"
    script.write_text(RUN)
    begin = time.perf_counter()
    command = [sys.executable, str(script), str(root), str(out), str(workers)]
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin"}
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    parent = child = 0.0
    while process.poll() is None:
        try:
            parent = max(parent, process.memory_info().rss / 1e6)
            child = max([child, *(p.memory_info().rss / 1e6 for p in process.children(recursive=True))])
        except psutil.Error:  # one of them ended in between
            pass
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    shutil.rmtree(out)
    if process.returncode:
        raise SystemExit("the ingest failed")
    return seconds, parent, child


def main(sizes: list[int]) -> None:
    """Print the figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        content = dicom()
        figures: dict[str, object] = {}
        small = archive(folder, 400, content)
        large = archive(folder, 2000, content)
        ratios = []
        for _ in range(3):  # the start of the processes, which both sizes pay, is taken off
            one = run(folder, large, 1)[0] - run(folder, small, 1)[0]
            two = run(folder, large, 2)[0] - run(folder, small, 2)[0]
            ratios.append(one / two)
            print(f"1,600 images: one process {one:.1f} s, two {two:.1f} s")
        figures["speedup"] = round(float(np.median(ratios)), 2)
        for size in sizes:
            root = archive(folder, size, content)
            seconds, parent, child = run(folder, root, 2)
            figures[str(size)] = {"seconds": round(seconds, 1), "parent_mb": round(parent), "child_mb": round(child)}
            print(f"{size:,} images: {seconds:.1f} s, parent {parent:.0f} MB, largest child {child:.0f} MB")
            shutil.rmtree(root)
        print(json.dumps(figures))


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [1000, 20000])
