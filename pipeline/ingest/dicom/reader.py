"""DICOM files -> 8-bit grey pictures, bright = dense, and the view position they state. Sections are of DICOM PS3.

The steps are stored values, modality transform, values of interest, MONOCHROME1 inverted, min-max to 8 bit, reduction
by area averaging. Up to 16 bits they are one table over the stored values: the picture itself stays integer.

No message holds anything the file says. pydicom reads the header only; pixels are taken from the file's own bytes, so
that every size is checked before anything of that size is allocated.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

from pipeline.ingest.dicom.display import display, first_item, raw_size
from pipeline.ingest.dicom.pixels import floats, stored
from pipeline.storage.pictures import Grey, ImageError, area_means, check_size, resize

MAX_HEADER = 1 << 24  # bytes before the pixels ...
MAX_READS = 40_000  # ... and reads of them, one to three an element at any depth: objects cost far more than bytes
MAX_SEQUENCE = 1 << 20  # bytes of a sequence of stated length that is looked into, of whose elements no read is seen
MAX_ASPECT = 4  # of a pixel's sides
MAX_VALUE = 1 << 16  # bytes of another value that is looked at
MAX_DEEP_PIXELS = 1 << 24  # pixels of more than 16 bits: these need float64 arrays, not a table
SEQUENCES = ("ViewCodeSequence", "ModalityLUTSequence", "VOILUTSequence")
# All that is looked at here and in ``display``; pydicom makes no objects of other elements.
READ = (
    *SEQUENCES,
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"),
    *("RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("ViewPosition", "SeriesDescription", "ProtocolName"),
)
LONG_VR = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")  # PS3.5 7.1.2

# Transfer syntax -> how its pixels are packed (PS3.5 A and 10).
IMPLICIT, BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
SYNTAXES = {
    IMPLICIT: "native",
    "1.2.840.10008.1.2.1": "native",
    BIG_ENDIAN: "native",
    DEFLATED: "native",
    "1.2.840.10008.1.2.4.50": "jpeg",
    "1.2.840.10008.1.2.4.51": "jpeg",
    "1.2.840.10008.1.2.4.57": "jpeg",
    "1.2.840.10008.1.2.4.70": "jpeg",
    "1.2.840.10008.1.2.4.80": "jpeg-ls",
    "1.2.840.10008.1.2.4.81": "jpeg-ls",
    "1.2.840.10008.1.2.4.90": "jpeg2000",
    "1.2.840.10008.1.2.4.91": "jpeg2000",
    "1.2.840.10008.1.2.5": "rle",
}

DICOM_POSITIONS = {
    "PA": "PA",
    "POSTEROANTERIOR": "PA",
    "AP": "AP",
    "ANTEROPOSTERIOR": "AP",
    "LL": "LATERAL",
    "RL": "LATERAL",
    "LAT": "LATERAL",
    "LATERAL": "LATERAL",
}
# PS3.16 CID 4010, as SNOMED RT (until 2018) and SNOMED CT codes. Frontal (R-10202, 399033003) is neither PA nor AP.
VIEW_CODES = {
    "R-10214": "PA",
    "R-40888": "PA",
    "272479007": "PA",
    "R-10206": "AP",
    "399348003": "AP",
    "R-10236": "LATERAL",
    "399173006": "LATERAL",
    "R-10232": "LATERAL",
    "399198007": "LATERAL",
    "R-102CD": "LATERAL",
    "399067008": "LATERAL",
}
VIEW_WORDS = {"PA": "PA", "AP": "AP", "LAT": "LATERAL", "LATERAL": "LATERAL"}


def is_dicom(data: bytes) -> bool:
    """Whether a file starts as DICOM does: preamble and magic (PS3.10 7.1) or, without, an element of group 2 or 8."""
    if data[128:132] == b"DICM":
        return True
    if len(data) < 8:
        return False
    for order in "<>":
        group, element = struct.unpack_from(f"{order}HH", data)
        if (group, element) in ((2, 0), (2, 1), (2, 2), (2, 3), (2, 16)) or (group == 8 and element <= 0x60):
            return True
    return False


def read_dicom(data: bytes, short_side: int = 0) -> tuple[Grey, str, tuple[str, ...]]:
    """The picture as uint8 [H, W], reduced to ``short_side`` pixels if that is above 0; PA, AP, LATERAL or ""; and what
    was done otherwise than the file says, as it says what cannot be.

    Raises:
        ImageError: no usable picture; the message holds nothing of the file.
    """
    with _quiet():
        start, syntax = _file_meta(data)
        kind, little = SYNTAXES.get(syntax), syntax != BIG_ENDIAN
        if kind is None:
            raise ImageError("DICOM transfer syntax is not supported")
        deflated = data, start
        if syntax == DEFLATED:
            data, start = _inflate(*deflated, MAX_HEADER), 0
        header, place, big = _header(data, start, syntax == IMPLICIT, little)
        if place is None:
            raise ImageError("DICOM without pixel data")
        facts = _facts(header)
        view = position(header)
        across, down = _square(header)
        keyword, offset, length = place
        if syntax == DEFLATED:
            size = facts["rows"] * facts["columns"] * facts["samples"] * facts["allocated"] // 8
            data = _inflate(*deflated, offset + size + MAX_HEADER, whole=True)
        if keyword == "PixelData":
            values, bits, signed = stored(data, offset, length, kind, syntax, little, big, facts)
        else:
            values, bits, signed = floats(data, offset, length, keyword, kind, little, facts), 0, True
    square = across == down == 1
    image = display(values, bits, signed, header, facts, little, short_side if square else 0)
    if not square:
        height, width = image.shape
        image = area_means(image, (max(1, round(width * across)), max(1, round(height * down))))
        image = resize(image, short_side) if short_side else image
        facts["mended"].append("DICOM pixels are not square; resampled to squares")
    return image, view, tuple(dict.fromkeys(facts["mended"]))


def _values(header: Any, keyword: str) -> list[Any]:
    """The values of an element; as text where pydicom cannot read them, as with a decimal comma."""
    try:
        return list(header.get(keyword) or ())
    except Exception:
        raw = header.get_item(keyword)
        return list((raw.value or b"").decode("ascii").strip("\0 ").split("\\"))


def _square(header: Any) -> tuple[float, float]:
    """Factors on width and height, 1 or less, that make pixels square (PS3.3 10.7.1.3, C.7.6.3.1.7)."""
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        try:
            down, across = (float(str(value).replace(",", ".")) for value in _values(header, keyword))
        except Exception:  # damaged or absent: then squares are what everybody assumes
            continue
        if not (down > 0 and across > 0 and down + across < float("inf")):
            continue
        if max(down, across) > MAX_ASPECT * min(down, across):
            raise ImageError(f"DICOM {keyword} is no radiograph's")
        if max(down, across) <= 1.01 * min(down, across):
            return 1, 1
        return min(1, across / down), min(1, down / across)
    return 1, 1


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep pydicom, openjpeg and Python's warnings from quoting the file."""
    import pydicom

    for name in ("pydicom", "openjpeg"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _file_meta(data: bytes) -> tuple[int, str]:
    """Where the data set starts, and its transfer syntax, from the file meta information (PS3.10 7.1).

    A file without the latter is taken for what its first element looks like (PS3.5 A.1, A.2, A.3).
    """
    at, syntax = (132 if data[128:132] == b"DICM" else 0), ""
    try:
        while data[at : at + 2] == b"\x02\x00":  # always explicit little endian; old writers left it implicit
            element, vr = struct.unpack_from("<H2s", data, at + 2)
            if vr in LONG_VR:
                (size,), head = struct.unpack_from("<I", data, at + 8), 12
            elif vr.isalpha() and vr.isupper():
                (size,), head = struct.unpack_from("<H", data, at + 6), 8
            else:
                (size,), head = struct.unpack_from("<I", data, at + 4), 8
            if at + head + size > len(data):
                raise ImageError("DICOM file meta information truncated or damaged")
            if element == 0x0010:
                syntax = data[at + head : at + head + size].decode("latin-1").strip("\0 ")
            at += head + size
    except struct.error:
        raise ImageError("DICOM file meta information truncated or damaged") from None
    if not syntax:
        vr, group = data[at + 4 : at + 6], data[at : at + 2]
        if not (vr.isalpha() and vr.isupper()):
            syntax = IMPLICIT
        else:
            syntax = BIG_ENDIAN if group[:1] == b"\0" and group != b"\0\0" else "1.2.840.10008.1.2.1"
    return at, syntax


def _inflate(data: bytes, start: int, most: int, whole: bool = False) -> bytes:
    """The deflated data set (PS3.5 A.5), never more than ``most`` bytes of it; all of it if ``whole``."""
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = engine.decompress(memoryview(data)[start:], most)
    except zlib.error:
        raise ImageError("DICOM deflated data damaged") from None
    if not engine.eof and (whole or len(inflated) < most):
        reason = "grows beyond a radiograph" if len(inflated) >= most else "truncated"
        raise ImageError(f"DICOM deflated data {reason}")
    return inflated


@cache
def _tags(keywords: tuple[str, ...]) -> list[int]:
    """As plain numbers: pydicom's own tags take long to compare."""
    from pydicom.datadict import tag_for_keyword

    return [tag_for_keyword(keyword) or 0 for keyword in keywords]


class _Counted(io.BytesIO):
    """A stream that pydicom may read from so often and no more."""

    reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise ImageError("DICOM header is larger than a radiograph's")
        return super().read(size)


def _header(data: bytes, start: int, implicit: bool, little: bool) -> tuple[Any, tuple[str, int, int] | None, bool]:
    """The data set before its pixels, where these are (keyword, offset, bytes or -1), and whether they are OW."""
    from pydicom.filereader import read_dataset

    names = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
    found: list[tuple[str, str, int]] = []

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        if tag in names:
            found.append((names[tag], vr or "", length))
        return tag in names

    small = len(data) - start <= MAX_HEADER
    stream = _Counted(data if small else data[: start + MAX_HEADER])  # the whole is shared, not copied
    stream.seek(start)
    try:
        header = read_dataset(stream, implicit, little, stop_when=at_pixels, specific_tags=_tags(READ))
    except Exception as error:  # damaged headers raise anything, down to RecursionError
        if stream.reads > MAX_READS:  # pydicom hides our own error in another
            raise ImageError("DICOM header is larger than a radiograph's") from None
        raise ImageError(f"DICOM header truncated or damaged ({type(error).__name__})") from None
    if not found and not small:
        raise ImageError("DICOM header is larger than a radiograph's")
    for tag in header.keys():  # noqa: SIM118 (iterating itself makes objects)
        if (size := raw_size(header, tag)) > MAX_VALUE and (size > MAX_SEQUENCE or tag not in _tags(SEQUENCES)):
            raise ImageError("DICOM header is larger than a radiograph's")
    if not found:
        return header, None, False
    keyword, vr, length = found[-1]
    offset = stream.tell() + (12 if vr.encode() in LONG_VR else 8)
    return header, (keyword, offset, -1 if length == 0xFFFFFFFF else length), vr == "OW"


def _facts(header: Any) -> dict[str, Any]:
    """The image pixel module (PS3.3 C.7.6.3) as plain values, checked; ``mended``: what was done otherwise than it
    says."""
    allocated = _whole(header, "BitsAllocated")
    facts: dict[str, Any] = {
        "rows": _whole(header, "Rows"),
        "columns": _whole(header, "Columns"),
        "frames": _whole(header, "NumberOfFrames", 1) or 1,  # 0, as some write it, is one
        "samples": _whole(header, "SamplesPerPixel", 1),
        "allocated": allocated,
        "stored": _whole(header, "BitsStored", allocated) or allocated,
        "signed": _whole(header, "PixelRepresentation", 0) == 1,
        "planar": _whole(header, "PlanarConfiguration", 0),
        "mended": [],
    }
    try:
        facts["interpretation"] = str(header.PhotometricInterpretation).strip().upper()
    except Exception:
        raise ImageError("DICOM PhotometricInterpretation is missing or damaged") from None
    high = _whole(header, "HighBit", facts["stored"] - 1)
    facts["shift"] = high + 1 - facts["stored"]
    check_size(facts["rows"], facts["columns"])
    if facts["frames"] != 1:
        raise ImageError("several frames in one file")
    interpretation, samples = facts["interpretation"], facts["samples"]
    if interpretation == "PALETTE COLOR":
        raise ImageError("DICOM palette colour is no radiograph")
    colour = interpretation in ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
    if not colour and interpretation not in ("MONOCHROME1", "MONOCHROME2"):
        raise ImageError("DICOM photometric interpretation is not supported")
    if samples != (3 if colour else 1):
        raise ImageError("DICOM samples per pixel do not fit the photometric interpretation")
    if facts["allocated"] not in ((8, 16) if colour else (8, 16, 32, 64)):
        raise ImageError("DICOM bits allocated are not supported")
    if not 1 <= facts["stored"] <= facts["allocated"]:
        raise ImageError("DICOM BitsStored does not fit BitsAllocated")
    if not 0 <= facts["shift"] <= facts["allocated"] - facts["stored"]:
        facts["shift"] = 0
        facts["mended"].append("DICOM HighBit does not fit BitsStored; the lowest bits are taken")
    if facts["allocated"] > 16 and facts["rows"] * facts["columns"] > MAX_DEEP_PIXELS:
        raise ImageError("DICOM of more than 16 bits is too large")
    return facts


def _whole(header: Any, keyword: str, default: int | None = None) -> int:
    """An element that is a whole number; ``default`` where it is absent or empty, if there is one."""
    try:
        value = header.get(keyword)
        if value is None or value == "":
            if default is None:
                raise ImageError(f"DICOM {keyword} is missing")
            return default
        return int(value)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(f"DICOM {keyword} is damaged ({type(error).__name__})") from None


def position(header: Any) -> str:
    """PA, AP, LATERAL or "": of ViewPosition, the view's code and the description, the first that is not empty.

    PS3.3 C.8.11.5 (DX positioning), C.8.1.1 (CR). Only a description that names exactly one view counts.
    """
    try:
        stated = re.sub(r"[^A-Z]", "", str(header.get("ViewPosition") or "").upper())
        if stated:
            return DICOM_POSITIONS.get(stated, "")
        item = first_item(header, "ViewCodeSequence")
        if item is not None:
            return VIEW_CODES.get(str(item.get("CodeValue") or "").strip().upper(), "")
        for keyword in ("SeriesDescription", "ProtocolName"):
            words = re.findall(r"[A-Z]+", str(header.get(keyword) or "").upper())
            views = {VIEW_WORDS[word] for word in words if word in VIEW_WORDS}
            if views:
                return views.pop() if len(views) == 1 else ""
    except Exception:  # a damaged text is as good as none: the position is not what the file is read for
        pass
    return ""
