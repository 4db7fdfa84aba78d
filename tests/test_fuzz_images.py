"""Damaged pictures: whatever the damage, a picture or an ImageError of one line, in bounded memory.

The mutations run in a process of their own, so that a codec that crashes is counted and the rest goes on:
python tests/test_fuzz_images.py FIRST COUNT prints the number of each input before it is read.
"""

import io
import resource
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 1 << 30  # bytes of address space above what the imports take


def seeds():
    """Small files of every kind that is read."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import pydicom.uid as uid
    import test_dicom as made

    grey, deep = made.smooth(8, 40, 48), made.smooth(12, 40, 48)
    blocks = (np.arange(12).reshape(3, 4) * 397) % 4096
    files = [
        made.make(deep, "MONOCHROME1", WindowCenter=2000, WindowWidth=3000, RescaleSlope=1, RescaleIntercept=-5),
        made.make(deep, syntax=uid.ImplicitVRLittleEndian, VOILUTSequence=made.table(0, list(range(4096)))),
        made.make(deep.astype(np.int16), syntax=uid.ExplicitVRBigEndian, PixelPaddingValue=3, ViewPosition="PA"),
        made.make(deep, syntax=uid.DeflatedExplicitVRLittleEndian),
        made.make(deep, syntax=uid.ImplicitVRLittleEndian, preamble=False),
        made.make(made.colours(), "RGB"),
        made.make(
            deep, syntax=uid.RLELossless, frame=made.rle([(deep >> 8).astype(np.uint8), (deep & 255).astype(np.uint8)])
        ),
        made.make(grey, syntax=uid.JPEGBaseline8Bit, frame=made.by_opencv(grey)),
        made.make(
            np.kron(blocks, np.ones((8, 8), int)).astype(np.uint16),
            syntax=uid.JPEGExtended12Bit,
            frame=made.by_hand(blocks),
            BitsStored=12,
        ),
        made.make(deep, syntax=uid.JPEGLosslessSV1, frame=made.by_gdcm(deep, "JPEGLosslessProcess14_1", 12)),
        made.make(grey, syntax=uid.JPEGLossless, frame=made.by_gdcm(grey, "JPEGLosslessProcess14", 8)),
        made.make(deep, syntax=uid.JPEGLSLossless, frame=made.by_gdcm(deep, "JPEGLSLossless", 12)),
        made.make(deep, syntax=uid.JPEG2000Lossless, frame=made.by_openjpeg(deep, 12)),
        made.make(grey, syntax=uid.JPEG2000, frame=made.by_openjpeg(grey, 8, False)),
    ]
    for values, options in (
        (grey, {}),
        (grey, {"progressive": True}),
        (np.dstack([grey, grey // 2, grey]), {"quality": 90}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "JPEG", **options)
        files.append(buffer.getvalue())
    for values in (grey, deep):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def mutated(files, number):
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
            cut = int(rng.integers(len(other)))
            data[at:] = other[cut:]
        elif kind == 4:
            data[at:at] = data[at : at + int(rng.integers(1, 200))]
        elif kind == 5:
            del data[at : at + int(rng.integers(1, 60))]
        else:
            size = int(rng.choice([2, 4]))
            value = int(rng.choice([0, 1, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF]))
            order = "<" if rng.random() < 0.7 else ">"
            data[at : at + size] = (
                struct.pack(f"{order}I", value)[:size] if order == "<" else struct.pack(">I", value)[-size:]
            )
    return bytes(data)


def work(first, count):
    """Read the inputs; prints each number, and at the end one JSON object of what came out."""
    files = seeds()
    from pipeline.ingest.images import read_view
    from pipeline.storage.pictures import ImageError

    for data in files:
        read_view(data)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for number in range(first, first + count):
        print(f"\n{number}", end="\t", flush=True)
        data, wrong = mutated(files, number), ""
        since = time.perf_counter()
        try:
            image, position = read_view(data, 0 if number % 2 else 16)
            outcome = "read"
            if image.dtype != np.uint8 or image.ndim != 2 or position not in ("PA", "AP", "LATERAL", ""):
                wrong = "no picture"
        except ImageError as error:
            outcome = " ".join(str(error).split())
            if outcome != str(error) or len(outcome) > 120:
                wrong = "message"
        except Exception as error:
            outcome = wrong = f"unexpected {type(error).__name__}"
        spent = time.perf_counter() - since
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(outcome, f"{spent:.3f}", peak, wrong, sep="\t", end="", flush=True)


def run(first, count):
    """All inputs, past crashes: what was wrong, the numbers that crashed, outcomes, slowest in s, peak in MB."""
    bad, crashed, outcomes, slowest, peak = [], [], Counter(), 0.0, 0
    stop = first + count
    while first < stop:
        done = subprocess.run(
            [sys.executable, __file__, str(first), str(stop - first)], capture_output=True, text=True, check=False
        )
        rows = [line.split("\t") for line in done.stdout.splitlines() if line]
        assert rows, done.stderr
        for row in rows:
            if len(row) < 5:
                crashed.append(int(row[0]))
                continue
            outcomes[row[1]] += 1
            slowest, peak = max(slowest, float(row[2])), max(peak, int(row[3]))
            if row[4]:
                bad.append((int(row[0]), row[4]))
        first = int(rows[-1][0]) + 1
        assert done.returncode == 0 or len(rows[-1]) < 5, done.stderr
    return bad, crashed, outcomes, slowest, peak


def test_damaged_files_are_read_or_refused():
    bad, crashed, outcomes, *_ = run(0, 600)
    assert not bad and not crashed and sum(outcomes.values()) == 600
    assert outcomes["read"] > 20 and len(outcomes) > 15


@pytest.mark.drill
def test_many_damaged_files():
    bad, crashed, outcomes, slowest, peak = run(1000, 20_000)
    print(f"{sum(outcomes.values()):,} inputs, {outcomes['read']:,} read, {len(outcomes) - 1} reasons", end="; ")
    print(f"slowest {slowest} s, peak {peak} MB, codec crashes {crashed}, wrong {bad}")
    assert not bad
    assert len(crashed) <= 5  # ingest isolates a codec's crash to the file


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
