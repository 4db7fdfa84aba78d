"""DICOM, JPEG and PNG files of an archive -> 8-bit grey pictures, bright = dense."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest import jpeg, png
from pipeline.ingest.dicom import reader
from pipeline.storage.pictures import (
    MAX_PIXELS,
    Grey,
    ImageError,
    area_means,
    check_size,
    linear_means,
    target_size,
    to_8_bit,
)

MAX_FILE = 1 << 29  # bytes; the largest radiograph in three colours of 16 bits has 480 MB
JPEG_START, PNG_START = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


def read_view(data: bytes, short_side: int = 0) -> tuple[Grey, str, tuple[str, ...]]:
    """The picture in a DICOM, JPEG or PNG file as grey uint8 [H, W], 0 black to 255 white; the position the file itself
    states: PA, AP, LATERAL or "" (JPEG and PNG: always); and what was done otherwise than the file says.

    DICOM: see ``pipeline.ingest.dicom.reader``. Deeper PNG: min-max to 8 bit; 8-bit JPEG and PNG as they are.
    Colour becomes luma.
    An EXIF orientation is ignored: archives of radiographs do not use it.

    With ``short_side`` above 0 the picture comes as ``resize`` would make it, by a shorter way: JPEGs are decoded at
    1/2, 1/4 or 1/8 (40 dB or more from the long way), DICOM averaged before the table where that is the same within a
    grey level.

    Raises:
        ImageError: not an image, truncated, constant, several frames, or a size no radiograph has.
    """
    if not data:
        raise ImageError("file is empty")
    if not data.startswith((JPEG_START, PNG_START)) or data[128:132] == b"DICM":
        if not reader.is_dicom(data):
            raise ImageError("not a DICOM, JPEG or PNG file")
        try:
            return reader.read_dicom(data, short_side)
        except ImageError:
            raise
        except Exception as error:  # pydicom may raise anything wherever an element is asked for
            raise ImageError(f"DICOM damaged ({type(error).__name__})") from None
    values, size, halved = _picture(data, short_side)
    if values.dtype != np.uint8:
        values = to_8_bit(values)
    if values.min() == values.max():
        raise ImageError("image is constant")
    # Of means, less than two a side are left to be joined: lines through them are as near to the means of the full
    # picture as areas of them, and come at a sixth of the time.
    return linear_means(values, size) if halved else area_means(values, size), "", ()


def _picture(data: bytes, short_side: int) -> tuple[NDArray[Any], tuple[int, int], bool]:
    """Grey pixels of a JPEG or PNG, uint8 or deeper as stored, the width and height they are to be reduced to, and
    whether they are means already.

    A JPEG comes at the smallest of 1, 1/2, 1/4 and 1/8 that is not below ``short_side`` (0: at 1): the inverse DCT
    then yields means itself, and of colour only the luma is made.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        chunks = [] if data.startswith(JPEG_START) else png.data_chunks(data)
        if data.startswith(JPEG_START) and not jpeg.frame_header(data)[0]:
            raise ImageError("image header truncated or damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own notion of a too large image
            picture: Any = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            check_size(picture.height, picture.width)
            whole = picture.size
            size = target_size(picture.height, picture.width, short_side or MAX_PIXELS)
            if getattr(picture, "n_frames", 1) != 1:
                raise ImageError("several frames in one file")
            if picture.format == "JPEG" and picture.mode in ("L", "RGB"):
                grey = jpeg.grey(data, picture, size)
                return grey, size, grey.shape != whole[::-1]
            if picture.format == "JPEG":  # of four colours: looked through for what is missing, then read by Pillow
                jpeg.decoded(data, "CMYK")
            picture.load()
            if picture.format == "PNG":
                png.check_rows(data, chunks, picture)
        if picture.format == "PNG" and data[24] == 16 and data[25] in (2, 4, 6):
            return png.deep_luma(data), size, False
        if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
            return np.asarray(picture), size, False
        return np.asarray(picture if picture.mode == "L" else picture.convert("L")), size, False
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError("image header truncated or damaged") from None
    except Image.DecompressionBombError:
        raise ImageError("header states a size no radiograph has") from None
    except Exception as error:  # a decoder may raise anything on damaged input
        raise ImageError(f"image data truncated or damaged ({type(error).__name__})") from None
