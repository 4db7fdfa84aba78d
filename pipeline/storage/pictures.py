"""Grey pictures as arrays and as the small JPEGs the shards hold: what reading raw files and training share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Pictures are small and processes are the parallelism; a process forked beside OpenCV's own threads can hang.
cv2.setNumThreads(0)

Grey = NDArray[np.uint8]

MAX_PIXELS = 80_000_000  # rows x columns; the largest detectors give 20 million. Checked before pixels are allocated
MIN_SIDE = 8  # pixels
REDUCED = {1: cv2.IMREAD_GRAYSCALE, 2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4}


class ImageError(ValueError):
    """A file that is no usable picture; the message is one line without any content of the file."""


def check_size(height: int, width: int) -> None:
    """Refuse pixels no radiograph has, before they are allocated."""
    if min(height, width) < MIN_SIDE:
        raise ImageError("image is smaller than a radiograph can be")
    if height * width > MAX_PIXELS:
        raise ImageError("header states a size no radiograph has")


def to_8_bit(values: NDArray[Any], present: NDArray[np.bool_] | None = None) -> Grey:
    """Min-max over the values that are ``present`` (all by default) to 0..255, rounded; the others become black."""
    ends = []
    for rows in blocks(values):
        seen = values[rows] if present is None else values[rows][present[rows]]
        if seen.size:
            ends.append((float(seen.min()), float(seen.max())))
    if not ends:
        raise ImageError("image is constant: padding only")
    low, high = float(np.min(ends)), float(np.max(ends))
    if not np.isfinite(high - low):
        raise ImageError("pixel values are not finite")
    if low == high:
        raise ImageError("image is constant")
    image = np.empty(values.shape, np.uint8)
    for rows in blocks(values):
        part = values[rows]
        scaled = (part.astype(np.result_type(part, np.float32)) - low) * (255 / (high - low))
        grey = np.rint(scaled).clip(0, 255)
        image[rows] = grey if present is None else np.where(present[rows], grey, 0)
    return image


def blocks(values: NDArray[Any]) -> Iterator[slice]:
    """Parts of the first axis of about a million values each: steps on them make no copies as large as the whole."""
    length = len(values)
    step = max(1, (1 << 20) * length // max(1, values.size))
    return (slice(at, at + step) for at in range(0, length, step))


def target_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Width and height, as OpenCV and Pillow order them, once the short side is ``short_side``; never enlarged."""
    if min(height, width) <= short_side:
        return width, height
    scale = short_side / min(height, width)
    return max(short_side, round(width * scale)), max(short_side, round(height * scale))


def resize(image: Grey, short_side: int) -> Grey:
    """Shrink uint8 [H, W] until its short side is ``short_side`` pixels, aspect kept, by area averaging."""
    height, width = image.shape
    if min(height, width) <= short_side:
        return image
    return area_means(image, target_size(height, width, short_side))


def area_means(image: Grey, size: tuple[int, int]) -> Grey:
    """Reduce uint8 [H, W] to (width, height) by area averaging."""
    if image.shape == size[::-1]:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def linear_means(image: Grey, size: tuple[int, int]) -> Grey:
    """Reduce uint8 [H, W] to (width, height), each at least half of the image's, by the two nearest pixels either way.
    In whole numbers, so that every machine gives the same."""
    if image.shape == size[::-1]:
        return image
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR_EXACT), dtype=np.uint8)


def encode(image: Grey, quality: int) -> bytes:
    """Grey JPEG of uint8 [H, W]; ``quality`` 1..100. The same pixels give the same bytes."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ImageError("picture cannot be encoded")
    return bytes(data)


def decode(data: bytes, reduce: int = 1) -> Grey:
    """Inverse of ``encode``: uint8 [H, W].

    Args:
        reduce: 2 or 4 for a picture of 1/2 or 1/4 of the size, sides rounded up, made of the low frequencies of each
            JPEG block alone: less to transform and to resize, and about what area averaging gives.

    Raises:
        ImageError: not a JPEG.
    """
    # ``encode`` notes no orientation, and looking for one takes 2 % of the time.
    flags = REDUCED[reduce] | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if image is None:
        raise ImageError("not an encoded picture")
    return np.asarray(image, dtype=np.uint8)
