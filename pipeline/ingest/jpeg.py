"""JPEG, plain or in a DICOM: its parts counted before a decoder sees them, and decoded so that nothing is missing."""

from __future__ import annotations

import re
import struct
from typing import Any, NamedTuple

import numpy as np
import simplejpeg  # type: ignore[import-untyped, unused-ignore]

from pipeline.storage.pictures import Grey, ImageError

MAX_SEGMENTS = 1000  # before the first scan ...
MAX_HEADER = 1 << 24  # ... and their bytes: Pillow keeps copies of them
MAX_SCANS = 100  # each goes through all blocks; progressive files have about 10
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)  # markers of frame headers
SCAN, FILL = b"\xff\xda", re.compile(b"\xff+")
TRUNCATED = "image data truncated or damaged"


class Frame(NamedTuple):
    """What the frame header states (ISO 10918-1 B.2.2, ISO 14495-1 C.2.2); ``ids`` has a byte a component."""

    marker: int
    precision: int
    height: int
    width: int
    ids: bytes


def frame_header(data: bytes) -> tuple[Frame | None, bool]:
    """The frame header, or None if there is no valid one, and whether the first scan follows.

    All segments up to there must follow each other: GDCM ends the process where they do not. Others read on, so that
    the scans of such a file count, too.

    Raises:
        ImageError: more segments or scans than a radiograph has.
    """
    found, follows = _walked(data)
    if not follows and data.count(SCAN) > MAX_SCANS:
        raise ImageError("JPEG has more scans than a radiograph's")
    return found, follows


def _walked(data: bytes) -> tuple[Frame | None, bool]:
    at, found = 2, None
    for _ in range(MAX_SEGMENTS):
        if data[:2] != b"\xff\xd8" or at + 4 > len(data) or data[at] != 0xFF:
            return found, False
        marker = data[at + 1]
        if marker == 0xFF:  # fill bytes, as many as a writer likes (ISO 10918-1 B.1.1.2)
            at = FILL.match(data, at).end() - 1  # type: ignore[union-attr]  # there is one at least
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xDA and found:
            # A byte FF of the coded data is followed by 00, so that markers can be counted. Where the first scan of a
            # sequential JPEG has all components, decoders read no other.
            several = found.marker in PROGRESSIVE or data[at + 4 : at + 5] < bytes([len(found.ids)])
            if several and data.count(SCAN, at) > MAX_SCANS:
                raise ImageError("JPEG has more scans than a radiograph's")
            return found, True
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            if found or at + 10 > len(data):
                return found, False
            precision, height, width, count = struct.unpack_from(">BHHB", data, at + 4)
            ids = data[at + 10 : at + 10 + 3 * count : 3]
            if len(ids) != count:
                return found, False
            found = Frame(marker, precision, height, width, ids)
        if size < 2:
            return found, False
        at += 2 + size
        if at > MAX_HEADER:
            break
    raise ImageError("JPEG header is larger than a radiograph's")


def says_damaged(text: str) -> bool:
    """Whether libjpeg's words are of data that are not what was written. More bytes than needed at the end (marker
    0xd9) are none, nor are odd headers; only its first warning comes, so that one of these hides what follows."""
    return "Premature end" in text or (
        "Corrupt JPEG data" in text and "extraneous bytes before marker 0xd9" not in text
    )


def grey(data: bytes, picture: Any, size: tuple[int, int]) -> Grey:
    """The luma of an 8-bit JPEG of one or three components, at the smallest of 1, 1/2, 1/4 and 1/8 that is not below
    ``size``.

    libjpeg fills what is missing with grey and warns; Pillow and OpenCV drop the warning, simplejpeg does not. The
    pixels are those Pillow gives.

    Args:
        picture: Pillow's, not loaded yet, for what is too odd for simplejpeg.
        size: width and height.

    Raises:
        ImageError: data are missing or damaged. Others: of Pillow.
    """
    width, height = picture.size
    most = min(width // size[0], height // size[1])
    scale = max(s for s in (1, 2, 4, 8) if s == 1 or s <= most)
    pixels = decoded(data, "GRAY", -(-height // scale), -(-width // scale))
    if pixels is not None:
        return pixels[:, :, 0]
    picture.draft("L", size)
    picture.load()
    return np.asarray(picture if picture.mode == "L" else picture.convert("L"))


def decoded(data: bytes, colours: str, height: int = 0, width: int = 0) -> Grey | None:
    """uint8 [H, W, C] at the smallest of the four scales above a size (0: at 1), or None if only Pillow may read it.

    Raises:
        ImageError: data are missing or damaged.
    """
    try:
        return np.asarray(simplejpeg.decode_jpeg(data, colours, min_height=height, min_width=width), np.uint8)
    except ValueError as error:
        if says_damaged(str(error)):
            raise ImageError(TRUNCATED) from None
    return None
