"""Image and text augmentation (paper section 4.2), on grey uint8 images and plain text."""

from __future__ import annotations

import math
import re

import cv2
import numpy as np
from numpy.random import Generator

from pipeline.params import Augment

# Crop of the rows before "+ Augmentations" of Table 4; the paper does not say (docs/fidelity.md).
PLAIN_CROP = (0.9, 1.0)
ASPECT = (3 / 4, 4 / 3)
_CLAHE = cv2.createCLAHE(clipLimit=4.0, tileGridSize=(8, 8))


def augment_image(image: np.ndarray, size: int, options: Augment, rng: Generator) -> np.ndarray:
    """One training draw: random resized crop, then CLAHE and brightness/contrast jitter.

    Hue and saturation leave a grey image as it is, so they are not computed; there is no flip, which would contradict
    left and right in the text.

    Args:
        image: uint8 [H, W].
        size: side of the square output in pixels.

    Returns:
        uint8 [size, size].
    """
    crop = random_resized_crop(image, size, options.crop_scale if options.image else PLAIN_CROP, rng)
    if not options.image:
        return crop
    if rng.random() < options.clahe:
        crop = _CLAHE.apply(crop)
    brightness = rng.uniform(1 - options.brightness, 1 + options.brightness)
    contrast = rng.uniform(1 - options.contrast, 1 + options.contrast)
    levels = np.arange(256, dtype=np.float32)
    mean = float(crop.mean())
    if rng.random() < 0.5:
        levels = np.clip(levels * brightness, 0, 255)
        mean = float(levels[crop].mean())
        levels = mean + (levels - mean) * contrast
    else:
        levels = np.clip(mean + (levels - mean) * contrast, 0, 255) * brightness
    return cv2.LUT(crop, np.clip(np.rint(levels), 0, 255).astype(np.uint8))


def random_resized_crop(image: np.ndarray, size: int, scale: tuple[float, float], rng: Generator) -> np.ndarray:
    """Crop a random share of the area at a random aspect ratio and resize it to a square.

    A share above 1 (the paper's scale ends at 1.1) cannot be cut out: each side is then the image's own, so the draw is
    the whole image along that side rather than a second draw or a centre crop.

    Returns:
        uint8 [size, size].
    """
    height, width = image.shape
    area = height * width * rng.uniform(*scale)
    ratio = math.exp(rng.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
    w = min(width, max(1, round(math.sqrt(area * ratio))))
    h = min(height, max(1, round(math.sqrt(area / ratio))))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return _resize(image[y : y + h, x : x + w], size, size)


def evaluation_image(image: np.ndarray, size: int) -> np.ndarray:
    """Short side to ``size``, then the centre square: uint8 [H, W] -> uint8 [size, size]."""
    height, width = image.shape
    factor = size / min(height, width)
    resized = _resize(image, max(size, round(width * factor)), max(size, round(height * factor)))
    y, x = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return np.ascontiguousarray(resized[y : y + size, x : x + size])


def _resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def sentences(text: str) -> list[str]:
    """Split prose after full stops, question and exclamation marks that are followed by white space."""
    return [s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s]


def swap_sentences(text: str, rng: Generator) -> str:
    """The same sentences in another random order; a text of one sentence is returned as it is."""
    parts = sentences(text)
    if len(parts) < 2:
        return text
    swapped = [parts[i] for i in rng.permutation(len(parts))]
    if swapped == parts:  # a swap that swaps nothing is no second text
        swapped = [*parts[1:], parts[0]]
    return " ".join(swapped)
