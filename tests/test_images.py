import io
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.images import MAX_PIXELS, ImageError, decode, encode, read_image, read_view, resize

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


def test_reads_a_path(tmp_path):
    (tmp_path / "a.png").write_bytes(png(RAMP))
    assert np.array_equal(read_image(tmp_path / "a.png"), stretched(RAMP))


def absurd_png():
    data = bytearray(png(RAMP.astype(np.uint8)))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def noise():
    return np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"", "empty"),
        (lambda: b"not an image" * 50, "not a DICOM, JPEG or PNG"),
        (lambda: png(noise(), "GIF"), "not a DICOM, JPEG or PNG"),
        (lambda: png(np.full((16, 16), 7, np.uint8)), "constant"),
        (lambda: dicom(np.full((16, 16), 7, np.uint16)), "constant"),
        (lambda: png(noise())[:1000], "truncated"),
        (lambda: encode(noise(), 90)[:1000], "truncated"),
        (lambda: dicom(RAMP)[:-100], "DICOM"),
        (lambda: dicom(RAMP)[:300], "DICOM"),
        (lambda: dicom(RAMP, PixelData=RAMP.tobytes()[:-64]), "DICOM pixel data"),
        (lambda: dicom(np.stack([RAMP, RAMP]), NumberOfFrames=2), "several frames"),
        (lambda: dicom(RAMP, Rows=65535, Columns=65535), "no radiograph has"),
        (absurd_png, "no radiograph has"),
        (lambda: png(np.arange(16, dtype=np.uint8).reshape(4, 4)), "smaller"),
        (lambda: dicom(RAMP, "PALETTE COLOR"), "DICOM"),
    ],
)
def test_bad_input_is_one_line_with_a_reason(make, reason):
    with pytest.raises(ImageError, match=reason) as error:
        read_image(make())
    assert "\n" not in str(error.value)


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
        data = dicom(RAMP, PatientName="Secret^Name", PatientAge="Secret", WindowCenter=5, WindowWidth=0)
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


def test_missing_file(tmp_path):
    with pytest.raises(ImageError, match=r"^file missing$"):
        read_image(tmp_path / "none.dcm")


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
    image = read_image(original)
    # The twin holds the original's very bytes but for one: MONOCHROME1 in the header. Read as its header says, it is
    # the negative (255 - v, or one more where both round a half to even).
    assert (
        sum(a != b for a, b in zip(original.read_bytes(), (REAL / "Fake_MONOHR1.dcm").read_bytes(), strict=True)) == 1
    )
    assert set(np.unique(image.astype(int) + read_image(REAL / "Fake_MONOHR1.dcm"))) <= {255, 256}
    # A true twin, pixels stored inverted and the header saying so, is the same picture.
    stored = pydicom.dcmread(original).pixel_array
    assert np.array_equal(read_image(dicom(255 - stored, "MONOCHROME1")), image)


@pytest.mark.skipif(not REAL.is_dir(), reason="real files not here")
def test_real_png_and_colour_jpeg():
    for name in ("00000001_000.png", "00027426_000.png", "16747_3_1.jpg"):
        image = read_image(REAL / name)
        assert image.dtype == np.uint8 and image.ndim == 2 and min(image.shape) >= 512
        assert image.std() > 20
