"""The evaluation crop: what every image is to a model outside training's random crops."""

from __future__ import annotations

import cv2
import numpy as np


def evaluation_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Short side to ``size``, then the centre square: uint8 [H, W] -> uint8 [size, size]."""
    height, width = image.shape
    factor = size / min(height, width)
    resized = resize_to(image, max(size, round(width * factor)), max(size, round(height * factor)))
    y, x = (resized.shape[0] - size) // 2, (resized.shape[1] - size) // 2
    return np.ascontiguousarray(resized[y : y + size, x : x + size])


def resize_to(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [H, W] -> [height, width]: by area averaging where it shrinks, else linear."""
    shrinks = image.shape[0] >= height and image.shape[1] >= width
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
