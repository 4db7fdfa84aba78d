"""How near a guess of hidden pixels comes to the truth: PSNR and SSIM over them; and guesses that need no model."""

from __future__ import annotations

import cv2
import numpy as np

MOST_PSNR = 100.0  # dB; of a guess without any error
SIGMA, WINDOW = 1.5, 11  # of SSIM's Gaussian, pixels
C1, C2 = 0.01**2, 0.03**2  # its constants for grey in [0, 1]
RADIUS = 3  # pixels, of in-painting


def psnr(truth: np.ndarray, guess: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio over hidden pixels, dB, float64 [B]: 10 log10(1 / mean squared error), at most 100.

    Args:
        truth, guess: grey in [0, 1], [B, H, W]; ``hidden``: bool [B, H, W], at least one pixel of each.
    """
    count = hidden.sum(axis=(1, 2))
    error = np.where(hidden, guess.astype(np.float64) - truth, 0.0)
    mean = (error * error).sum(axis=(1, 2)) / count
    return np.asarray(-10 * np.log10(np.maximum(mean, 10 ** (-MOST_PSNR / 10))))


def ssim(truth: np.ndarray, guess: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Structural similarity (Wang et al., IEEE TIP 2004) of the completed picture, its map averaged over hidden pixels,
    float64 [B], in [-1, 1]; arguments as ``psnr``.

    The window is a Gaussian of 11 x 11 pixels; beyond the border the picture is mirrored. Variances are those of the
    window's weights (no correction for the sample).
    """
    found = np.empty(len(truth))
    for n in range(len(truth)):
        x = truth[n].astype(np.float64)
        y = np.where(hidden[n], guess[n], x).astype(np.float64)
        a, b = _blurred(x), _blurred(y)
        xx, yy, xy = _blurred(x * x) - a * a, _blurred(y * y) - b * b, _blurred(x * y) - a * b
        similarity = (2 * a * b + C1) * (2 * xy + C2) / ((a * a + b * b + C1) * (xx + yy + C2))
        found[n] = similarity[hidden[n]].mean()
    return found


def _blurred(x: np.ndarray) -> np.ndarray:
    return np.asarray(cv2.GaussianBlur(x, (WINDOW, WINDOW), SIGMA, borderType=cv2.BORDER_REFLECT))


def averaged(x: np.ndarray, scale: int) -> np.ndarray:
    """[B, S, S] averaged over 2**scale x 2**scale pixels, float64."""
    side = 2**scale
    count, size, _ = x.shape
    return np.asarray(x.reshape(count, size // side, side, size // side, side).mean(axis=(2, 4), dtype=np.float64))


def without_model(images: np.ndarray, hidden: np.ndarray) -> dict[str, np.ndarray]:
    """What needs no model, grey in [0, 1], float64 [B, S, S]: the mean of the visible pixels everywhere (``mean``), and
    the visible pixels continued inwards (``inpainted``; Telea 2004), which gives a blur.

    Args:
        images: uint8 [B, S, S]; ``hidden``: bool [B, S, S].
    """
    levels = np.array([image[~part].mean() / 255 for image, part in zip(images, hidden, strict=True)])
    filled = [
        cv2.inpaint(np.where(part, 0, image).astype(np.uint8), part.astype(np.uint8), RADIUS, cv2.INPAINT_TELEA)
        for image, part in zip(images, hidden, strict=True)
    ]
    return {
        "mean": np.broadcast_to(levels[:, None, None], images.shape),
        "inpainted": np.stack(filled) / 255,
    }
