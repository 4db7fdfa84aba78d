"""The stored values of a DICOM: native, run-length and JPEG-family pixel data -> integer or float arrays (PS3.5).

Taken from the file's own bytes, so that every size is checked before anything of that size is allocated.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest import jpeg
from pipeline.ingest.dicom.jpeg2000 import check_parts
from pipeline.storage.pictures import ImageError

Values = NDArray[Any]

LOSSLESS_JPEG = "1.2.840.10008.1.2.4.57"
EXTENDED_JPEG = "1.2.840.10008.1.2.4.51"
MAX_FRAGMENTS = 100_000


_catching = threading.Lock()


@contextlib.contextmanager
def _caught_stderr() -> Iterator[BinaryIO]:
    """Codecs written in C print to the process's own stderr; here it goes to a file without a name. One thread at a
    time: dask's workers have several, and would else be left with each other's file for stderr."""
    with _catching, tempfile.TemporaryFile() as said:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield said
            return
        try:
            os.dup2(said.fileno(), 2)
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def stored(
    data: bytes, offset: int, length: int, kind: str, syntax: str, little: bool, big: bool, facts: dict[str, Any]
) -> tuple[Values, int, bool]:
    """Stored values [H, W] or [H, W, 3] (u)int8..64, significant bits and signedness.

    Padding of the words and overlays in unused bits (PS3.5 8.1.1) are cleared, signs extended.
    """
    if kind == "native":
        if length < 0:
            raise ImageError("DICOM pixel data encapsulated against its transfer syntax")
        values, bits, signed = _native(data, offset, length, little, big, facts), facts["stored"], facts["signed"]
        shift = facts["shift"]
    else:
        if length >= 0:
            raise ImageError("DICOM pixel data not encapsulated as its transfer syntax asks")
        frame = _fragments(data, offset, facts)
        shift = 0
        if kind == "rle":
            values, bits, signed = _rle(frame, facts), facts["stored"], facts["signed"]
            shift = facts["shift"]
        elif kind == "jpeg":
            values, bits, signed = _jpeg(frame, syntax, facts)
        elif kind == "jpeg-ls":
            values, bits, signed = _jpeg_ls(frame, syntax, facts)
        else:
            values, bits, signed = _jpeg2000(frame, facts)
        if signed and facts["stored"] < bits and int(values.max()) < 1 << facts["stored"]:
            bits = facts["stored"]  # a stream of wider words around signed values that were not extended
    if values.ndim == 2 and kind != "native" and values.shape != (facts["rows"], facts["columns"]):
        raise ImageError("DICOM pixel data has another shape than its header states")
    if shift and not signed and int(values.max()) < 1 << bits:
        shift = 0  # shifted, they would lose their lowest bits
        facts["mended"].append("DICOM HighBit does not fit the values; the lowest bits are taken")
    return _significant(values, bits, shift, signed), bits, signed


def _significant(values: Values, bits: int, shift: int, signed: bool) -> Values:
    """Unsigned words -> the ``bits`` above the lowest ``shift`` ones, sign extended if signed; no copy if so."""
    width = values.dtype.itemsize * 8
    if shift:
        values = values >> values.dtype.type(shift)
    if signed:
        values = values.view(values.dtype.str.replace("u", "i"))
    if bits < width:
        low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
        if int(values.max()) > high or int(values.min()) < low:
            if signed:
                spare = values.dtype.type(width - bits)
                return np.asarray((values << spare) >> spare)
            return np.asarray(values & values.dtype.type(high))
    return values


def _native(data: bytes, offset: int, length: int, little: bool, big: bool, facts: dict[str, Any]) -> Values:
    """Uncompressed words (PS3.5 8.1.1, 8.2), of YBR_FULL_422 the luma only."""
    rows, columns, samples, size = facts["rows"], facts["columns"], facts["samples"], facts["allocated"] // 8
    subsampled = facts["interpretation"] == "YBR_FULL_422"
    if subsampled and (columns % 2 or size != 1):
        raise ImageError("DICOM with subsampled colour of an odd width or more than 8 bits")
    if subsampled and length >= rows * columns * 3:
        raise ImageError("DICOM states YBR_FULL_422 and holds a colour difference for every pixel")
    count = rows * columns * (2 if subsampled else samples)
    swapped = not little and size == 1 and big  # bytes packed in big endian words
    if min(length, len(data) - offset) < count * size:
        raise ImageError("DICOM pixel data truncated")
    if swapped:
        stop = offset + count + count % 2
        if stop > len(data):
            raise ImageError("DICOM pixel data truncated")
        flat = np.frombuffer(data[offset:stop], ">u2").astype("<u2").view(np.uint8)[:count]
    else:
        flat = np.frombuffer(data, f"{'<' if little else '>'}u{size}", count, offset)
        if not little and size > 1:
            flat = flat.astype(f"=u{size}")
        elif not flat.flags.aligned:
            flat = flat.copy()
    if subsampled:  # two lumas, then the two colour differences they share (PS3.3 C.7.6.3.1.2)
        return np.ascontiguousarray(flat.reshape(-1, 4)[:, :2]).reshape(rows, columns)
    if samples == 1:
        return flat.reshape(rows, columns)
    if facts["planar"] == 1:
        return flat.reshape(3, rows, columns).transpose(1, 2, 0)
    return flat.reshape(rows, columns, 3)


def floats(
    data: bytes, offset: int, length: int, keyword: str, kind: str, little: bool, facts: dict[str, Any]
) -> Values:
    """Float or double float pixel data (PS3.3 C.7.6.24, C.7.6.25), native only, as float64 [H, W]."""
    size = 4 if keyword == "FloatPixelData" else 8
    count = facts["rows"] * facts["columns"]
    if kind != "native" or facts["samples"] != 1 or facts["allocated"] != size * 8:
        raise ImageError("DICOM float pixel data do not fit their header")
    if min(length, len(data) - offset) < count * size:
        raise ImageError("DICOM pixel data truncated")
    flat = np.frombuffer(data, f"{'<' if little else '>'}f{size}", count, offset)
    return flat.astype(np.float64).reshape(facts["rows"], facts["columns"])


def _fragments(data: bytes, offset: int, facts: dict[str, Any]) -> bytes:
    """The one frame's fragments, joined (PS3.5 A.4); the first item is the offset table.

    No coding makes more of a radiograph than one byte for each of its own does in RLE: two.
    """
    most = 2 * facts["rows"] * facts["columns"] * facts["samples"] * facts["allocated"] // 8 + (1 << 20)
    parts: list[memoryview] = []
    view = memoryview(data)
    for number in range(MAX_FRAGMENTS):
        tag, size = data[offset : offset + 4], int.from_bytes(data[offset + 4 : offset + 8], "little")
        if tag == b"\xfe\xff\xdd\xe0":
            break
        if tag != b"\xfe\xff\x00\xe0" or offset + 8 > len(data):
            left = data[offset : offset + 4096]
            if not any(parts) or not (len(left) < 8 or tag == b"\xfc\xff\xfc\xff" or not any(left)):
                raise ImageError(f"DICOM encapsulated pixel data {'truncated' if len(left) < 8 else 'damaged'}")
            # The end of the file, padding behind the pixels, or zeros: what the codec lacks it says itself.
            facts["mended"].append("DICOM pixel data lack their closing delimiter")
            break
        offset += 8
        if offset + size > len(data):
            raise ImageError("DICOM encapsulated pixel data truncated")
        if number:
            parts.append(view[offset : offset + size])
            most -= size
        offset += size
        if most < 0:
            raise ImageError("DICOM compressed pixel data are larger than the picture")
    else:
        raise ImageError("DICOM encapsulated pixel data in too many fragments")
    if not any(parts):
        raise ImageError("DICOM encapsulated pixel data empty")
    return b"".join(parts)


def _rle(frame: bytes, facts: dict[str, Any]) -> Values:
    """RLE (PS3.5 G): one PackBits segment for each byte of each sample, highest byte first."""
    rows, columns, samples, size = facts["rows"], facts["columns"], facts["samples"], facts["allocated"] // 8
    pixels = rows * columns
    if len(frame) < 64:
        raise ImageError("DICOM RLE header truncated")
    count, *offsets = struct.unpack("<16I", frame[:64])
    if count != samples * size or size > 2:
        raise ImageError("DICOM RLE segments do not fit the header")
    bounds = [*offsets[:count], len(frame)]
    if bounds[0] < 64 or any(a > b for a, b in pairwise(bounds)):
        raise ImageError("DICOM RLE header damaged")
    planes = np.zeros((samples, pixels, size), np.uint8)
    for index in range(count):
        segment = _unpack(frame[bounds[index] : bounds[index + 1]], pixels)
        planes[index // size, :, size - 1 - index % size] = segment
    words = planes.reshape(samples, pixels * size).view(f"<u{size}").astype(f"=u{size}", copy=False)
    if samples == 1:
        return words.reshape(rows, columns)
    return words.reshape(samples, rows, columns).transpose(1, 2, 0)


def _unpack(segment: bytes, pixels: int) -> Values:
    """One PackBits segment (PS3.5 G.3.2) of ``pixels`` bytes; more than these are padding."""
    values, done, at, end = io.BytesIO(), 0, 0, len(segment)
    values.seek(pixels + 127)  # the last part may go beyond
    values.write(b"\0")
    values.seek(0)
    while done < pixels and at < end:
        code = segment[at]
        if code < 128:
            part = segment[at + 1 : at + 2 + code]
            at += 2 + code
        elif code > 128:
            part = segment[at + 1 : at + 2] * (257 - code)
            at += 2
        else:
            at += 1
            continue
        done += values.write(part)
    if done < pixels:
        raise ImageError("DICOM RLE data truncated")
    return np.frombuffer(values.getbuffer(), np.uint8, pixels)


def _jpeg_frame(frame: bytes) -> jpeg.Frame:
    """The header of the JPEG or JPEG-LS in a frame, whose segments are whole up to the first scan."""
    found, whole = jpeg.frame_header(frame)
    if not found:
        raise ImageError("DICOM holds no JPEG where its transfer syntax asks for one")
    if not whole:
        raise ImageError("DICOM compressed pixel data truncated or damaged (before the first scan)")
    return found


def _check_frame(height: int, width: int, samples: int, precision: int, facts: dict[str, Any]) -> None:
    """A codec allocates what its own header says, so that must be what DICOM's says."""
    if (height, width, samples) != (facts["rows"], facts["columns"], facts["samples"]):
        raise ImageError("DICOM pixel data has another shape than its header states")
    if not 2 <= precision <= min(16, facts["allocated"]):
        raise ImageError("DICOM compressed pixel data has another depth than its header states")


def _damaged(error: Exception) -> ImageError:
    reason = "" if isinstance(error, ImageError) else f" ({type(error).__name__})"
    return ImageError(f"DICOM compressed pixel data truncated or damaged{reason}")


def _jpeg(frame: bytes, syntax: str, facts: dict[str, Any]) -> tuple[Values, int, bool]:
    """JPEG baseline and extended (PS3.5 8.2.1) and lossless. libjpeg reads 8-bit lossy ones, GDCM the others.

    Colour that JPEG itself stores as luma and colour differences comes as luma only.
    """
    marker, precision, height, width, ids = _jpeg_frame(frame)
    _check_frame(height, width, len(ids), precision, facts)
    if marker in (0xC0, 0xC1, 0xC2) and precision == 8:
        from PIL import Image

        try:
            picture: Any = Image.open(io.BytesIO(frame), formats=("JPEG",))
            if len(ids) != 3 or facts["interpretation"] != "RGB":
                return jpeg.grey(frame, picture, picture.size), 8, facts["signed"]
            jpeg.decoded(frame, "RGB")  # looked through for what is missing
            # Without Adobe's marker or JFIF's nothing in the stream says what its components are: DICOM's header does.
            if "adobe_transform" not in picture.info and "jfif" not in picture.info and ids != b"RGB":
                picture.draft("YCbCr", picture.size)  # as stored
            return np.asarray(picture), 8, facts["signed"]
        except Exception as error:
            raise _damaged(error) from None
    if marker == 0xC3:
        syntax = LOSSLESS_JPEG
    elif marker in (0xC0, 0xC1) and precision == 12:
        syntax = EXTENDED_JPEG
    else:
        raise ImageError("DICOM JPEG process is not supported")
    return _gdcm(frame, syntax, precision, facts), precision, facts["signed"]


def _gdcm(frame: bytes, syntax: str, precision: int, facts: dict[str, Any]) -> Values:
    """One JPEG or JPEG-LS frame by GDCM, the free decoder of 12-bit and lossless JPEG for Python: words [H, W(, 3)].

    Its sizes must have been checked: GDCM ends the process where they differ from the stream's.
    """
    try:
        import gdcm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise ImageError("DICOM transfer syntax needs the package python-gdcm") from None

    rows, columns, samples = facts["rows"], facts["columns"], facts["samples"]
    size = 1 if precision <= 8 else 2
    for name in ("DebugOff", "WarningOff", "ErrorOff"):
        getattr(gdcm.Trace, name)()
    kinds = gdcm.PhotometricInterpretation
    try:
        with _caught_stderr() as said:
            fragment = gdcm.Fragment()
            fragment.SetByteStringValue(frame)
            sequence = gdcm.SequenceOfFragments.New()
            sequence.AddFragment(fragment)
            element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
            element.SetValue(sequence.__ref__())
            image = gdcm.Image()
            image.SetNumberOfDimensions(2)
            image.SetDimensions((columns, rows, 1))
            image.SetDataElement(element)
            image.SetPhotometricInterpretation(kinds(kinds.MONOCHROME2 if samples == 1 else kinds.RGB))
            image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(syntax)))
            image.SetPixelFormat(gdcm.PixelFormat(samples, size * 8, precision, precision - 1, 0))
            text = image.GetBuffer()
            said.seek(0)
            words = said.read(1 << 16).decode("latin-1")
        if jpeg.says_damaged(words):
            raise ImageError(jpeg.TRUNCATED)
        flat = np.frombuffer(text.encode("utf-8", "surrogateescape"), f"=u{size}")  # its bytes come as a str
        return flat.reshape((rows, columns) if samples == 1 else (rows, columns, samples))
    except Exception as error:
        raise _damaged(error) from None


def _jpeg_ls(frame: bytes, syntax: str, facts: dict[str, Any]) -> tuple[Values, int, bool]:
    """JPEG-LS (PS3.5 8.2.3, ISO 14495-1)."""
    marker, precision, height, width, ids = _jpeg_frame(frame)
    if marker != 0xF7:
        raise ImageError("DICOM holds no JPEG-LS where its transfer syntax asks for one")
    _check_frame(height, width, len(ids), precision, facts)
    return _gdcm(frame, syntax, precision, facts), precision, facts["signed"]


def _jpeg2000(frame: bytes, facts: dict[str, Any]) -> tuple[Values, int, bool]:
    """JPEG 2000 (PS3.5 8.2.4). The stream's own precision and sign hold where DICOM's header states others."""
    try:
        from openjpeg import utils
    except ImportError:
        raise ImageError("DICOM transfer syntax needs the package pylibjpeg-openjpeg") from None
    check_parts(frame)
    try:
        with _caught_stderr():
            stream = utils.get_parameters(frame)
    except Exception as error:
        raise _damaged(error) from None
    samples, precision = int(stream["samples_per_pixel"]), int(stream["precision"])
    _check_frame(int(stream["rows"]), int(stream["columns"]), samples, precision, facts)
    try:
        with _caught_stderr():
            buffer = utils.decode_pixel_data(frame, version=2)
        flat = np.frombuffer(buffer, np.uint8 if precision <= 8 else "=u2")
        shape = (facts["rows"], facts["columns"]) if samples == 1 else (facts["rows"], facts["columns"], samples)
        values = flat.reshape(shape)
    except Exception as error:
        raise _damaged(error) from None
    return values, precision, facts["signed"] or bool(stream["is_signed"])
