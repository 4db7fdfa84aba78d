import io
import logging
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_dicom import make

from pipeline.ingest.images import read_view
from pipeline.storage.pictures import MAX_PIXELS, ImageError, decode, encode, linear_means, resize, target_size

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
RAMP = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16)


def dicom(values, interpretation="MONOCHROME2", **fields):
    """An uncompressed DICOM of 16-bit values, written with pydicom and read back as bytes."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.Rows, data.Columns = values.shape[-2:] if interpretation != "RGB" else values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = (3 if interpretation == "RGB" else 1), interpretation
    if interpretation == "RGB":
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = values.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read_image(data):
    return read_view(data)[0]


def png(values, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


def stretched(values):
    """Min-max to 8 bit by exact integer arithmetic, halves to even as numpy rounds them."""
    low, high = int(values.min()), int(values.max())
    return np.array([[round((int(v) - low) * 255 / (high - low)) for v in row] for row in values], np.uint8)


def test_16_bit_dicom_is_stretched_to_8_bit():
    assert np.array_equal(read_image(dicom(RAMP + 1000)), stretched(RAMP))


def test_monochrome1_is_inverted_to_the_same_picture():
    twin = dicom(4095 - RAMP, "MONOCHROME1")
    assert np.array_equal(read_image(twin), read_image(dicom(RAMP)))


def test_rescale_then_window():
    # Stored 0..191, rescaled to -100..91; window centre 0, width 41: linear from -20.5 to 19.5 (PS3.3 C.11.2.1.2.1).
    image = read_image(dicom(RAMP, RescaleSlope=1, RescaleIntercept=-100, WindowCenter=0, WindowWidth=41))
    rescaled = RAMP.astype(float) - 100
    expected = np.clip((rescaled + 0.5) / 40 + 0.5, 0, 1) * 255
    assert np.abs(image - expected).max() <= 0.5 + 1e-6
    assert (image == 0).sum() == 80 and (image == 255).sum() == 72


def test_voi_table_wins_over_the_window():
    import pydicom

    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [256, 0, 16])
    table.add_new("LUTData", "US", list(range(255, -1, -1)))  # turns values over
    fields = {"VOILUTSequence": pydicom.Sequence([table]), "WindowCenter": 5, "WindowWidth": 2}
    assert np.array_equal(read_image(dicom(RAMP, **fields)), stretched(191 - RAMP.astype(int)))


def test_signed_pixels():
    assert np.array_equal(read_image(dicom(RAMP.astype(np.int16) - 50)), stretched(RAMP))


@pytest.mark.parametrize("syntax", ["JPEG2000Lossless", "RLELossless"])
def test_lossless_dicom_gives_the_uncompressed_picture(syntax):
    import pydicom

    ramp = np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) * 3
    data = pydicom.dcmread(io.BytesIO(dicom(ramp)))
    data.compress(getattr(pydicom.uid, syntax))
    buffer = io.BytesIO()
    data.save_as(buffer)
    assert np.array_equal(read_image(buffer.getvalue()), stretched(ramp))


@pytest.mark.parametrize(("stated", "position"), [("PA", "PA"), ("AP", "AP"), ("LL", "LATERAL"), ("RAO", ""), ("", "")])
def test_position_of_the_dicom(stated, position):
    assert read_view(dicom(RAMP, ViewPosition=stated))[1] == position


def test_colour_becomes_luma():
    colour = np.zeros((16, 16, 3), np.uint8)
    colour[:8] = (200, 100, 50)
    image = read_image(png(colour))
    assert image.shape == (16, 16)
    assert abs(int(image[0, 0]) - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) <= 1
    colour[12:] = (0, 0, 250)
    luma = colour @ np.array([299, 587, 114])
    assert (
        np.abs(read_image(dicom(colour, "RGB")).astype(int) - stretched(luma)).max() <= 1
    )  # stretched, as every DICOM


def test_8_bit_png_is_left_as_it_is_and_16_bit_png_stretched():
    narrow = (RAMP // 4 + 60).astype(np.uint8)
    assert np.array_equal(read_image(png(narrow)), narrow)
    assert np.array_equal(read_image(png(RAMP * 100)), stretched(RAMP))
    rgba = np.dstack([narrow] * 3 + [np.full_like(narrow, 255)])
    assert np.array_equal(read_image(png(rgba)), narrow)


def absurd_png():
    data = bytearray(png(RAMP.astype(np.uint8)))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def noise():
    return np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)


def jpeg(values, **options):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def absurd_jpeg():
    data = bytearray(jpeg(noise()))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = (60000).to_bytes(2, "big") * 2
    return bytes(data)


def table(descriptor, entries):
    import pydicom

    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    item.add_new("LUTData", "US", entries)
    return pydicom.Sequence([item])


def without(*names, **fields):
    return make(RAMP, **fields, **dict.fromkeys(names))


def renamed(syntax):
    """The transfer syntax replaced by another of the same length, the rest as it was."""
    old = b"1.2.840.10008.1.2.1\0"
    return make(RAMP).replace(old, syntax.ljust(20, b"\0"))


def framed(syntax, frame, **fields):
    import pydicom

    return make(RAMP, syntax=getattr(pydicom.uid, syntax), frame=frame, **fields)


def deflated(change):
    import pydicom

    return change(make(RAMP, syntax=pydicom.uid.DeflatedExplicitVRLittleEndian))


def header_of(width, height, precision=8, marker=0xC0):
    """The start of a JPEG, up to its first scan."""
    frame = struct.pack(">BHHB", precision, height, width, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff" + bytes([marker]) + b"\0\x0b" + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0"


def flat(kind=np.uint16):
    return np.full((16, 16), 7, kind)


BAD = {
    # neither kind
    "empty file": (lambda: b"", "^file is empty$"),
    "text": (lambda: b"not an image" * 50, "^not a DICOM, JPEG or PNG file$"),
    "GIF": (lambda: png(noise(), "GIF"), "^not a DICOM, JPEG or PNG file$"),
    "zeros": (lambda: bytes(5000), "^not a DICOM, JPEG or PNG file$"),
    # PNG
    "constant PNG": (lambda: png(flat(np.uint8)), "^image is constant$"),
    "truncated PNG": (lambda: png(noise())[:1000], "^image data truncated or damaged"),
    "PNG of a signature only": (lambda: png(noise())[:8], "^image header truncated or damaged$"),
    "PNG with a wrong checksum": (lambda: png(noise())[:40] + b"x" + png(noise())[41:], "damaged"),
    "PNG of absurd size": (absurd_png, "^header states a size no radiograph has$"),
    "small PNG": (lambda: png(np.arange(16, dtype=np.uint8).reshape(4, 4)), "^image is smaller than a radiograph"),
    # JPEG
    "constant JPEG": (lambda: jpeg(flat(np.uint8)), "^image is constant$"),
    "truncated JPEG": (lambda: jpeg(noise())[:1000], "^image data truncated or damaged"),
    "JPEG without its end": (lambda: jpeg(noise())[:-12], "^image data truncated or damaged"),
    "truncated progressive JPEG": (lambda: jpeg(noise(), progressive=True)[:-300], "^image data truncated or damaged"),
    "JPEG of a start only": (lambda: jpeg(noise())[:4], "^image header truncated or damaged$"),
    "JPEG of absurd size": (absurd_jpeg, "^header states a size no radiograph has$"),
    "small JPEG": (lambda: jpeg(np.arange(16, dtype=np.uint8).reshape(4, 4)), "^image is smaller than a radiograph"),
    # DICOM: file
    "DICOM of a magic only": (lambda: make(RAMP)[:132], "^DICOM without pixel data$"),
    "DICOM cut in its meta group": (lambda: make(RAMP)[:200], "^DICOM file meta information truncated or damaged$"),
    "DICOM cut in its header": (lambda: make(RAMP)[:-430], "^DICOM "),
    "DICOM cut in its pixels": (lambda: make(RAMP)[:-100], "^DICOM pixel data truncated$"),
    "DICOM without pixels": (
        lambda: make(RAMP).replace(b"\xe0\x7f\x10\0", b"\xe0\x7f\x11\0"),
        "^DICOM without pixel data$",
    ),
    "unknown transfer syntax": (lambda: renamed(b"1.2.840.10008.9.9.9"), "^DICOM transfer syntax is not supported$"),
    "MPEG": (lambda: renamed(b"1.2.840.10008.1.2.4"), "^DICOM transfer syntax is not supported$"),
    "deflated, damaged": (lambda: deflated(lambda d: d[:400] + b"\xff" * 300), "^DICOM deflated data damaged$"),
    "deflated, truncated": (lambda: deflated(lambda d: d[:-60]), "^DICOM deflated data truncated$"),
    # DICOM: image pixel module
    "no rows": (lambda: without("Rows"), "^DICOM Rows is missing$"),
    "no bits allocated": (
        lambda: without("BitsAllocated", BitsStored=16, HighBit=15),
        "^DICOM BitsAllocated is missing$",
    ),
    "no interpretation": (
        lambda: without("PhotometricInterpretation"),
        "^DICOM PhotometricInterpretation is missing or damaged$",
    ),
    "absurd size": (lambda: make(RAMP, Rows=65535, Columns=65535), "^header states a size no radiograph has$"),
    "no width": (lambda: make(RAMP, Columns=0), "^image is smaller than a radiograph"),
    "pixels missing": (lambda: make(RAMP, Rows=RAMP.shape[0] + 1), "^DICOM pixel data truncated$"),
    "several frames": (lambda: make(RAMP, Rows=8, NumberOfFrames=2), "^several frames in one file$"),
    "palette": (lambda: make(RAMP, "PALETTE COLOR"), "^DICOM palette colour is no radiograph$"),
    "unknown interpretation": (lambda: make(RAMP, "ARGB"), "^DICOM photometric interpretation is not supported$"),
    "three samples of grey": (lambda: make(RAMP, SamplesPerPixel=3), "^DICOM samples per pixel do not fit"),
    "12 bits allocated": (lambda: make(RAMP, BitsAllocated=12, BitsStored=12), "^DICOM bits allocated are not"),
    "more bits stored than allocated": (
        lambda: make(RAMP, BitsStored=17),
        "^DICOM BitsStored does not fit BitsAllocated$",
    ),
    "no radiograph's pixels": (
        lambda: make(RAMP, PixelSpacing=["0.1", "0.9"]),
        "^DICOM PixelSpacing is no radiograph's$",
    ),
    "constant DICOM": (lambda: make(flat()), "^image is constant$"),
    "padding only": (
        lambda: make(RAMP, PixelPaddingValue=0, PixelPaddingRangeLimit=65535),
        "^image is constant: padding only$",
    ),
    # DICOM: transforms
    "rescale slope of zero": (
        lambda: make(RAMP, RescaleSlope=0, RescaleIntercept=1),
        "^DICOM RescaleSlope is 0$",
    ),
    "infinite rescale": (
        lambda: make(RAMP, RescaleSlope="1e999", RescaleIntercept=0),
        "^DICOM RescaleSlope is not finite$",
    ),
    "short modality table": (
        lambda: make(RAMP, ModalityLUTSequence=table([300, 0, 16], [1, 2, 3])),
        "^DICOM modality look-up table is damaged",
    ),
    # DICOM: encapsulated pixels
    "fragments in a native syntax": (
        lambda: framed("JPEGBaseline8Bit", b"x" * 10).replace(b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.1\0\0\0"),
        "^DICOM pixel data encapsulated against its transfer syntax$",
    ),
    "bare pixels in an RLE syntax": (
        lambda: renamed(b"1.2.840.10008.1.2.5"),
        "^DICOM pixel data not encapsulated as its transfer syntax asks$",
    ),
    "fragment cut": (
        lambda: framed("JPEGBaseline8Bit", b"x" * 500)[:-100],
        "^DICOM encapsulated pixel data truncated$",
    ),
    "fragment of another tag": (
        lambda: framed("JPEGBaseline8Bit", b"x" * 50).replace(b"\xfe\xff\x00\xe0", b"\xfe\xff\x11\xe0"),
        "^DICOM encapsulated pixel data damaged$",
    ),
    "no fragment": (
        lambda: framed("JPEGBaseline8Bit", b"xx").replace(b"\2\0\0\0xx", b"\0\0\0\0"),
        "^DICOM encapsulated pixel data empty$",
    ),
    "no JPEG in a JPEG syntax": (lambda: framed("JPEGBaseline8Bit", b"x" * 500), "^DICOM holds no JPEG where"),
    "JPEG of another size": (
        lambda: framed("JPEGBaseline8Bit", encode(noise(), 90)),
        "^DICOM pixel data has another shape than its header states$",
    ),
    "JPEG of another depth": (
        lambda: framed("JPEGLossless", header_of(16, 12, 17, 0xC3)),
        "^DICOM compressed pixel data has another depth",
    ),
    "hierarchical JPEG": (
        lambda: framed("JPEGLossless", header_of(16, 12, 12, 0xC5)),
        "^DICOM JPEG process is not supported$",
    ),
    "JPEG of a header only": (
        lambda: framed("JPEGBaseline8Bit", header_of(16, 12)),
        "^DICOM compressed pixel data truncated or damaged",
    ),
    "lossless JPEG of a header only": (
        lambda: framed("JPEGLosslessSV1", header_of(16, 12, 12, 0xC3)),
        "^DICOM compressed pixel data truncated or damaged",
    ),
    "JPEG cut before its scan": (
        lambda: framed("JPEGLosslessSV1", header_of(16, 12, 12, 0xC3)[:-10]),
        r"^DICOM compressed pixel data truncated or damaged \(before the first scan\)$",
    ),
    "a million elements": (
        lambda: make(RAMP)[:132] + b"\x08\0\x05\0\0\0\0\0" * 10**6,
        "^DICOM header is larger than a radiograph's$",
    ),
    "a long header": (
        lambda: make(RAMP).replace(b"\xe0\x7f\x10\0OW", b"\xe0\x7f\x11\0OW") + bytes(1 << 25),
        "^DICOM header is larger than a radiograph's$",
    ),
    "JPEG in a JPEG-LS syntax": (lambda: framed("JPEGLSLossless", header_of(16, 12)), "^DICOM holds no JPEG-LS where"),
    "no JPEG 2000 in its syntax": (
        lambda: framed("JPEG2000", b"\xff\x4f\xff\x51" + b"x" * 90),
        "^DICOM compressed pixel data truncated or damaged",
    ),
    "RLE header cut": (lambda: framed("RLELossless", b"x" * 20), "^DICOM RLE header truncated$"),
    "RLE of one segment": (
        lambda: framed("RLELossless", struct.pack("<16I", 1, 64, *[0] * 14) + b"x" * 20),
        "^DICOM RLE segments do not fit the header$",
    ),
    "RLE offsets backwards": (
        lambda: framed("RLELossless", struct.pack("<16I", 2, 90, 64, *[0] * 13) + b"x" * 90),
        "^DICOM RLE header damaged$",
    ),
    "RLE data cut": (
        lambda: framed("RLELossless", struct.pack("<16I", 2, 64, 70, *[0] * 13) + b"\xff\1" * 9),
        "^DICOM RLE data truncated$",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("short_side", [0, 9])
def test_bad_input_is_one_line_with_its_own_reason(name, short_side):
    build, reason = BAD[name]
    data = build()
    with pytest.raises(ImageError, match=reason) as error:
        read_view(data, short_side)
    assert "\n" not in str(error.value) and len(str(error.value)) < 120


def smooth(height=1000, width=900):
    rows, columns = np.mgrid[0:height, 0:width]
    rng = np.random.default_rng(1)
    values = 130 + 70 * np.sin(rows / 60) + 40 * np.cos(columns / 45) + rng.normal(0, 2, (height, width))
    return values.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("cut", [1, 2, 3, 9, 200, 5000, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("short_side", [0, 100])
def test_truncated_jpeg_is_refused_wherever_it_ends(colour, progressive, cut, short_side):
    values = smooth(300, 260)
    data = jpeg(np.dstack([values, values // 2, values]) if colour else values, quality=90, progressive=progressive)
    read_view(data, short_side)
    with pytest.raises(ImageError, match="truncated"):
        read_view(data[: -cut if isinstance(cut, int) else int(len(data) * (1 - cut))], short_side)


KINDS = {
    "plain": {},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 9},
    "colour": {},
    "progressive colour": {"progressive": True},
    "four colours": {},
}


def jpeg_of(kind):
    values = smooth(300, 260)
    if "colour" in kind:
        values = np.dstack([values, values // 2, values])
    if kind == "four colours":
        values = np.asarray(Image.fromarray(values).convert("CMYK"))
        buffer = io.BytesIO()
        Image.fromarray(values, "CMYK").save(buffer, "JPEG")
        return buffer.getvalue()
    return jpeg(values, quality=90, **KINDS[kind])


def taller(data, height):
    at = next(data.index(bytes([0xFF, m])) for m in (0xC0, 0xC2) if bytes([0xFF, m]) in data) + 5
    return data[:at] + height.to_bytes(2, "big") + data[at + 2 :]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short_side", [0, 100])
def test_a_jpeg_without_all_its_data_is_refused_though_it_is_closed(kind, short_side):
    data = jpeg_of(kind)
    read_view(data, short_side)
    cut = [data[: int(len(data) * share)] + b"\xff\xd9" for share in (0.5, 0.9, 0.99)]
    if kind == "restarts":
        at, after = data.index(b"\xff\xd3"), data.index(b"\xff\xd4")
        cut += [data[:at] + data[at + 2 :], data[:at] + data[after:], data[:at] + data[after + 2 :]]
    for damaged in (*cut, taller(data, 340), taller(data, 8900)):
        with pytest.raises(ImageError, match="truncated"):
            read_view(damaged, short_side)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short_side", [0, 225, 130, 100, 33, 20])
def test_jpegs_are_pillows_pixels(kind, short_side):
    data = jpeg_of(kind)
    picture = Image.open(io.BytesIO(data))
    if picture.mode != "CMYK":
        picture.draft("L", (short_side or 260, round(short_side * 300 / 260) or 300))
    expected = np.asarray(picture.convert("L"))
    if short_side and expected.shape != (300, 260):
        expected = linear_means(expected, target_size(300, 260, short_side))
    else:
        expected = resize(expected, short_side or 260)
    assert np.array_equal(read_view(data, short_side)[0], expected)


def test_odd_jpegs_that_are_whole_are_read():
    data = jpeg(smooth(300, 260))
    expected, scan = read_image(data), data.index(b"\xff\xda")
    padded = data[:-2] + bytes(500) + data[-2:]
    odd = data[: scan + 7] + b"\0\0" + data[scan + 9 :]  # a scan that says it has the first coefficient only
    for whole in (padded, odd, data + b"behind", data[:scan] + b"\xff" * 5 + data[scan:]):
        assert np.array_equal(read_image(whole), expected)


def chunks_of(header, raw):
    body = b"".join(
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
        for k, b in ((b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("height", [40, 41])
def test_a_png_whose_rows_end_early_is_refused(interlaced, kind, height):
    values = (np.random.default_rng(0).integers(0, 255, (height, 37)) + 1).astype(kind)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [values[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [values]
    raw = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for part in parts for row in part)
    header = struct.pack(">IIBBBBB", 37, height, 8 * values.itemsize, 0, 0, 0, interlaced)
    expected = values if kind == np.uint8 else stretched(values)
    assert np.array_equal(read_image(chunks_of(header, raw)), expected)
    row = 1 + 37 * values.itemsize
    for missing in (1, row, 2 * row, len(raw) // 2):
        with pytest.raises(ImageError, match="truncated"):
            read_image(chunks_of(header, raw[:-missing]))


def test_a_png_that_is_black_at_the_end_is_read():
    for values in (smooth(64, 50), smooth(64, 50).astype(np.uint16) * 200, np.dstack([smooth(64, 50)] * 3)):
        values[-20:] = 0
        assert read_image(png(values)).max() > 0 and not read_image(png(values))[-20:].any()


@pytest.mark.parametrize("short_side", [512, 449, 300, 224, 113, 50])
@pytest.mark.parametrize("colour", [False, True])
def test_reduced_jpeg_is_close_to_the_area_mean(short_side, colour):
    values = smooth()
    data = jpeg(np.dstack([values] * 3) if colour else values, quality=93)
    small, position, *_ = read_view(data, short_side)
    expected = resize(np.asarray(Image.open(io.BytesIO(data)).convert("L")), short_side)
    assert small.shape == expected.shape and position == ""
    assert 10 * np.log10(255**2 / np.mean((small.astype(float) - expected) ** 2)) >= 40


@pytest.mark.parametrize("short_side", [512, 449, 300, 225])
def test_reduced_jpeg_is_never_decoded_below_what_is_asked(short_side):
    values = np.tile(128 + 100 * np.sin(np.arange(900) * 2 * np.pi * short_side / 900 / 3.5), (1000, 1)).astype(
        np.uint8
    )
    assert read_view(jpeg(values, quality=95), short_side)[0].std() > 0.5 * resize(values, short_side).std()


def test_cmyk_and_rgb_coded_jpegs():
    values = smooth(64, 80)
    cmyk = Image.fromarray(np.dstack([values, values, values, np.zeros_like(values)]), "CMYK")
    for picture, expected in ((cmyk, 255 - values), (Image.fromarray(np.dstack([values] * 3)), values)):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=97, **({"keep_rgb": True} if picture.mode == "RGB" else {}))
        assert np.abs(read_image(buffer.getvalue()).astype(int) - expected).max() <= 8
        assert read_view(buffer.getvalue(), 16)[0].shape == (16, 20)


def test_reduced_png_is_the_area_mean():
    assert np.array_equal(read_view(png(smooth()), 90)[0], resize(smooth(), 90))


def test_absurd_size_is_refused_before_it_is_allocated():
    import tracemalloc

    data = dicom(RAMP, Rows=65535, Columns=65535)
    tracemalloc.start()
    with pytest.raises(ImageError):
        read_image(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_PIXELS // 10


def test_no_header_value_leaves_the_reader(caplog, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = dicom(RAMP, PatientName="Secret^Name", PatientAge="Secret", RescaleSlope=0, RescaleIntercept=0)
    with (
        caplog.at_level(logging.DEBUG),
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(ImageError) as error,
    ):
        warnings.simplefilter("always")
        read_image(data)
    out = capfd.readouterr()
    said = str(error.value) + caplog.text + out.out + out.err + "".join(str(w.message) for w in caught)
    assert "Secret" not in said


def test_resize_averages_areas_and_only_shrinks():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    halved = resize(image, 4)
    expected = image.reshape(4, 2, 4, 2).mean(axis=(1, 3))
    assert np.abs(halved - expected).max() <= 0.5
    assert resize(image, 8) is image and resize(image, 100) is image
    assert resize(np.zeros((100, 60), np.uint8), 30).shape == (50, 30)
    assert resize(np.zeros((61, 199), np.uint8), 32).shape == (32, 104)


def test_encode_is_deterministic_grey_and_close():
    rows, columns = np.mgrid[0:50, 0:70]
    image = (128 + 100 * np.sin(rows / 9) * np.cos(columns / 7)).astype(np.uint8)
    data = encode(image, 95)
    assert data == encode(image.copy(), 95)
    assert Image.open(io.BytesIO(data)).mode == "L"
    assert decode(data).shape == image.shape
    assert np.abs(decode(data).astype(int) - image).max() <= 6


@pytest.mark.parametrize("data", [b"", b"nothing"])
def test_decode_refuses_what_is_no_picture(data):
    with pytest.raises(ImageError):
        decode(data)


@pytest.mark.skipif(not REAL.is_dir(), reason="real files not here")
def test_real_dicom_pair():
    import pydicom

    original = next(REAL.glob("1.2.276*.dcm"))
    image = read_image(original.read_bytes())
    # The twin holds the original's very bytes but for one: MONOCHROME1 in the header. Read as its header says, it is
    # the negative (255 - v, or one more where both round a half to even).
    assert (
        sum(a != b for a, b in zip(original.read_bytes(), (REAL / "Fake_MONOHR1.dcm").read_bytes(), strict=True)) == 1
    )
    assert set(np.unique(image.astype(int) + read_image((REAL / "Fake_MONOHR1.dcm").read_bytes()))) <= {255, 256}
    # A true twin, pixels stored inverted and the header saying so, is the same picture.
    stored = pydicom.dcmread(original).pixel_array
    assert np.array_equal(read_image(dicom(255 - stored, "MONOCHROME1")), image)


@pytest.mark.skipif(not REAL.is_dir(), reason="real files not here")
def test_real_png_and_colour_jpeg():
    for name in ("00000001_000.png", "00027426_000.png", "16747_3_1.jpg"):
        image = read_image((REAL / name).read_bytes())
        assert image.dtype == np.uint8 and image.ndim == 2 and min(image.shape) >= 512
        assert image.std() > 20


def test_fill_bytes_before_a_marker_are_no_segments():
    """As many as a writer likes, ISO 10918-1 B.1.1.2."""
    plain = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)).save(plain, "JPEG")
    data = plain.getvalue()
    assert np.array_equal(read_image(data[:2] + b"\xff" * 5000 + data[2:]), read_image(data))


def test_scans_count_also_where_a_marker_hides_them():
    plain = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48), dtype=np.uint8)).save(
        plain, "JPEG", progressive=True
    )
    data = plain.getvalue()
    last, table = data.rindex(b"\xff\xda"), data.index(b"\xff\xc4")
    many = data[:table] + b"\xff\xd0" + data[table:last] + data[last:-2] * 400 + data[-2:]
    with pytest.raises(ImageError, match="more scans than a radiograph's"):
        read_image(many)


def test_what_follows_the_end_of_a_png_costs_nothing():
    """Its last row is black, so that rows are counted; what comes after the stream's end is as long as it likes."""
    image = np.random.default_rng(0).integers(1, 256, (40, 48), dtype=np.uint8)
    image[-1] = 0
    plain = io.BytesIO()
    Image.fromarray(image).save(plain, "PNG")
    data = plain.getvalue()
    end = data.index(b"IEND") - 4
    body = bytes(1 << 20)
    chunk = len(body).to_bytes(4, "big") + b"IDAT" + body + zlib.crc32(b"IDAT" + body).to_bytes(4, "big")
    since = time.process_time()
    assert np.array_equal(read_image(data[:end] + chunk * 40 + data[end:]), image)
    assert time.process_time() - since < 3
