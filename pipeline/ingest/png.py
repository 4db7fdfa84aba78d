"""PNG: what Pillow does not look at. Its parts are counted, and a picture without its last rows is refused."""

from __future__ import annotations

import zlib
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.storage.pictures import ImageError

MAX_CHUNKS = 200_000  # writers make them of 8 kB or more
MAX_BESIDE = 1 << 24  # bytes of other chunks than the picture's: Pillow keeps copies of them
PIECE = 1 << 16  # bytes
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First column and row and their steps of the passes of an interlaced picture (PNG specification 8.2).
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def data_chunks(data: bytes) -> list[tuple[int, int]]:
    """Where the chunks of picture data are, as starts and stops.

    Raises:
        ImageError: more chunks, or more in other chunks, than a radiograph has.
    """
    at, beside, found = 8, 0, []
    for _ in range(MAX_CHUNKS):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"IDAT":
            found.append((at + 8, at + 8 + size))
        elif len(kind) < 4 or kind == b"IEND":
            return found
        else:
            beside += size
            if beside > MAX_BESIDE:
                break
        at += 12 + size
    raise ImageError("PNG holds more beside its picture than a radiograph's")


def check_rows(data: bytes, chunks: list[tuple[int, int]], picture: Any) -> None:
    """Refuse a picture that Pillow has filled up: what is missing is 0 to the end, so that only a picture with a row
    of zeros there is inflated again, to count.

    Raises:
        ImageError: data end before the last row.
    """
    width, height = picture.size
    if all(picture.crop((0, row, width, row + 1)).getbbox() for row in (height - 2, height - 1)):
        return  # of an interlaced picture either may be the last row written
    bits = data[24] * CHANNELS[data[25]]
    parts = PASSES if data[28] else ((0, 0, 1, 1),)
    sizes = [(max(0, -(-(width - x) // dx)), max(0, -(-(height - y) // dy))) for x, y, dx, dy in parts]
    missing = sum(rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns)
    engine, view = zlib.decompressobj(), memoryview(data)
    there = [view[start:stop] for start, stop in chunks]
    for piece in (chunk[at : at + PIECE] for chunk in there for at in range(0, len(chunk), PIECE)):
        left: Any = piece
        while left and missing > 0 and not engine.eof:
            missing -= len(engine.decompress(left, 1 << 20))
            left = engine.unconsumed_tail
        if missing <= 0:
            return
        if engine.eof:  # zlib would keep all that follows, anew with each piece
            break
    raise ImageError("image data truncated")


def deep_luma(data: bytes) -> NDArray[np.uint16]:
    """The luma of a PNG of 16 bits with colour or alpha, uint16 [H, W]; Pillow gives 8 bits of these. Alpha is ignored,
    as it is in others.

    Raises:
        ImageError: it cannot be decoded.
    """
    values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16:
        raise ImageError("image data truncated or damaged")
    # Where the colours are equal, which is grey, so is the luma.
    return values if values.ndim == 2 else np.asarray(cv2.cvtColor(values[:, :, :3], cv2.COLOR_BGR2GRAY), np.uint16)
