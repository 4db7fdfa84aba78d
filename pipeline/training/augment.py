"""Image and text augmentation (paper section 4.2), on grey uint8 images and plain text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from pipeline.config.params import Augment
from pipeline.storage.evaluation_crop import resize_to
from pipeline.storage.pictures import Grey
from pipeline.storage.shards import load_view
from pipeline.study import View

# Crop of the rows before "+ Augmentations" of Table 4; the paper does not say (docs/fidelity.md).
PLAIN_CROP = (0.9, 1.0)
ASPECT = (math.log(3 / 4), math.log(4 / 3))
_CLAHE = cv2.createCLAHE(clipLimit=4.0, tileGridSize=(8, 8))


class Crop(NamedTuple):
    """A rectangle of a picture in its full pixels, and the largest of 1, 2 and 4 that still leaves it an own pixel for
    each one of the output when the picture is decoded at 1, 1/2 or 1/4 of its size. It begins and ends between pixels
    of that size."""

    x: int
    y: int
    width: int
    height: int
    reduce: int


def augment_view(
    view: View, size: int, options: Augment, rng: Generator, load: Callable[[View, int], Grey] = load_view
) -> np.ndarray:
    """One training draw of a view in its shard: random resized crop, then CLAHE and brightness/contrast jitter (paper
    section 4.2).

    Hue and saturation leave a grey image as it is, so they are not computed; there is no flip, which would contradict
    left and right in the text. The crop is drawn from the size that the index states, so the picture is decoded no
    larger than the crop needs: before CLAHE, which steepens every difference, grey values differ by less than one level
    on average from those of the full picture.

    Args:
        size: side of the square output in pixels.
        load: view and reduction (1, 2, 4) to the picture, uint8, at that part of its size.

    Returns:
        uint8 [size, size].
    """
    crop = draw_crop(view.height, view.width, size, options.crop_scale if options.image else PLAIN_CROP, rng)
    return _jitter(cut_and_resize(load(view, crop.reduce), crop, size, crop.reduce), options, rng)


def _jitter(crop: np.ndarray, options: Augment, rng: Generator) -> np.ndarray:
    """CLAHE, and brightness and contrast in random order: together a gain, a shift and a limit."""
    if not options.image:
        return crop
    chance, gain, steepness, order = rng.random(4).tolist()  # one call: a call costs more than its numbers
    if chance < options.clahe:
        crop = _CLAHE.apply(crop)
    brightness = max(0.0, 1 + options.brightness * (2 * gain - 1))
    contrast = max(0.0, 1 + options.contrast * (2 * steepness - 1))
    mean = cv2.mean(crop)[0]
    if order < 0.5:
        mean *= brightness
        if brightness > 1:  # white stays white, so the mean that contrast is about is that of the limited picture
            mean = cv2.mean(cv2.convertScaleAbs(crop, alpha=brightness))[0]
        shift = mean * (1 - contrast)
        limit = round(255 * contrast + shift)
    else:
        shift = mean * (1 - contrast) * brightness
        limit = round(255 * brightness)
    changed = cv2.addWeighted(crop, brightness * contrast, crop, 0, shift)
    return cv2.min(changed, limit) if limit < 255 else changed


def draw_crop(height: int, width: int, size: int, scale: tuple[float, float], rng: Generator) -> Crop:
    """A random share of the area of a picture at a random aspect ratio and place, to become a square of ``size``.

    A share above 1 (the paper's scale ends at 1.1) cannot be cut out: each side is then the picture's own, so the draw
    is the whole picture along that side rather than a second draw or a centre crop.
    """
    share, aspect, left, top = rng.random(4).tolist()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    ratio = math.exp(ASPECT[0] + (ASPECT[1] - ASPECT[0]) * aspect)
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    side = min(w, h)
    reduce = 4 if side >= 4 * size else 2 if side >= 2 * size else 1
    x, w = _place(w, width, reduce, left)
    y, h = _place(h, height, reduce, top)
    return Crop(x, y, w, h, reduce)


def _place(length: float, side: int, reduce: int, where: float) -> tuple[int, int]:
    """Start and length of a stretch of about ``length`` on a side, both multiples of ``reduce``; ``where`` in [0, 1)
    says which of all possible places."""
    pixels = min(side // reduce, max(1, round(length / reduce)))
    return reduce * int(where * (side // reduce - pixels + 1)), reduce * pixels


def cut_and_resize(image: np.ndarray, crop: Crop, size: int, reduced: int = 1) -> np.ndarray:
    """Cut a rectangle out of uint8 [H, W] and resize it to uint8 [size, size].

    Args:
        reduced: 1 for the full picture, by area averaging; ``crop.reduce`` for one that was decoded at that part of its
            size. Little is left to shrink then, and the result is interpolated: the same in a fifth of the time.
    """
    x, y, width, height, _ = crop
    if reduced == 1:
        return resize_to(image[y : y + height, x : x + width], size, size)
    piece = image[y // reduced : (y + height) // reduced, x // reduced : (x + width) // reduced]
    return cv2.resize(piece, (size, size), interpolation=cv2.INTER_LINEAR)
