"""A header that says what cannot be: it does not cost a picture that other software shows, and what was done instead is
said; where the picture would be another one, it is refused with the element that is wrong."""

import io
import struct
import warnings
import zlib

import cv2
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom import uid

from pipeline.config.archive_params import Ingest, Source
from pipeline.ingest.build import ingest_archive
from pipeline.ingest.images import read_view
from pipeline.storage.pictures import ImageError, resize
from tests.test_dicom import RAMP, by_openjpeg, make

PLAIN = read_view(make(RAMP))[0]
WINDOW = {"WindowCenter": "160", "WindowWidth": "100"}
WINDOWED = read_view(make(RAMP, **WINDOW))[0]


def replaced(old, new, **fields):
    data = make(RAMP, **fields)
    assert data.count(old) == 1
    return data.replace(old, new)


def lut(descriptor, data=None):
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "US", descriptor)
    if data is not None:
        item.add_new("LUTData", "US", data)
    return pydicom.Sequence([item])


# What a file says, the picture that it is, and what is said of it.
MENDED = {
    "a comma in the window": (
        lambda: replaced(b"160.5", b"160,5", WindowCenter="160.5", WindowWidth="100"),
        None,
        "comma",
    ),
    "a comma in the width": (
        lambda: replaced(b"100.25", b"100,25", WindowCenter="160", WindowWidth="100.25"),
        read_view(make(RAMP, WindowCenter="160", WindowWidth="100.25"))[0],
        "decimal comma; read as a point",
    ),
    "a comma in the slope": (
        lambda: replaced(b"1.0000", b"1,0000", RescaleSlope="1.0000", RescaleIntercept="0", **WINDOW),
        WINDOWED,
        "decimal comma; read as a point",
    ),
    "a width of 0": (lambda: make(RAMP, WindowCenter=5, WindowWidth=0), PLAIN, "window is damaged or empty"),
    "a width under 1": (lambda: make(RAMP, WindowCenter=5, WindowWidth=0.5), PLAIN, "window is damaged or empty"),
    "a negative width": (
        lambda: make(RAMP, WindowCenter=5, WindowWidth=-3, VOILUTFunction="LINEAR_EXACT"),
        PLAIN,
        "window is damaged or empty",
    ),
    "a centre that is no number": (lambda: make(RAMP, WindowCenter="NaN", WindowWidth=5), PLAIN, "window is damaged"),
    "a width without an end": (lambda: make(RAMP, WindowCenter=5, WindowWidth="inf"), PLAIN, "window is damaged"),
    "a window of letters": (
        lambda: replaced(b"77", b"ab", WindowCenter="77", WindowWidth=50),
        PLAIN,
        "window is damaged",
    ),
    "a function nobody knows": (
        lambda: make(RAMP, WindowCenter=5, WindowWidth=9, VOILUTFunction="CUBIC"),
        PLAIN,
        "window is damaged or empty",
    ),
    "a window beside the values": (lambda: make(RAMP, WindowCenter=9000, WindowWidth=9), PLAIN, "misses the picture"),
    "a table beside the values": (
        lambda: make(RAMP, VOILUTSequence=lut([4, 5000, 16], [1, 2, 3, 4])),
        PLAIN,
        "misses the picture",
    ),
    "a short table": (lambda: make(RAMP, VOILUTSequence=lut([300, 0, 16], [1, 2, 3])), PLAIN, "VOI LUT is damaged"),
    "a short table beside a window": (
        lambda: make(RAMP, VOILUTSequence=lut([300, 0, 16], [1, 2, 3]), **WINDOW),
        WINDOWED,
        "VOI LUT is damaged",
    ),
    "a table that misses beside a window": (
        lambda: make(RAMP, VOILUTSequence=lut([4, 5000, 16], [1, 2, 3, 4]), **WINDOW),
        WINDOWED,
        "VOI LUT misses the picture",
    ),
    "an empty table beside a window": (
        lambda: make(RAMP, VOILUTSequence=lut([0, 0, 16]), **WINDOW),
        WINDOWED,
        "VOI LUT",
    ),
    "an item of nothing beside a window": (
        lambda: make(RAMP, VOILUTSequence=pydicom.Sequence([pydicom.Dataset()]), **WINDOW),
        WINDOWED,
        "VOI LUT is damaged",
    ),
    "a high bit too low": (lambda: make(RAMP, BitsStored=12, HighBit=10), PLAIN, "HighBit does not fit BitsStored"),
    "a high bit beside the values": (
        lambda: make(RAMP, BitsStored=12, HighBit=15),
        PLAIN,
        "HighBit does not fit the values",
    ),
    "a high bit too high": (lambda: make(RAMP, BitsStored=12, HighBit=40), PLAIN, "HighBit does not fit BitsStored"),
}


@pytest.mark.parametrize("kind", MENDED)
@pytest.mark.parametrize("short_side", [0, 12])
def test_what_is_optional_does_not_cost_the_picture(kind, short_side):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data, wanted, said = MENDED[kind][0](), *MENDED[kind][1:]
    image, _, mended = read_view(data, short_side)
    assert len(mended) == 1 and said in mended[0] and mended[0].startswith("DICOM ")
    if wanted is not None:
        assert np.abs(image.astype(int) - (resize(wanted, short_side) if short_side else wanted)).max() <= 1


@pytest.mark.parametrize("coding", ["rle", "jpeg2000"])
def test_a_frame_without_its_closing_delimiter_is_whole(coding):
    large = np.tile(RAMP, (4, 4))
    if coding == "rle":
        header = pydicom.dcmread(io.BytesIO(make(large)))
        header.compress(uid.RLELossless)
        buffer = io.BytesIO()
        header.save_as(buffer)
        whole = buffer.getvalue()
    else:
        whole = make(large, syntax=uid.JPEG2000Lossless, frame=by_openjpeg(large, 12), BitsStored=12)
    end = b"\xfe\xff\xdd\xe0\0\0\0\0"
    assert whole.endswith(end)
    for after in (b"", b"\0\0\0", b"\0" * 200, b"\xfc\xff\xfc\xffOB\0\0\4\0\0\0\0\0\0\0"):
        assert np.array_equal(read_view(whole[: -len(end)] + after)[0], read_view(whole)[0]), after
    image, _, mended = read_view(whole[: -len(end)])
    assert np.array_equal(image, read_view(whole)[0]) and not read_view(whole)[2]
    assert mended == ("DICOM pixel data lack their closing delimiter",)
    with pytest.raises(ImageError):
        read_view(whole[: -len(end) - 30])


@pytest.mark.parametrize("keyword", ["PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"])
@pytest.mark.parametrize(("down", "across", "shape"), [(1, 2, (8, 20)), (2, 1, (16, 10)), (4, 3, (16, 15))])
def test_pixels_become_squares(keyword, down, across, shape):
    values = np.repeat(np.repeat(RAMP[::2, ::2], 2, 0), 2, 1)
    spacing = [down, across] if keyword == "PixelAspectRatio" else [f"{down / 10}", f"{across / 10}"]
    image, _, mended = read_view(make(values, **{keyword: spacing}))
    assert image.shape == shape and mended == ("DICOM pixels are not square; resampled to squares",)
    small = read_view(make(values, **{keyword: spacing}), 6)[0]
    assert min(small.shape) == 6 and abs(small.shape[1] / small.shape[0] - shape[1] / shape[0]) < 0.15
    for same in ([1, 1], ["0.143", "0.1431"], ["0", "0.1"], []):
        if keyword == "PixelAspectRatio" and same != [1, 1]:
            continue
        assert read_view(make(values, **{keyword: same}))[2] == ()


def test_no_frames_are_one():
    assert np.array_equal(read_view(make(RAMP, NumberOfFrames=0))[0], PLAIN)


def test_full_colour_under_a_subsampled_name_is_refused():
    colour = np.dstack([RAMP.astype(np.uint8) // 2 + 60] * 3)
    data = make(colour, "YBR_FULL_422", BitsAllocated=8)
    with pytest.raises(ImageError, match="holds a colour difference for every pixel"):
        read_view(data)


@pytest.mark.parametrize("quality", [95, 80])
def test_a_jfif_picture_is_what_jfif_says(quality):
    """Its components are luma and colour differences whatever the header around it says."""
    colour = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    buffer = io.BytesIO()
    Image.fromarray(colour).save(buffer, "JPEG", quality=quality, subsampling=0)
    assert b"JFIF" in buffer.getvalue()[:20]
    image, *_ = read_view(make(colour, "RGB", syntax=uid.JPEGBaseline8Bit, frame=buffer.getvalue()))
    luma = colour @ [0.299, 0.587, 0.114]
    wanted = (luma - luma.min()) / np.ptp(luma) * 255
    assert np.abs(image - wanted).mean() < 4


# ---- PNG of 16 bits


def png(values, kind):
    """16-bit samples [H, W, C] as PNG's colour type ``kind`` has them."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


GREY = RAMP.astype(np.uint16) % 4096
ALPHA = np.full_like(GREY, 65535)


@pytest.mark.parametrize("short_side", [0, 12])
@pytest.mark.parametrize(
    ("kind", "planes"), [(0, [GREY]), (2, [GREY] * 3), (4, [GREY, ALPHA]), (6, [GREY, GREY, GREY, ALPHA])]
)
def test_a_png_of_16_bits_keeps_its_depth(kind, planes, short_side):
    image, *_ = read_view(png(np.dstack(planes), kind), short_side)
    grey, *_ = read_view(png(GREY[:, :, None], 0), short_side)
    assert np.array_equal(image, grey)
    assert len(np.unique(read_view(png(np.dstack(planes), kind))[0])) > 200  # of 8 bits of 16, 12 of which are used: 2


def test_colour_of_16_bits_becomes_luma():
    rng = np.random.default_rng(1)
    colour = rng.integers(0, 4096, (24, 32, 3)).astype(np.uint16)
    luma = colour @ [0.299, 0.587, 0.114]
    wanted = (luma - luma.min()) / np.ptp(luma) * 255
    assert np.abs(read_view(png(colour, 2))[0] - wanted).max() < 1.1
    with pytest.raises(ImageError):
        read_view(png(colour, 2)[:-500])


# ---- what an ingest says of it


def test_what_was_mended_is_counted_and_no_loss(tmp_path, capsys):
    for n in range(6):
        fields = {"WindowCenter": 5, "WindowWidth": 0} if n < 2 else {}
        (tmp_path / f"{n}.dcm").write_bytes(make(cv2.resize(RAMP, (40, 36)), **fields))
    (tmp_path / "list.csv").write_text("image\n" + "".join(f"{n}.dcm\n" for n in range(6)))
    source = Source("manifest", str(tmp_path), "", manifest="list.csv")
    out = tmp_path / "out"
    options = Ingest(short_side=16, shard_size=3, workers=1)
    summary = ingest_archive("mine", source, options, out / "shards", out / "mine.parquet", tmp_path / "work", 0)
    assert (summary["written_images"], summary["rejected_images"], summary["reasons"]) == (6, 0, {})
    assert summary["mended"] == {"DICOM window is damaged or empty; all values are shown": 2}
    assert "2 x DICOM window is damaged or empty; all values are shown (used)" in capsys.readouterr().out
