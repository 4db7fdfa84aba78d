"""DICOM, JPEG and PNG files -> 8-bit grey pictures, bright = dense; and the small JPEGs the shards hold.

MONOCHROME1, where low values are bright, is inverted here and nowhere else.
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

# Pictures are small and processes are the parallelism; a process forked beside OpenCV's own threads can hang.
cv2.setNumThreads(0)

Grey = NDArray[np.uint8]

MAX_PIXELS = 80_000_000  # rows x columns; the largest detectors give 20 million. Checked before pixels are allocated
MIN_SIDE = 8  # pixels
MAX_FILE = 1 << 30  # bytes
POSITIONS = {"PA": "PA", "AP": "AP", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL"}


class ImageError(ValueError):
    """A file that is no usable picture; the message is one line without any content of the file."""


def read_image(source: Path | str | bytes) -> Grey:
    """The picture in a DICOM, JPEG or PNG file (path or content) as grey uint8 [H, W], 0 black to 255 white.

    DICOM (PS3.3 C.11): modality LUT or rescale, then VOI LUT or the first window, MONOCHROME1 inverted, then min-max to
    8 bit. Deeper JPEG/PNG: min-max to 8 bit; 8-bit ones as they are. Colour becomes luma.

    Raises:
        ImageError: not an image, truncated, constant, several frames, or a size no radiograph has.
    """
    return read_view(source)[0]


def read_view(source: Path | str | bytes) -> tuple[Grey, str]:
    """As ``read_image``, with the position the file itself states: PA, AP, LATERAL or "" (JPEG and PNG: always)."""
    if isinstance(source, bytes):
        data = source
    else:
        try:
            path = Path(source)
            if path.stat().st_size > MAX_FILE:
                raise ImageError("file too large for a radiograph")
            data = path.read_bytes()
        except FileNotFoundError:
            raise ImageError("file missing") from None
        except OSError as error:
            raise ImageError(f"file cannot be read ({type(error).__name__})") from None
    if not data:
        raise ImageError("file is empty")
    position = ""
    if data[128:132] == b"DICM":
        values, position = _dicom(data)
    else:
        values = _picture(data)
    if values.dtype != np.uint8:
        values = _to_8_bit(values)
    if values.min() == values.max():
        raise ImageError("image is constant")
    return values, position


def _check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise ImageError("image is smaller than a radiograph can be")
    if height * width > MAX_PIXELS:
        raise ImageError("header states a size no radiograph has")


def _to_8_bit(values: NDArray[Any]) -> Grey:
    """Min-max to 0..255, rounded."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low) or not np.isfinite(high):
        raise ImageError("pixel values are not finite")
    if low == high:
        raise ImageError("image is constant")
    scaled = (values.astype(np.float32) - low) * (255 / (high - low))
    return np.rint(scaled).clip(0, 255).astype(np.uint8)


def _picture(data: bytes) -> NDArray[Any]:
    """Grey pixels of a JPEG or PNG: uint8, or deeper as stored. Pillow, as OpenCV fills truncated files with grey."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own notion of a too large image
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            _check_size(picture.height, picture.width)
            if getattr(picture, "n_frames", 1) != 1:
                raise ImageError("several frames in one file")
            picture.load()
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            return np.asarray(picture)
        return np.asarray(picture if picture.mode == "L" else picture.convert("L"))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("not a DICOM, JPEG or PNG file") from None
    except Image.DecompressionBombError:
        raise ImageError("header states a size no radiograph has") from None
    except Exception as error:  # a decoder may raise anything on damaged input
        raise ImageError(f"image data truncated or damaged ({type(error).__name__})") from None


def _dicom(data: bytes) -> tuple[NDArray[Any], str]:
    """Display values of a DICOM, bright = dense (any numeric dtype), and its view position."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    for name in ("pydicom", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # their messages quote header values
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            header = pydicom.dcmread(io.BytesIO(data))
            rows, columns = int(header.Rows), int(header.Columns)
            frames = int(header.get("NumberOfFrames") or 1)
            interpretation = str(header.PhotometricInterpretation)
            samples = int(header.get("SamplesPerPixel") or 1)
            position = POSITIONS.get(str(header.get("ViewPosition") or "").strip().upper(), "")
        except Exception as error:
            raise ImageError(f"DICOM header incomplete or damaged ({type(error).__name__})") from None
        _check_size(rows, columns)
        if frames != 1:
            raise ImageError("several frames in one file")
        if "PixelData" not in header:
            raise ImageError("DICOM without pixel data")
        try:
            values = header.pixel_array
        except Exception as error:
            reason = "DICOM pixel data truncated, damaged or of an unsupported encoding"
            raise ImageError(f"{reason} ({type(error).__name__})") from None
        if values.shape != ((rows, columns, 3) if samples == 3 else (rows, columns)):
            raise ImageError("DICOM pixel data has another shape than its header states")
        if samples == 3:
            return (values @ np.array([0.299, 0.587, 0.114])).astype(np.float32), position
        try:
            values = apply_voi_lut(apply_modality_lut(values, header), header)
        except Exception as error:
            raise ImageError(f"DICOM look-up table or window is damaged ({type(error).__name__})") from None
        if interpretation == "MONOCHROME1":
            values = values.max() - values
        elif interpretation != "MONOCHROME2":
            raise ImageError("DICOM photometric interpretation is not supported")
        return values.astype(np.float32), position


def resize(image: Grey, short_side: int) -> Grey:
    """Shrink uint8 [H, W] until its short side is ``short_side`` pixels, aspect kept, by area averaging."""
    height, width = image.shape
    if min(height, width) <= short_side:
        return image
    scale = short_side / min(height, width)
    size = (max(short_side, round(width * scale)), max(short_side, round(height * scale)))
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def encode(image: Grey, quality: int) -> bytes:
    """Grey JPEG of uint8 [H, W]; ``quality`` 1..100. The same pixels give the same bytes."""
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise ImageError("picture cannot be encoded")
    return bytes(data)


def decode(data: bytes) -> Grey:
    """Inverse of ``encode``: uint8 [H, W].

    Raises:
        ImageError: not a JPEG.
    """
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if image is None:
        raise ImageError("not an encoded picture")
    return np.asarray(image, dtype=np.uint8)
