"""Small files that would take much memory or time, and the largest files that are read: each within the limits.

Each file is read in a process of its own, forked from one that has imported all: python tests/test_bombs.py NAME ...
prints a JSON object a file: what became of it, seconds of processor time, and the bytes of memory that came on top of
the file's own.
"""

import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import pydicom.uid as uid
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from test_dicom import by_gdcm, by_opencv, by_openjpeg, make  # noqa: E402

from pipeline.ingest.dicom.reader import _file_meta  # noqa: E402
from pipeline.ingest.images import read_view  # noqa: E402
from pipeline.storage.pictures import MAX_PIXELS, ImageError  # noqa: E402

SMALL = np.arange(320, dtype=np.uint16).reshape(16, 20)
EXPLICIT, IMPLICIT, BIG = uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, uid.ExplicitVRBigEndian
DEFLATED = uid.DeflatedExplicitVRLittleEndian
VOI_TABLES, WINDOW, PADDING = (0x0028, 0x3010), (0x0028, 0x1050), (0x0028, 0x0120)


def with_bytes(extra, syntax=EXPLICIT, copies=0):
    """A DICOM with further bytes between its elements and its pixels, or copies of these bytes after its pixels."""
    data = make(SMALL, syntax=syntax)
    start = _file_meta(data)[0] if syntax == DEFLATED else 0
    body = zlib.decompress(data[start:], -15) if start else data
    at = body.index(b"\x7f\xe0\x00\x10" if syntax == BIG else b"\xe0\x7f\x10\0")
    if not copies:
        body = body[:at] + extra + body[at:]
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(body) + packer.flush(zlib.Z_FULL_FLUSH)
    copy = packer.compress(extra) + packer.flush(zlib.Z_FULL_FLUSH) if copies else b""
    return data[:start] + packed + copy * copies + packer.flush() if start else body


def element(content, tag=(0x0040, 0xA730), vr=b"SQ", order="<", ended=False):
    """An element of long length, stated or, if ``ended``, undefined and closed."""
    length = 0xFFFFFFFF if ended else len(content)
    head = struct.pack(f"{order}HH", *tag) + (vr and vr + b"\0\0") + struct.pack(f"{order}I", length)
    return head + content + (struct.pack(f"{order}HHI", 0xFFFE, 0xE0DD, 0) if ended else b"")


def item(content=b"", order="<"):
    return struct.pack(f"{order}HHI", 0xFFFE, 0xE000, len(content)) + content


def fragments(size, count):
    data = make(SMALL, syntax=uid.JPEGBaseline8Bit, frame=b"xx")
    at = data.index(b"\xe0\x7f\x10\0") + 12
    return data[:at] + item() + item(b"x" * size) * count + b"\xfe\xff\xdd\xe0\0\0\0\0"


def single_bytes(kind, pixels):
    """RLE in which a byte of code comes with each two bytes of the picture."""
    values = lines(kind, 1, pixels)
    size = values.dtype.itemsize
    segment = b"\xff\1\xff\2" * (values.size // 4 + 1)
    offsets = [64 + n * len(segment) for n in range(size)]
    frame = struct.pack("<16I", size, *offsets, *[0] * (15 - size)) + segment * size
    return make(values, syntax=uid.RLELossless, frame=frame)


def jpeg(values, mode=None, **options):
    buffer = io.BytesIO()
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def scans(count):
    """A progressive JPEG one of whose scans comes again and again."""
    data = jpeg(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8), progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def segments(marker, count, body=b""):
    data = jpeg(SMALL.astype(np.uint8))
    return data[:2] + (struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body) * count + data[2:]


def png(values):
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunks(chunks):
    data = png(SMALL.astype(np.uint8))
    return data[:33] + chunks + data[33:]


def lines(kind, samples, pixels):
    """A large picture that is quickly made and small in every coding."""
    side = int(pixels**0.5)
    values = np.full((side, side) if samples == 1 else (side, side, samples), 7, kind)
    values[::64] = 90
    values[1, 1] = 200
    return values


def native(kind, samples, pixels, **fields):
    return make(lines(kind, samples, pixels), "RGB" if samples == 3 else "MONOCHROME2", **fields)


def coded(encode, kind, pixels, syntax, *rest):
    values = lines(kind, 1, pixels)
    return make(values, syntax=syntax, frame=encode(values, *rest))


def tiled(marker, offset, change):
    """A JPEG 2000 with some bytes of a main header segment replaced."""
    frame = by_openjpeg(np.tile(SMALL, (10, 10)), 16)
    at = frame.index(marker) + offset
    return make(
        np.tile(SMALL, (10, 10)), syntax=uid.JPEG2000Lossless, frame=frame[:at] + change + frame[at + len(change) :]
    )


def cut(side, across, down=None, style=0, precincts=b"", marker=b"\xff\x52", tile=False):
    """A JPEG 2000 that says it is ``side`` pixels wide and high and cut into such code-blocks (the exponent less 2) and
    precincts, as its main header says, or a tile's."""
    frame = bytearray(by_openjpeg(np.tile(SMALL, (10, 10)), 16))
    at = frame.index(b"\xff\x51")
    struct.pack_into(">II", frame, at + 6, side, side)
    struct.pack_into(">II", frame, at + 22, side, side)
    at = frame.index(b"\xff\x52")
    (size,) = struct.unpack_from(">H", frame, at + 2)
    body = bytearray(frame[at + 4 : at + 2 + size])
    levels, transform = body[5], body[9]
    form = bytes([levels, across, across if down is None else down, style, transform]) + precincts * (levels + 1)
    said = bytes([1 if precincts else 0]) + (bytes(body[1:5]) if marker == b"\xff\x52" else b"") + form
    said = said if marker == b"\xff\x52" else b"\0" + said
    segment = marker + struct.pack(">H", len(said) + 2) + said
    if tile:
        at = frame.index(b"\xff\x90") + 12
        start = at - 6
        (length,) = struct.unpack_from(">I", frame, start)
        struct.pack_into(">I", frame, start, length and length + len(segment))
        changed = frame[:at] + segment + frame[at:]
    else:
        end = at + 2 + size
        changed = frame[:at] + segment + frame[end:] if marker == b"\xff\x52" else frame[:end] + segment + frame[end:]
    return make(np.tile(SMALL, (10, 10)), syntax=uid.JPEG2000Lossless, frame=bytes(changed))


PARTS = "JPEG 2000 has more precincts or code-blocks than a radiograph's"
TILES = "JPEG 2000 has more tiles or layers than a radiograph's"
ITEMS, SCANS = 1_000_000, "JPEG has more scans than a radiograph's"
HEADER, JPEG_HEADER = "DICOM header is larger than a radiograph's", "JPEG header is larger than a radiograph's"
BESIDE, DAMAGED = (
    "PNG holds more beside its picture than a radiograph's",
    "image data truncated or damaged (ValueError)",
)
BOMBS = {  # the file, and the reason why it is refused
    "items": (lambda: with_bytes(element(item() * ITEMS, ended=True)), HEADER),
    "elements of an item": (
        lambda: with_bytes(element(item(element(b"", vr=b"UN") * ITEMS), ended=True)),
        HEADER,
    ),
    "sequences in items": (
        lambda: with_bytes(element(item(element(item() * 9, ended=True)) * (ITEMS // 9), ended=True)),
        HEADER,
    ),
    "items, implicit": (lambda: with_bytes(element(item() * ITEMS, vr=b"", ended=True), IMPLICIT), HEADER),
    "items, big endian": (
        lambda: with_bytes(element(item(order=">") * ITEMS, order=">", ended=True), BIG),
        HEADER,
    ),
    "items, deflated": (lambda: with_bytes(element(item() * ITEMS, ended=True), DEFLATED), HEADER),
    "items of a table": (lambda: with_bytes(element(item() * ITEMS, VOI_TABLES)), HEADER),
    "numbers of a window": (lambda: with_bytes(element(b"1\\" * ITEMS, WINDOW, b""), IMPLICIT), HEADER),
    "numbers of padding": (lambda: with_bytes(element(b"1\\" * ITEMS, PADDING, b""), IMPLICIT), HEADER),
    "deflated zeros": (
        lambda: with_bytes(bytes(1 << 20), DEFLATED, copies=300),
        "DICOM deflated data grows beyond a radiograph",
    ),
    "empty fragments": (lambda: fragments(0, ITEMS), "DICOM encapsulated pixel data in too many fragments"),
    "fragments": (lambda: fragments(1 << 16, 100), "DICOM compressed pixel data are larger than the picture"),
    "scans": (lambda: scans(1000), SCANS),
    "scans in a DICOM": (
        lambda: make(lines(np.uint8, 1, 64**2), syntax=uid.JPEGBaseline8Bit, frame=scans(1000)),
        SCANS,
    ),
    "tiles": (lambda: tiled(b"\xff\x51", 22, b"\0\0\0\1\0\0\0\1"), TILES),
    "layers": (lambda: tiled(b"\xff\x52", 6, b"\xff\xff"), TILES),
    "code-blocks": (lambda: cut(4000, 0), PARTS),
    "narrow code-blocks": (lambda: cut(8900, 0, 2), PARTS),
    "precincts": (lambda: cut(2000, 4, precincts=b"\x11"), PARTS),
    "larger precincts": (lambda: cut(8900, 4, precincts=b"\x22"), PARTS),
    "precincts of a component": (lambda: cut(4000, 4, precincts=b"\x22", marker=b"\xff\x53"), PARTS),
    "precincts of a tile": (
        lambda: cut(4000, 4, precincts=b"\x22", tile=True),
        "JPEG 2000 states another form of coding in a tile, as no radiograph does",
    ),
    "precincts of a component of a tile": (
        lambda: cut(4000, 4, precincts=b"\x22", marker=b"\xff\x53", tile=True),
        "JPEG 2000 states another form of coding in a tile, as no radiograph does",
    ),
    "comments": (lambda: segments(0xFE, ITEMS), JPEG_HEADER),
    "application data": (lambda: segments(0xE5, 500, bytes(65000)), JPEG_HEADER),
    "a text": (lambda: with_chunks(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 25)))), DAMAGED),
    "a profile": (lambda: with_chunks(chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 25)))), DAMAGED),
    "a large chunk": (lambda: with_chunks(chunk(b"prVt", bytes(1 << 26))), BESIDE),
    "chunks": (lambda: with_chunks(chunk(b"prVt", b"") * ITEMS), BESIDE),
}
LARGE = {  # of a number of pixels: the file, and bytes of its picture a pixel
    "RLE of single bytes": (partial(single_bytes, np.uint16), 2),
    "PNG": (lambda n: png(lines(np.uint8, 1, n)), 1),
    "PNG of 16 bits": (lambda n: png(lines(np.uint16, 1, n)), 2),
    "PNG of colour": (lambda n: png(lines(np.uint8, 3, n)), 3),
    "JPEG": (lambda n: by_opencv(lines(np.uint8, 1, n)), 1),
    "JPEG, progressive": (lambda n: jpeg(lines(np.uint8, 1, n), progressive=True), 1),
    "JPEG, progressive, of colour": (lambda n: jpeg(lines(np.uint8, 3, n), progressive=True, subsampling=0), 3),
    "JPEG of four colours": (lambda n: jpeg(lines(np.uint8, 3, n), "CMYK"), 4),
    "curve": (
        lambda n: native(
            np.uint16, 1, n, WindowCenter=99, WindowWidth=99, VOILUTFunction="SIGMOID", PixelPaddingValue=7
        ),
        2,
    ),
    "shifted": (lambda n: native(np.int16, 1, n, syntax=BIG, BitsStored=12, HighBit=15), 2),
    "32 bits": (
        lambda n: native(
            np.uint32, 1, n // 5, WindowCenter=99, WindowWidth=99, VOILUTFunction="SIGMOID", PixelPaddingValue=7
        ),
        0.8,
    ),
    "colour of 16 bits": (partial(native, np.uint16, 3), 6),
    "deflated": (partial(native, np.uint16, 1, syntax=DEFLATED), 2),
    "RGB JPEG": (
        lambda n: make(
            lines(np.uint8, 3, n), "RGB", syntax=uid.JPEGBaseline8Bit, frame=by_opencv(lines(np.uint8, 3, n))
        ),
        3,
    ),
    "lossless": (
        lambda n: coded(by_gdcm, np.uint16, n, uid.JPEGLosslessSV1, "JPEGLosslessProcess14_1", 16),
        2,
    ),
    "JPEG-LS": (lambda n: coded(by_gdcm, np.uint8, n, uid.JPEGLSLossless, "JPEGLSLossless", 8), 1),
    "JPEG 2000": (lambda n: coded(by_openjpeg, np.uint16, n, uid.JPEG2000Lossless, 16), 2),
    "JPEG 2000 of 8 bits": (lambda n: coded(by_openjpeg, np.uint8, n, uid.JPEG2000Lossless, 8), 1),
}


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def measured(path, short_side):
    data = Path(path).read_bytes()
    before, since = resident("VmRSS"), time.process_time()
    try:
        outcome = str(min(read_view(data, short_side)[0].shape))
    except ImageError as error:
        outcome = str(error)
    return [outcome, time.process_time() - since, resident("VmHWM") - before]


def work(short_side, paths):
    """Read some files, each in a fork of this process, after small files of each kind (for what is imported then)."""
    for name in ("PNG of 16 bits", "JPEG", "RGB JPEG", "JPEG-LS", "JPEG 2000", "deflated"):
        read_view(LARGE[name][0](4096))
    for path in paths:
        if not (child := os.fork()):
            print(json.dumps(measured(path, short_side)), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


@cache
def outcomes(folder, short_side, pixels, *names):
    """What came of the named files, as ``measured`` says."""
    paths = [folder / str(n) for n in range(len(names))]
    for path, name in zip(paths, names, strict=True):
        path.write_bytes(BOMBS[name][0]() if name in BOMBS else LARGE[name][0](pixels))
    command = [sys.executable, __file__, str(short_side), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for path in paths:
        path.unlink()
    return dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bombs")


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_within_the_limits(folder, name):
    reason, seconds, memory = outcomes(folder, 512, 0, *BOMBS)[name]
    assert reason == BOMBS[name][1]
    assert seconds < 5 and memory < 200_000_000


def within_the_limits(folder, short_side, pixels, names):
    found = outcomes(folder, short_side, pixels, *names)
    most = {name: 3 * LARGE[name][1] * pixels + 200_000_000 for name in names}
    assert {name: figures for name, figures in found.items() if figures[2] > most[name]} == {}
    assert all(outcome.isdigit() for outcome, *_ in found.values())


def test_large_pictures_take_three_times_their_size(folder):
    within_the_limits(folder, 0, MAX_PIXELS, ("32 bits",))
    within_the_limits(folder, 0, 40_000_000, ("PNG of 16 bits",))
    within_the_limits(folder, 512, 6_000_000, ("RLE of single bytes",))


@pytest.mark.drill
@pytest.mark.parametrize("short_side", [0, 512])
@pytest.mark.parametrize("name", LARGE)
def test_the_largest_pictures_take_three_times_their_size(folder, name, short_side):
    within_the_limits(folder, short_side, MAX_PIXELS, (name,))
    print(outcomes(folder, short_side, MAX_PIXELS, name))


@pytest.mark.parametrize("block", [(64, 64), (32, 32), (256, 16), (16, 16)])
@pytest.mark.parametrize("precinct", [None, (256, 256), (128, 128)])
def test_forms_of_jpeg_2000_that_encoders_have_are_read(block, precinct):
    image = Image.fromarray(lines(np.uint8, 1, 600**2))
    buffer = io.BytesIO()
    options = {"precinct_size": precinct} if precinct else {}
    image.save(buffer, "JPEG2000", no_jp2=True, codeblock_size=block, num_resolutions=6, irreversible=False, **options)
    read, *_ = read_view(make(np.asarray(image), syntax=uid.JPEG2000Lossless, frame=buffer.getvalue()))
    assert read.shape == (600, 600) and read[1, 1] == 255


def test_bytes_before_a_segment_are_not_copied(tmp_path):
    """A header, a fill byte before each segment, then zeros: 64 MB, of which none is held again."""
    path = tmp_path / "a.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0\x00\x02" + b"\xff\xff\xe0\x00\x02" * 50 + bytes(64 << 20))
    command = [sys.executable, __file__, "0", str(path)]
    outcome, seconds, memory = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert not outcome.isdigit() and seconds < 5
    assert memory < 2.2 * (64 << 20)  # its bytes, and Pillow's copy of them


if __name__ == "__main__":
    work(int(sys.argv[1]), sys.argv[2:])
