"""A JPEG 2000 stream, looked at before a decoder takes memory for what its header states."""

from __future__ import annotations

import struct

from pipeline.storage.pictures import ImageError

MAX_TILES, MAX_LAYERS = 10_000, 100  # the decoder has records for all before it reads the first
MAX_PARTS = 100 << 20  # bytes that it holds of what a stream is cut into


def check_parts(frame: bytes) -> None:
    """Refuse a JPEG 2000 of more tiles, quality layers, precincts or code-blocks than a radiograph has (ISO 15444-1
    A.5.1, A.6.1, A.6.2, B.6, B.7): the decoder holds something of each, however few bytes say them.

    Raises:
        ImageError: it has, or its header is damaged.
    """
    at, tiles, layers, memory = frame.find(b"\xff\x4f\xff\x51") + 2, 0, 0, 0
    width = height = samples = 0
    try:
        while frame[at : at + 2] != b"\xff\x90":  # the first tile
            marker, size = struct.unpack_from(">HH", frame, at)
            if marker == 0xFF51:
                right, bottom, left, top, wide, high, first, above = struct.unpack_from(">8I", frame, at + 6)
                tiles = -(-(right - first) // wide) * -(-(bottom - above) // high)
                width, height, samples = right - left, bottom - top, *struct.unpack_from(">H", frame, at + 38)
            elif marker == 0xFF52:
                (layers,) = struct.unpack_from(">H", frame, at + 6)
                memory += samples * _held(width, height, frame[at + 9 : at + 2 + size], frame[at + 4] & 1)
            elif marker == 0xFF53:  # of one component
                skip = at + (5 if samples < 257 else 6)
                memory += _held(width, height, frame[skip + 1 : at + 2 + size], frame[skip] & 1)
            at += 2 + size
    except (struct.error, ZeroDivisionError, IndexError) as error:
        raise ImageError(f"DICOM compressed pixel data truncated or damaged ({type(error).__name__})") from None
    if tiles > MAX_TILES or layers > MAX_LAYERS:
        raise ImageError("JPEG 2000 has more tiles or layers than a radiograph's")
    if memory > MAX_PARTS:
        raise ImageError("JPEG 2000 has more precincts or code-blocks than a radiograph's")
    while frame[at : at + 2] == b"\xff\x90":  # tile parts, each of which may state another form
        length, inside = int.from_bytes(frame[at + 6 : at + 10], "big"), at + 12
        while (marker := frame[inside : inside + 2]) not in (b"\xff\x93", b""):
            if marker in (b"\xff\x52", b"\xff\x53"):
                raise ImageError("JPEG 2000 states another form of coding in a tile, as no radiograph does")
            inside += 2 + int.from_bytes(frame[inside + 2 : inside + 4], "big")
        at += length or len(frame)


def _held(width: int, height: int, coding: bytes, precincts: int) -> int:
    """Bytes that OpenJPEG holds of the precincts and code-blocks of one component, by a COD's SPcod.

    Measured on pictures of 4 to 64 million pixels: 2.2 kB a precinct, 0.5 kB a code-block.
    """
    levels, across, down = coding[0], coding[1] + 2, coding[2] + 2
    held = 0
    for level in range(min(levels, 32) + 1):
        shrunk = min(levels, 32) - level
        wide, high = -(-width // (1 << shrunk)), -(-height // (1 << shrunk))
        said = coding[5 + level] if precincts else 0xFF
        x, y = said & 15, said >> 4
        held += 2200 * -(-wide // (1 << x)) * -(-high // (1 << y))
        inner = 1 if level else 0  # bands of a level above the first are half as large, and three
        x, y = min(across, max(0, x - inner)), min(down, max(0, y - inner))
        bands, wide, high = (3, -(-wide // 2), -(-high // 2)) if level else (1, wide, high)
        held += 500 * bands * -(-wide // (1 << x)) * -(-high // (1 << y))
    return held
