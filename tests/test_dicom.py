"""Expected pixels are worked out here from the formulas of DICOM PS3.3 and PS3.5, never by pydicom's own transforms."""

import contextlib
import io
import math
import os
import re
import struct
import tempfile
import threading
import warnings
from pathlib import Path

import cv2
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from pipeline.ingest.dicom import display, pixels
from pipeline.ingest.images import read_view
from pipeline.storage.pictures import ImageError, resize

RAMP = np.arange(16 * 20, dtype=np.uint16).reshape(16, 20)
TEST_FILES = Path(pydicom.__file__).parent / "data" / "test_files"


def make(values, interpretation="MONOCHROME2", syntax=ExplicitVRLittleEndian, frame=None, preamble=True, **fields):
    """A DICOM of the given words, native or around one encoded frame, as bytes; a field of None is left out."""
    values = np.asarray(values)
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, "1.2.3"
    colour = values.ndim == 3
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if colour else 1, interpretation
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = values.dtype.itemsize * 8
    data.PixelRepresentation = int(values.dtype.kind == "i")
    little = syntax != ExplicitVRBigEndian
    if frame is None:
        data.PixelData = values.astype(values.dtype.newbyteorder("<" if little else ">")).tobytes()
        data.PixelData += b"\0" * (len(data.PixelData) % 2)
    else:
        data.PixelData = pydicom.encaps.encapsulate([frame])
    data["PixelData"].VR = "OW" if values.dtype.itemsize > 1 else "OB"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in fields.items():
            if value is None:
                del data[name]
            else:
                setattr(data, name, value)
    data["PixelData"].is_undefined_length = frame is not None
    if "HighBit" not in fields:
        data.HighBit = data.BitsStored - 1
    buffer = io.BytesIO()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = data.SOPClassUID, "1.2.3"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.save_as(buffer, enforce_file_format=True)
    raw = buffer.getvalue()
    return raw if preamble else raw[132:]


def stretched(values, padding=None):
    """Min-max to 0..255 in Python's own numbers, not rounded; padding takes no part and is black."""
    values = np.asarray(values)
    padding = np.zeros(values.shape, bool) if padding is None else padding
    pairs = list(zip(values.ravel().tolist(), padding.ravel().tolist(), strict=True))
    shown = [v for v, padded in pairs if not padded]
    low, high = min(shown), max(shown)
    return np.array([0 if padded else (v - low) * 255 / (high - low) for v, padded in pairs]).reshape(values.shape)


def same(data, expected, most=0.0):
    """Rounded, the picture is the expected one; ``most`` levels of lossy coding are let pass."""
    image, *_ = read_view(data)
    assert image.dtype == np.uint8 and image.shape == expected.shape
    assert np.abs(image - expected).max() <= 0.5 + 1e-9 + most


def window(x, centre, width, function="LINEAR"):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, to 0..1, of one number."""
    if function == "SIGMOID":
        return 1 / (1 + math.exp(-4 * (x - centre) / width))
    if function == "LINEAR_EXACT":
        if x <= centre - width / 2:
            return 0.0
        return 1.0 if x > centre + width / 2 else (x - centre) / width + 0.5
    if x <= centre - 0.5 - (width - 1) / 2:
        return 0.0
    return 1.0 if x > centre - 0.5 + (width - 1) / 2 else (x - (centre - 0.5)) / (width - 1) + 0.5


def each(function, values):
    return np.array([function(float(v)) for v in np.ravel(values)]).reshape(np.shape(values))


def table(first, entries, bits=16, packed=False, words="US"):
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US" if first >= 0 else "SS", [len(entries) % 65536, first, bits])
    if packed:
        item.add_new("LUTData", "OW", bytes(entries) + b"\0" * (len(entries) % 2))
    elif words == "OW":
        item.add_new("LUTData", "OW", np.asarray(entries, "<u2").tobytes())
    else:
        item.add_new("LUTData", "US", [int(e) for e in entries])
    return pydicom.Sequence([item])


# ------------------------------------------------------------------------------------- grey transforms


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_depths(bits):
    values = (np.arange(320).reshape(16, 20) * ((1 << bits) - 1) // 319).astype(np.uint8 if bits == 8 else np.uint16)
    same(make(values, BitsStored=bits), stretched(values))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(("centre", "width"), [(-20, 101), (0.25, 37.5), (40, 1), (-150, 900)])
def test_window_functions(function, centre, width):
    data = make(
        RAMP,
        RescaleSlope="0.5",
        RescaleIntercept=-60,
        WindowCenter=[centre, 7],
        WindowWidth=[width, 9],
        VOILUTFunction=function,
    )
    same(data, stretched(each(lambda x: window(x, centre, width, function), RAMP * 0.5 - 60)))


@pytest.mark.parametrize("function", ["LINEAR", "SIGMOID"])
def test_monochrome1_after_the_window(function):
    data = make(RAMP, "MONOCHROME1", WindowCenter=150, WindowWidth=99, VOILUTFunction=function)
    same(data, stretched(1 - each(lambda x: window(x, 150, 99, function), RAMP)))


def test_negative_slope():
    same(make(RAMP, RescaleSlope=-2, RescaleIntercept=5), stretched(5 - 2 * RAMP.astype(int)))


@pytest.mark.parametrize("words", ["US", "OW"])
def test_modality_table_holds_its_ends(words):
    entries = [(7 * i * i) % 60000 for i in range(100)]  # not monotone
    expected = each(lambda x: entries[min(max(int(x) - 50, 0), 99)], RAMP)
    same(make(RAMP, ModalityLUTSequence=table(50, entries, words=words)), stretched(expected))


def test_modality_table_wins_over_rescale_and_the_window_follows():
    entries = [i * 3 for i in range(320)]
    data = make(
        RAMP,
        ModalityLUTSequence=table(0, entries),
        RescaleSlope=-1,
        RescaleIntercept=0,
        WindowCenter=500,
        WindowWidth=301,
    )
    same(data, stretched(each(lambda x: window(3 * x, 500, 301), RAMP)))


@pytest.mark.parametrize("packed", [False, True])
def test_voi_table_of_8_bits(packed):
    entries = [255 - (i * i) % 251 for i in range(201)]
    expected = each(lambda x: entries[min(max(int(x), 0), 200)], RAMP)
    same(make(RAMP, VOILUTSequence=table(0, entries, 8, packed), WindowCenter=9, WindowWidth=3), stretched(expected))


def test_voi_table_over_negative_values():
    entries = [i**2 for i in range(150)]
    expected = each(lambda x: entries[min(max(int(x) - 100 + 80, 0), 149)], RAMP)
    same(make(RAMP, RescaleSlope=1, RescaleIntercept=-100, VOILUTSequence=table(-80, entries)), stretched(expected))
    unsigned = table(65536 - 80, entries)  # the same first value, as many writers state it
    same(make(RAMP, RescaleSlope=1, RescaleIntercept=-100, VOILUTSequence=unsigned), stretched(expected))


def test_table_of_65536_entries():
    entries = [65535 - i for i in range(65536)]
    same(make(RAMP * 200, VOILUTSequence=table(0, entries)), stretched(65535 - RAMP.astype(int) * 200))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_tables_in_other_syntaxes(syntax):
    entries = [(i * 37) % 1000 for i in range(320)]
    data = make(RAMP, syntax=syntax, VOILUTSequence=table(0, entries), PixelPaddingValue=3)
    same(data, stretched(each(lambda x: entries[int(x)], RAMP), RAMP == 3))


# --------------------------------------------------------------------------------------- stored values


def test_unused_high_bits_are_masked():
    overlay = np.where(RAMP % 3 == 0, 0x8000, 0x5000).astype(np.uint16)
    same(make(RAMP + 1000 | overlay, BitsStored=12), stretched(RAMP))


def test_signed_values_are_extended_from_bits_stored():
    values = RAMP.astype(int) - 160
    words = ((values & 0x0FFF) | 0x3000).astype(np.uint16).view(np.int16)  # two overlays above 12 bits
    same(make(words, BitsStored=12), stretched(values))


def test_signed_16_and_8_bit():
    same(make((RAMP * 200).astype(np.int32).astype(np.int16) - np.int16(0)), stretched((RAMP * 200).astype(np.int16)))
    narrow = (np.arange(256).reshape(16, 16) - 128).astype(np.int8)
    same(make(narrow, PixelRepresentation=1), stretched(narrow))


def test_high_bit_above_the_stored_bits():
    same(make(RAMP << 4, BitsStored=12, HighBit=15), stretched(RAMP))


def test_32_bit_and_floats():
    values = RAMP.astype(np.uint32) * 100_000
    same(make(values, RescaleSlope=2, RescaleIntercept=-7), stretched(values.astype(float) * 2 - 7))
    floats = (RAMP.astype(np.float32) - 100) / 7
    data = pydicom.dcmread(io.BytesIO(make(values)))
    del data.PixelData
    data.FloatPixelData = floats.tobytes()
    buffer = io.BytesIO()
    data.save_as(buffer)
    same(buffer.getvalue(), stretched(floats), 1)


@pytest.mark.parametrize("negative", [False, True])
def test_padding_is_black_and_takes_no_part(negative):
    values = RAMP + 500
    values[:4] = 0
    values[12:] = 4000
    interpretation = "MONOCHROME1" if negative else "MONOCHROME2"
    shown = -values.astype(int) if negative else values.astype(int)
    same(make(values, interpretation, PixelPaddingValue=4000), stretched(shown, values == 4000))
    same(make(values, interpretation, PixelPaddingValue=0), stretched(shown, values == 0))
    ranged = make(values, interpretation, PixelPaddingValue=4000, PixelPaddingRangeLimit=700)
    same(ranged, stretched(shown, values >= 700))
    same(make(values, interpretation, PixelPaddingValue=9999), stretched(shown))  # which no pixel has


def test_signed_padding_stated_either_way():
    values = RAMP.astype(np.int16)
    values[0] = -2000
    same(make(values, PixelPaddingValue=-2000), stretched(values, values == -2000))
    data = bytearray(make(values, PixelPaddingValue=-2000))
    at = data.index(struct.pack("<HH", 0x28, 0x120)) + 4
    data[at : at + 2] = b"US"
    same(bytes(data), stretched(values, values == -2000))


def test_padding_with_a_window():
    values = RAMP.copy()
    values[:, 0] = 60000
    shown = each(lambda x: window(x, 160, 401), values)
    same(make(values, PixelPaddingValue=60000, WindowCenter=160, WindowWidth=401), stretched(shown, values == 60000))


# ---------------------------------------------------------------------------------------------- colour


def colours():
    rows, columns = np.mgrid[0:16, 0:20]
    return np.dstack([rows * 15, columns * 12, (rows + columns) * 7]).astype(np.uint8)


def luma(values):
    return values.astype(int) @ np.array([299, 587, 114])


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless])
def test_rgb(planar, syntax):
    values = colours()
    if syntax == RLELossless:
        data = make(values, "RGB", syntax, rle([values[:, :, i] for i in range(3)]), PlanarConfiguration=planar)
    else:
        stored = values.transpose(2, 0, 1).reshape(values.shape) if planar else values
        data = make(stored, "RGB", syntax, PlanarConfiguration=planar)
    same(data, stretched(luma(values)), 1)


def test_rgb_of_16_bits():
    values = colours().astype(np.uint16) * 250
    same(make(values, "RGB"), stretched(luma(values)), 1)


def test_ybr_full_is_its_luma():
    same(make(colours(), "YBR_FULL"), stretched(colours()[:, :, 0]))


def test_ybr_full_422():
    y = (np.arange(320) * 255 // 319).astype(np.uint8)
    packed = np.stack([y[0::2], y[1::2], y[0::2] // 3, 255 - y[1::2]], axis=1)
    data = make(np.zeros((16, 20, 3), np.uint8), "YBR_FULL_422", PixelData=packed.tobytes())
    same(data, stretched(y.reshape(16, 20)))


# ----------------------------------------------------------------------------------- transfer syntaxes


def packbits(plane):
    """PackBits (PS3.5 G.3): runs as runs, the rest as literals."""
    data, out, at = bytes(plane), bytearray(), 0
    while at < len(data):
        run = 1
        while run < 128 and at + run < len(data) and data[at + run] == data[at]:
            run += 1
        if run > 2:
            out += bytes([257 - run, data[at]])
            at += run
        else:
            part = data[at : at + 5]
            out += bytes([len(part) - 1]) + part
            at += len(part)
    return bytes(out) + b"\x80" * (len(out) % 2)


def rle(planes):
    segments = [packbits(np.ascontiguousarray(p).tobytes()) for p in planes]
    offsets = np.cumsum([64] + [len(s) for s in segments[:-1]])
    return struct.pack("<16I", len(segments), *[int(o) for o in offsets], *[0] * (15 - len(segments))) + b"".join(
        segments
    )


def smooth(bits=12, height=48, width=64):
    rows, columns = np.mgrid[0:height, 0:width]
    top = (1 << bits) - 1
    values = (0.5 + 0.3 * np.sin(rows / 9) + 0.2 * np.cos(columns / 7)) * top
    return np.rint(values).clip(0, top).astype(np.uint16 if bits > 8 else np.uint8)


def by_gdcm(values, kind, bits):
    """The frame GDCM encodes of the words."""
    import gdcm

    image = gdcm.Image()
    image.thisown = False  # the change below counts it and frees it
    image.SetNumberOfDimensions(2)
    image.SetDimensions((values.shape[1], values.shape[0], 1))
    image.SetPixelFormat(gdcm.PixelFormat(1, values.dtype.itemsize * 8, bits, bits - 1, 0))
    image.SetPhotometricInterpretation(gdcm.PhotometricInterpretation(gdcm.PhotometricInterpretation.MONOCHROME2))
    image.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.ExplicitVRLittleEndian))
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetByteStringValue(values.tobytes())
    image.SetDataElement(element)
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, kind)))
    change.SetInput(image)
    assert change.Change()
    with tempfile.TemporaryDirectory() as folder:
        writer = gdcm.ImageWriter()
        writer.SetFileName(f"{folder}/a.dcm")
        writer.SetImage(change.GetOutput())
        assert writer.Write()
        return next(pydicom.encaps.generate_frames(pydicom.dcmread(f"{folder}/a.dcm").PixelData, number_of_frames=1))


def by_opencv(values, extension=".jpg", options=()):
    done, data = cv2.imencode(extension, values, list(options))
    assert done
    return bytes(data)


def by_openjpeg(values, bits, lossless=True):
    from openjpeg import utils

    extra = {} if lossless else {"compression_ratios": [4]}
    return bytes(utils.encode_array(values, bits_stored=bits, photometric_interpretation=2, **extra))


def by_hand(blocks):
    """12-bit extended JPEG (ISO 10918-1 process 2) of 8 x 8 blocks of one value each: DC differences, AC all zero.

    Every DC category has a code of 5 bits, its number; end of block is the one bit 0. A block of value v has the DC
    coefficient 8 (v - 2048), which a quantiser of 8 makes v - 2048.
    """
    bits, previous = "", 0
    for value in (int(v) - 2048 for v in np.ravel(blocks)):
        step, previous = value - previous, value
        size = abs(step).bit_length()
        amplitude = step if step >= 0 else step + (1 << size) - 1
        bits += f"{size:05b}" + (f"{amplitude:0{size}b}" if size else "") + "0"
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker, body):
        return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body

    height, width = blocks.shape
    return (
        b"\xff\xd8"
        + segment(0xDB, b"\0" + bytes([8] * 64))
        + segment(0xC1, struct.pack(">BHHB", 12, 8 * height, 8 * width, 1) + b"\x01\x11\0")
        + segment(0xC4, b"\x00" + bytes([0, 0, 0, 0, 16] + [0] * 11) + bytes(range(16)))
        + segment(0xC4, b"\x10" + bytes([1] + [0] * 15) + b"\0")
        + segment(0xDA, b"\x01\x01\x00\x00\x3f\x00")
        + coded
        + b"\xff\xd9"
    )


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16])
def test_native_syntaxes(syntax, kind):
    values = (RAMP % 251).astype(kind) if kind == np.uint8 else (RAMP * 100).astype(kind)
    same(make(values, syntax=syntax), stretched(values))


def test_big_endian_bytes_in_words():
    values = (RAMP % 251).astype(np.uint8)
    data = bytearray(make(values, syntax=ExplicitVRBigEndian))
    at = data.index(b"\x7f\xe0\x00\x10") + 4
    data[at : at + 2] = b"OW"
    body = values.reshape(-1, 2)[:, ::-1].tobytes()
    same(bytes(data[: at + 8]) + body, stretched(values))


def test_rle_of_16_bits():
    values = smooth(16)
    frame = rle([(values >> 8).astype(np.uint8), (values & 0xFF).astype(np.uint8)])
    same(make(values, syntax=RLELossless, frame=frame), stretched(values))


@pytest.mark.parametrize(
    ("syntax", "bits", "frame", "most"),
    [
        (JPEGBaseline8Bit, 8, lambda v: by_opencv(v, options=[cv2.IMWRITE_JPEG_QUALITY, 98]), 3),
        (JPEGLossless, 8, lambda v: by_gdcm(v, "JPEGLosslessProcess14", 8), 0),
        (JPEGLossless, 12, lambda v: by_gdcm(v, "JPEGLosslessProcess14", 12), 0),
        (JPEGLosslessSV1, 16, lambda v: by_gdcm(v, "JPEGLosslessProcess14_1", 16), 0),
        (JPEGLSLossless, 8, lambda v: by_gdcm(v, "JPEGLSLossless", 8), 0),
        (JPEGLSLossless, 12, lambda v: by_gdcm(v, "JPEGLSLossless", 12), 0),
        (JPEGLSNearLossless, 12, lambda v: by_gdcm(v, "JPEGLSNearLossless", 12), 1),
        (JPEG2000Lossless, 8, lambda v: by_openjpeg(v, 8), 0),
        (JPEG2000Lossless, 12, lambda v: by_openjpeg(v, 12), 0),
        (JPEG2000, 16, lambda v: by_openjpeg(v, 16, False), 2),
    ],
)
def test_compressed_syntaxes(syntax, bits, frame, most):
    values = smooth(bits)
    data = make(values, syntax=syntax, frame=frame(values), BitsStored=bits)
    same(data, stretched(values), most)
    with pytest.raises(ImageError, match=r"truncated|damaged|empty"):
        read_view(make(values, syntax=syntax, frame=frame(values)[:-40], BitsStored=bits))


@pytest.mark.parametrize(
    ("syntax", "bits", "frame"),
    [
        (JPEGBaseline8Bit, 8, lambda v: by_opencv(v)),
        (JPEGExtended12Bit, 12, lambda v: by_hand(v[::8, ::8])),
        (JPEGLossless, 8, lambda v: by_gdcm(v, "JPEGLosslessProcess14", 8)),
        (JPEGLossless, 12, lambda v: by_gdcm(v, "JPEGLosslessProcess14", 12)),
        (JPEGLosslessSV1, 16, lambda v: by_gdcm(v, "JPEGLosslessProcess14_1", 16)),
        (JPEGLSLossless, 8, lambda v: by_gdcm(v, "JPEGLSLossless", 8)),
        (JPEGLSLossless, 12, lambda v: by_gdcm(v, "JPEGLSLossless", 12)),
        (JPEG2000Lossless, 12, lambda v: by_openjpeg(v, 12)),
        (JPEG2000, 8, lambda v: by_openjpeg(v, 8, False)),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_a_stream_cut_and_closed_is_refused(syntax, bits, frame, share):
    values = smooth(bits, 200, 304) // 2
    values = (values + np.random.default_rng(0).integers(0, 1 << (bits - 3), values.shape)).astype(values.dtype)
    whole = frame(values).rstrip(b"\0")
    read_view(make(values, syntax=syntax, frame=whole, BitsStored=bits))
    cut = whole[: int(len(whole) * share)]
    at = cut.find(b"\xff\x90")
    if at > 0 and "2000" in syntax.name:  # the tile's length, too
        cut = cut[: at + 6] + struct.pack(">I", len(cut) - at) + cut[at + 10 :]
    with pytest.raises(ImageError, match=r"truncated or damaged"):
        read_view(make(values, syntax=syntax, frame=cut + b"\xff\xd9", BitsStored=bits))


@pytest.mark.parametrize(
    ("syntax", "frame"),
    [
        (JPEGLosslessSV1, lambda v: by_gdcm(v, "JPEGLosslessProcess14_1", 12)),
        (JPEGLSLossless, lambda v: by_gdcm(v, "JPEGLSLossless", 12)),
    ],
)
def test_signed_values_in_lossless_streams(syntax, frame):
    values = smooth(12).astype(int) - 2048
    words = (values & 0x0FFF).astype(np.uint16)
    same(make(words, syntax=syntax, frame=frame(words), BitsStored=12, PixelRepresentation=1), stretched(values))


def test_12_bit_jpeg():
    blocks = (np.arange(9 * 11).reshape(9, 11) * 397) % 4096
    data = make(
        np.kron(blocks, np.ones((8, 8), int)).astype(np.uint16),
        syntax=JPEGExtended12Bit,
        frame=by_hand(blocks),
        BitsStored=12,
    )
    same(data, stretched(np.kron(blocks, np.ones((8, 8), int))))


def test_colour_jpeg_by_photometric_interpretation():
    values = cv2.GaussianBlur(np.kron(colours(), np.ones((4, 4, 1), np.uint8)), (0, 0), 3)
    frame = by_opencv(values[:, :, ::-1], options=[cv2.IMWRITE_JPEG_QUALITY, 98])  # stored as luma and differences
    same(make(values, "YBR_FULL_422", JPEGBaseline8Bit, frame), stretched(luma(values)), 4)


def test_fragments_of_one_frame_are_joined():
    values = smooth(12)
    frame = by_openjpeg(values, 12)
    whole = make(values, syntax=JPEG2000Lossless, frame=frame, BitsStored=12)
    at = whole.index(b"\xe0\x7f\x10\x00") + 12
    parts = b"".join(
        b"\xfe\xff\x00\xe0" + struct.pack("<I", len(p)) + p for p in (b"", frame[:100], frame[100:200], frame[200:])
    )
    same(whole[:at] + parts + b"\xfe\xff\xdd\xe0\0\0\0\0", stretched(values))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_without_preamble_and_without_meta(syntax):
    same(make(RAMP, syntax=syntax, preamble=False), stretched(RAMP))
    whole = make(RAMP, syntax=syntax)
    start = whole.index(b"\x08\x00\x16\x00" if syntax != ExplicitVRBigEndian else b"\x00\x08\x00\x16")
    same(whole[start:], stretched(RAMP))


# --------------------------------------------------------------------------------------------- reduced


def radiograph(bits, height=613, width=509):
    """Smooth with noise and hard edges, as markers and collimators have."""
    rng = np.random.default_rng(bits)
    values = smooth(bits, height, width) * 0.8 + rng.normal(0, 0.02 * 2**bits, (height, width))
    values[50:90, 60:160], values[:, :17] = 0, (1 << bits) - 1
    return np.rint(values).clip(0, (1 << bits) - 1).astype(np.uint16)


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("fields", [
    {},
    {"WindowCenter": 0.4, "WindowWidth": 0.5},
    {"WindowCenter": 0.5, "WindowWidth": 0.9, "VOILUTFunction": "LINEAR_EXACT"},
    {"WindowCenter": 0.5, "WindowWidth": 0.5, "VOILUTFunction": "SIGMOID"},
    {"WindowCenter": 0.5, "WindowWidth": 0.04},
    {"RescaleSlope": -1, "RescaleIntercept": 4000},
    {"PixelPaddingValue": 0},
])  # fmt: skip
def test_reducing_early_is_within_one_level(interpretation, bits, fields):
    fields = {k: round(v * 2**bits, 2) if k.startswith("Window") else v for k, v in fields.items()}
    data = make(radiograph(bits), interpretation, BitsStored=bits, **fields)
    slow = resize(read_view(data)[0], 101)
    fast, *_ = read_view(data, 101)
    assert fast.shape == slow.shape == (122, 101)
    assert np.abs(fast.astype(int) - slow).max() <= 1


def test_reducing_early_happens(monkeypatch):
    calls = []
    along = display._along
    monkeypatch.setattr(display, "_along", lambda *a: calls.append(1) or along(*a))
    read_view(make(radiograph(12), BitsStored=12, WindowCenter=2000, WindowWidth=3000), 101)
    read_view(make(radiograph(16).astype(np.int32).astype(np.int16)), 101)
    assert len(calls) == 2
    read_view(make(radiograph(12), WindowCenter=2000, WindowWidth=3000, VOILUTFunction="SIGMOID"), 101)
    read_view(make(RAMP), 16)
    assert len(calls) == 2


def test_never_enlarged():
    assert read_view(make(RAMP), 400)[0].shape == RAMP.shape


# -------------------------------------------------------------------------------------------- position


def coded(value):
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SRT", "x"
    return pydicom.Sequence([item])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": "ap "}, "AP"),
        ({"ViewPosition": "RL"}, "LATERAL"),
        ({"ViewPosition": "ANTERO-POSTERIOR"}, "AP"),
        ({"ViewPosition": "RAO", "SeriesDescription": "PA"}, ""),
        ({"ViewCodeSequence": coded("R-10206")}, "AP"),
        ({"ViewCodeSequence": coded("R-10214")}, "PA"),
        ({"ViewCodeSequence": coded("272479007")}, "PA"),
        ({"ViewCodeSequence": coded("399348003")}, "AP"),
        ({"ViewCodeSequence": coded("R-10236")}, "LATERAL"),
        ({"ViewCodeSequence": coded("399067008")}, "LATERAL"),
        ({"ViewCodeSequence": coded("399033003"), "SeriesDescription": "PA"}, ""),  # frontal
        ({"ViewPosition": "", "SeriesDescription": "Chest p.a. LAT"}, "LATERAL"),
        ({"SeriesDescription": "W033 Thorax pa"}, "PA"),
        ({"SeriesDescription": "PLATE, APPROVED", "ProtocolName": "THORAX AP/bed"}, "AP"),
        ({"SeriesDescription": "CHEST PA AND LAT"}, ""),
        ({"SeriesDescription": "CHEST"}, ""),
        ({}, ""),
    ],
)
def test_position(fields, expected):
    assert read_view(make(RAMP, **fields))[1] == expected


# ----------------------------------------------------------------------------- what ships with pydicom


def test_files_of_pydicom_are_read_or_refused_with_a_reason():
    read = 0
    for path in sorted(p for p in TEST_FILES.rglob("*") if p.is_file()):
        try:
            image, *_ = read_view(path.read_bytes(), 64)
        except ImageError as error:
            assert 8 < len(str(error)) < 120 and "\n" not in str(error)
        else:
            read += 1
            assert image.dtype == np.uint8 and image.ndim == 2 and image.min() < image.max()
    assert read >= 60


def test_12_bit_jpeg_of_another_encoder():
    """Two pixels of a file that pydicom's own tests state, decoded there by another library."""
    image = read_view((TEST_FILES / "JPGExtended.dcm").read_bytes())[0].astype(float)
    assert abs(image[420, 140] - 244 * 255 / 264) <= 0.5 and abs(image[230, 120] - 95 * 255 / 264) <= 0.5


@pytest.mark.parametrize(
    "name", ["JPGExtended.dcm", "JPEG2000-embedded-sequence-delimiter.dcm", "SC_rgb_jpeg_gdcm.dcm"]
)
def test_codecs_written_in_c_say_nothing(name, capfd):
    data = (TEST_FILES / name).read_bytes()
    for cut in (0, 50, 300):
        try:
            read_view(data[: len(data) - cut])
        except ImageError as error:
            assert "\n" not in str(error)
    assert capfd.readouterr() == ("", "")


def test_threads_that_decode_leave_stderr_as_it_was():
    """Dask's workers have several. Each hears its own codec."""
    before, heard = os.fstat(2), {}
    inside, other = threading.Event(), threading.Event()

    def decode(name, meet):
        with pixels._caught_stderr() as said:
            meet()
            os.write(2, name)
            said.seek(0)
            heard[name] = said.read()

    def first():
        inside.set()
        other.wait(0.3)  # in vain, where the other one has to wait until this one is done

    def second():
        other.set()
        threads[0].join(0.3)

    threads = [threading.Thread(target=decode, args=each) for each in ((b"1", first), (b"2", second))]
    threads[0].start()
    inside.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert heard == {b"1": b"1", b"2": b"2"}
    assert (os.fstat(2).st_dev, os.fstat(2).st_ino) == (before.st_dev, before.st_ino)


@pytest.mark.parametrize("kind", [b"C\0", b"U\x01", b"Q\x01", b"\0\0"])
def test_an_element_of_no_known_kind_is_one_line(kind):
    """Of any element: pydicom takes its length from other bytes then, and may only say so when it is asked for."""
    whole = make(smooth(8, 20, 24))
    places = [m.start() for m in re.finditer(rb"\x28\x00..[A-Z]{2}", whole, re.DOTALL)]
    assert len(places) > 5
    for at in places:
        for size in (b"", b"\0\0\0", b"\0\0\1", b"\xff\xff"):
            data = whole[: at + 4] + kind + size + whole[at + 6 + len(size) :]
            with contextlib.suppress(ImageError):
                read_view(data)
