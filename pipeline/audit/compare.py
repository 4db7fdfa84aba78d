"""Whether two pictures are copies of one exposure: thumbnails, registration, correlation of the finest detail."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from pipeline.audit.neighbours import MAX_CROP, SCALE, SIDE, WHOLE, Floats, Thumbs, rank_of_each
from pipeline.storage.pictures import Grey

CLOSE = 0.7  # what a crop of up to MAX_CROP a side is of a side, about: how much finer its detail is in the original
DETAIL = 192  # pixels of the side on which two pictures are compared, at most,
FINEST = 0.75  # and of the pixels that either has there, of large crops: the last ones differ most
ENOUGH = 160  # pixels of that side from which on the correlation counts as it is
FEWEST = 32  # pixels of that side on which pictures without fine detail are compared, at least
SOFT = 1.5  # grey levels: root mean square of the finest detail below which a picture has none
MIN_COARSE = 0.78  # correlation of the finest detail of two thumbnails below which pictures are not opened,
MIN_HALF = 0.7  # and of two of half the side below which thumbnails are not compared
KEPT = 5  # pictures that are compared further with one, of the likeliest
SLACK = 0.05  # of a side: what may be cut off beyond MAX_CROP, or be missing

LINEAR, CUBIC, BORDER = (
    cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
    cv2.BORDER_REPLICATE,
)


# ---- thumbnails


def normalise_locally(image: Floats, smooth: float, wide: float, local: float) -> tuple[Floats, NDArray[np.bool_]]:
    """Band-pass and divide by the local deviation: what gamma, window, contrast and CLAHE change least.

    Args:
        image: float32 [H, W], grey levels.
        smooth: deviation in pixels of the Gaussian that takes off noise (0: none); ``wide`` of that which is taken off
            as background; ``local`` of the window in which the deviation is measured.

    Returns:
        float32 [H, W] within ±4, and bool [H, W], false where the picture is flat. An inverted picture gives the
        negative.
    """
    fine = cv2.GaussianBlur(image, (0, 0), smooth) if smooth else image
    detail = fine - cv2.GaussianBlur(fine, (0, 0), wide)
    window = 2 * round(1.73 * local) + 1  # a box as wide as the Gaussian, and many times faster
    deviation = np.sqrt(np.maximum(cv2.blur(detail * detail, (window, window)), 0))  # sums that slide may end below 0
    floor = max(0.5, 0.2 * float(np.sqrt(np.mean(detail * detail))))  # else a clipped window leaves only noise
    return np.clip(detail / (deviation + floor), -4, 4), deviation > floor


def square(image: Grey, side: int) -> Floats:
    """uint8 [H, W] as float32 [side, side]; the aspect is dropped."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)


def thumbnail(image: Grey) -> tuple[Thumbs, float]:
    """int8 [2, SIDE, SIDE], the picture normalised, and once more with finer filters as a crop of it would be; and the
    share of it that is not flat."""
    small = square(image, SIDE)
    whole, textured = normalise_locally(small, 0.7, 4.0, 4.0)
    close = normalise_locally(small, 0.7 * CLOSE, 4.0 * CLOSE, 4.0 * CLOSE)[0]
    return np.rint(np.stack([whole, close]) * (SCALE - 1)).astype(np.int8), float(textured.mean())


# ---- comparing two pictures


def register(outer: Floats, inner: Floats, frame: Floats, rounds: int) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Find which part of each of n pictures another one is by Gauss-Newton on four numbers (Lucas and Kanade 1981), the
    slopes being those of the other, which stay (Baker and Matthews 2004).

    Args:
        outer: normalised pictures float32 [n, T, T]; ``inner`` likewise [n, S, S], their signs as those of ``outer``.
        frame: [n, 4], left, top, width and height of the first guess, as shares of the outer's sides.

    Returns:
        The frames, ``outer`` seen through them float32 [n, S, S], and where these are within it, bool [n, S, S]. A copy
        is a rectangle of the other picture: that it may not be turned tells copies from other exposures of a patient.
    """
    (n, side, _), wide = inner.shape, outer.shape[1]
    at = (np.arange(side, dtype=np.float32) + 0.5) / side
    rows = inner.reshape(n * side, side)
    slopes = np.zeros((4, n, side, side), np.float32)
    edge = max(2, side // 12)  # where the filters see a crop's border, the original has none
    within = (slice(None), slice(edge, -edge), slice(edge, -edge))
    for number, axis in enumerate(((1, 0), (0, 1))):
        slopes[number][within] = cv2.Sobel(rows, cv2.CV_32F, *axis, scale=side / 8).reshape(n, side, side)[within]
    slopes[2], slopes[3] = slopes[0] * at, slopes[1] * at[:, None]
    of_each = np.ascontiguousarray(slopes.transpose(1, 0, 2, 3)).reshape(n, 4, -1)
    moments = (of_each @ of_each.transpose(0, 2, 1)).astype(np.float64)
    damped = 1e-3 / 4 * np.trace(moments, axis1=1, axis2=2)[:, None, None] + 1e-9
    solve = np.linalg.inv(moments + damped * np.eye(4))
    guess, seen = frame.astype(np.float64), np.empty((n, side, side), np.float32)
    for step in range(rounds + 1):
        for number, (left, top, width, height) in enumerate(guess.tolist()):
            across = (width * wide / side, 0, (left + width / (2 * side)) * wide - 0.5)
            down = (0, height * wide / side, (top + height / (2 * side)) * wide - 0.5)
            matrix = np.array([across, down])
            seen[number] = cv2.warpAffine(outer[number], matrix, (side, side), flags=LINEAR, borderMode=BORDER)
        x, y = (guess[:, axis, None] + guess[:, axis + 2, None] * at for axis in (0, 1))
        inside = ((y >= 0) & (y <= 1))[:, :, None] & ((x >= 0) & (x <= 1))[:, None]
        if step == rounds:
            break
        change = solve @ (of_each @ ((seen - inner) * inside).reshape(n, -1, 1))
        move, stretch = change[:, :2, 0], 1 + np.clip(change[:, 2:, 0], -0.2, 0.2)
        # So much must the inner one move and grow to fit: the frame does the opposite.
        guess = np.concatenate([guess[:, :2] - guess[:, 2:] * move / stretch, guess[:, 2:] / stretch], axis=1)
        guess = np.clip(guess, [-0.3, -0.3, 0.4, 0.4], [0.6, 0.6, 1.4, 1.4])
    return guess.astype(np.float32), seen, inside


def correlation(a: Floats, b: Floats, where: NDArray[np.bool_]) -> NDArray[np.float64]:
    """float64 [n]: Pearson's correlation of n pairs of pictures [n, S, S] where ``where`` is true; 0 where that is
    under a quarter of them."""
    share, mask = where.mean((1, 2)), where.astype(np.float64)
    x, y = ((p - (np.average(p, (1, 2), mask + 1e-12))[:, None, None]) * mask for p in (a, b))
    size = np.sqrt((x * x).sum((1, 2)) * (y * y).sum((1, 2)))
    return np.asarray(np.where(share < 0.25, 0, (x * y).sum((1, 2)) / np.maximum(size, 1e-9)), np.float64)


def alike(
    outer: Thumbs, inner: NDArray[np.int8], frame: Floats, sign: NDArray[np.int8], whose: NDArray[np.int64]
) -> tuple[Floats, NDArray[np.bool_]]:
    """Where some pictures may be in others, by their thumbnails: frames float32 [n, 4], and bool [n], false for those
    that are not, or not among the ``KEPT`` likeliest of one.

    Args:
        outer: thumbnails int8 [n, 2, SIDE, SIDE] as ``thumbnail`` makes them; ``inner`` [n, SIDE, SIDE], the first of
            each.
        frame: guesses [n, 4] where each ``inner`` is in its ``outer``, to a few % of a side; ``sign`` int8 [n], -1
            where one is inverted; ``whose`` int64 [n], which picture each ``outer`` is.
    """
    finer = (frame[:, 2] * frame[:, 3] <= CLOSE).astype(int)
    whole = outer[np.arange(len(outer)), finer].astype(np.float32)
    part = inner.astype(np.float32) * sign[:, None, None].astype(np.float32)
    frame, left = frame.copy(), np.arange(len(outer))  # those that may be copies
    for wide, side, rounds, least in ((SIDE // 2, SIDE * 3 // 8, 3, MIN_HALF), (SIDE, SIDE, 3, MIN_COARSE)):
        if len(left):
            large, small = _resized(whole[left], wide), _resized(part[left], side)
            frame[left], seen, inside = register(large, small, frame[left], rounds)
            inside[:, :2] = inside[:, -2:] = inside[:, :, :2] = inside[:, :, -2:] = False
            value = correlation(_fine(seen), _fine(small), inside)
            left = left[(value >= least) & (rank_of_each(whose[left], value) < KEPT)]
    return frame, np.isin(np.arange(len(outer)), left)


def _resized(pictures: Floats, side: int) -> Floats:
    """float32 [n, S, S] as [n, side, side]."""
    return np.stack([cv2.resize(p, (side, side), interpolation=cv2.INTER_AREA) for p in pictures])


def look_closely(outer: Grey, inner: Grey, frame: Floats, sign: int) -> tuple[float, Floats]:
    """How far the finest detail agrees that two pictures can show, where neither is black or white.

    Args:
        outer, inner: uint8 [H, W] of any sizes; ``frame`` a guess to about 1 % where ``inner`` is in ``outer``.
        sign: -1 where one of them is inverted.

    Returns:
        The agreement, and the frame after registration. Pictures in which nothing is that fine are compared on a half
        and a quarter of the pixels, too, and agree as they do there, if that is more.
    """
    width, height = (float(v) for v in frame[2:])
    there = min(*inner.shape, outer.shape[0] * height, outer.shape[1] * width) + 0.5
    side = max(8, min(DETAIL, int(there if width * height > CLOSE else FINEST * there)))
    for pixels, rounds in ((side // 2, 4), (side, 3)):
        target = normalise_locally(square(inner, pixels), 0.7, 2.0, 4.0)[0] * np.float32(sign)
        within = normalise_locally(_part(outer, frame, pixels), 0.7, 2.0, 4.0)[0]
        move = register(within[None], target[None], WHOLE[None], rounds)[0][0]
        frame = np.concatenate([frame[:2] + move[:2] * frame[2:], frame[2:] * move[2:]])
    best = -1.0
    for pixels in (side, side // 2, side // 4):
        if pixels < min(side, FEWEST):
            break
        a, b = _part(outer, frame, pixels), square(inner, pixels)
        best = max(best, agreement(_detail(a, b, sign), pixels))
        if np.sqrt(np.mean(_fine(np.stack([a, b])) ** 2, (1, 2))).max() > SOFT:
            break
    return best, frame


def _detail(a: Floats, b: Floats, sign: int) -> float:
    """The correlation of the finest detail of two pictures [S, S] in register."""
    seen, here = normalise_locally(a, 0.0, 1.0, 8.0)
    own, there = normalise_locally(b, 0.0, 1.0, 8.0)
    clipped = (np.minimum(a, b) <= 3) | (np.maximum(a, b) >= 252)  # a window may have cut off what was there
    where = here & there & (cv2.dilate(clipped.astype(np.uint8), np.ones((5, 5), np.uint8)) == 0)
    edge = max(2, len(a) // 32)
    where[:edge] = where[-edge:] = where[:, :edge] = where[:, -edge:] = False
    return float(correlation(seen[None], own[None] * np.float32(sign), where[None])[0])


def agreement(value: float, side: int) -> float:
    """A correlation as it counts: on less than ``ENOUGH`` pixels a side there is less to tell by, so that it must be
    higher for the same, up to 1 where there is nothing."""
    return 1 - (1 - value) / min(1.0, max(side, 1) / ENOUGH)


def may_be_cut(frame: Floats) -> bool:
    """Whether what is cut off at each side, or missing there, is what a copy may lack."""
    cuts = np.concatenate([frame[:2], 1 - frame[:2] - frame[2:]])
    return bool(np.abs(cuts).max() < MAX_CROP + SLACK)


def _part(image: Grey, frame: Floats, side: int) -> Floats:
    """float32 [side, side]: the part of uint8 [H, W] within a frame, sampled once and about as finely as stored."""
    left, top, width, height = (float(v) for v in frame)
    columns, rows = round(side / width), round(side / height)
    small = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA).astype(np.float32)
    x, y = width * columns / side, height * rows / side
    matrix = np.array([[x, 0, left * columns + x / 2 - 0.5], [0, y, top * rows + y / 2 - 0.5]])
    return cv2.warpAffine(small, matrix, (side, side), flags=CUBIC, borderMode=BORDER)


def _fine(images: Floats) -> Floats:
    """The finest detail of pictures [n, S, S]: what is all that tells one chest from another of the same build."""
    return images - np.stack([cv2.GaussianBlur(i, (0, 0), 1.0) for i in images])
