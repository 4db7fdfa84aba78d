"""What other people's archives may hold besides files: FIFOs, links, names that are none, damaged and endless packs."""

import csv
import gzip
import io
import os
import pickle
import random
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.archive_params import Source
from pipeline.ingest import sources
from pipeline.ingest.sources import SourceError, archive, open_archive, openi, read_archive, tables
from pipeline.storage import packs
from pipeline.storage.files import Files, FilesError

NOT_REGULAR, ODD = "not a regular file", "the name is not UTF-8, or has control characters"
OUT = "a link leads out of the archive; follow_links of its source allows that"


class LateError(BaseException):
    """No ``Exception``, which the code under test might take for its own."""


@contextmanager
def within(seconds):
    """An error in place of a wait without end."""

    def late(*_):
        raise LateError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def listed(root, **keys):
    return Files(root, root.with_name("cache"), **keys).walk()


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


# Files that are none


def test_only_regular_files_are_listed(root):
    (root / "a.png").write_bytes(b"1")
    os.mkfifo(root / "b.png")
    os.mkfifo(root / "c.zip")
    os.mkfifo(root / "d.tar.gz")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "e.png"))
        (root / "f.png").symlink_to("/dev/zero")
        with within(10):
            listing = listed(root, follow_links=True)
    assert listing.files == ("a.png",)
    assert dict(listing.problems) == dict.fromkeys(("b.png", "c.zip", "d.tar.gz", "e.png", "f.png"), NOT_REGULAR)
    assert listing.fingerprint == Files(root, "", follow_links=True).fingerprint()


def test_what_became_a_fifo_after_it_was_listed_is_not_waited_for(root):
    files = Files(root, root / "cache")
    os.mkfifo(root / "a.zip")
    with within(10):
        for look in (
            lambda: files.read("a.zip", 10),
            lambda: files.read("a.zip!/x", 10),
            lambda: files.stream("a.zip"),
            lambda: files.list_pack("a.zip"),
        ):
            with pytest.raises(FilesError, match=NOT_REGULAR):
                look()


def test_lists_and_reports_that_are_no_files_are_named(root):
    os.mkfifo(root / "fifo")
    os.mkfifo(root / "reports.zip")
    os.mkfifo(root / "Data_Entry_2017.csv")
    os.mkfifo(root / "images.csv")
    opened = open_archive("mimic_cxr", str(root), root.with_name("cache"))
    with within(10):
        for source in (
            Source("mimic_cxr", str(root), "", reports=str(root / "reports.zip")),
            Source("chestxray14", str(root), ""),
            Source("manifest", str(root), "", manifest="images.csv"),
        ):
            with pytest.raises(SourceError, match=NOT_REGULAR):
                list(read_archive(opened, source, 0))
        chexpert = Source("chexpert", str(root), "", list_5x200=str(root / "fifo"))
        with pytest.raises(SourceError, match="fifo not found"):
            sources.archive_notes(open_archive("chexpert", str(root), root.with_name("cache")), chexpert)
        with pytest.raises(SourceError, match="fifo not found"):
            sources.archive_fingerprint("chexpert", chexpert)


def test_links_are_followed_inside_and_elsewhere_only_if_asked(root):
    other = root.with_name("root2")  # of which "root" is a beginning
    (other / "deep").mkdir(parents=True)
    (other / "x.png").write_bytes(b"1")
    (other / "deep" / "y.png").write_bytes(b"1")
    (root / "in").mkdir()
    (root / "in" / "z.png").write_bytes(b"1")
    (root / "near.png").symlink_to(root / "in" / "z.png")
    (root / "far.png").symlink_to("../root2/x.png")
    (root / "chain.png").symlink_to(root / "far.png")
    (root / "folder").symlink_to(other / "deep")
    root.with_name("link").symlink_to(root)
    for place in (root, root.with_name("link")):
        inside = listed(place)
        assert inside.files == ("in/z.png", "near.png")
        assert dict(inside.problems) == dict.fromkeys(("chain.png", "far.png", "folder"), OUT)
        files = pickle.loads(pickle.dumps(Files(place, root.with_name("cache"), follow_links=True).absolute()))
        everything = files.walk()
        assert everything.files == ("chain.png", "far.png", "folder/y.png", "in/z.png", "near.png")
        assert everything.problems == () and everything.fingerprint == files.fingerprint() != inside.fingerprint
    near, far = (Source("chestxray14", str(root), "", follow_links=follow) for follow in (False, True))
    assert sources.archive_fingerprint("x", near) != sources.archive_fingerprint("x", far)


def test_a_cyclic_link_is_a_problem(root):
    (root / "a").symlink_to("b")
    (root / "b").symlink_to("a")
    assert [name for name, _ in listed(root).problems] == ["a", "b"]


# Names


def odd_zip(path, names):
    """A zip whose names are these bytes, and say that they are UTF-8."""
    stand_ins = ["n" * (len(name) - 2) + f"{i:02}" for i, name in enumerate(names)]
    with zipfile.ZipFile(path, "w") as pack:
        for name in stand_ins:
            pack.writestr(name, b"1")
    data = path.read_bytes()
    for stand_in, name in zip(stand_ins, names, strict=True):
        data = data.replace(stand_in.encode(), name)
    for start, flags in ((b"PK\x03\x04", 7), (b"PK\x01\x02", 9)):
        parts = data.split(start)
        data = start.join([parts[0], *(p[: flags - 4] + bytes([p[flags - 4] | 8]) + p[flags - 3 :] for p in parts[1:])])
    path.write_bytes(data)


def test_odd_names_are_problems_with_a_printable_form(root):
    raw = os.fsencode(root)
    for name in (b"caf\xe9.png", b"fold\xff/in.png", b"new\nline.png", "mätt.png".encode()):
        at = raw + b"/" + name
        os.makedirs(os.path.dirname(at), exist_ok=True)  # noqa: PTH103, PTH120
        Path(os.fsdecode(at)).write_bytes(b"1")
    with zipfile.ZipFile(os.fsdecode(raw + b"/pack\xe9.zip"), "w") as pack:
        pack.writestr("never.png", b"1")
    odd_zip(root / "b.zip", [b"b\xe9b.png", "mütt.png".encode(), b"tab\tt.png", b"cut.p\0g"])
    with tarfile.open(root / "c.tar", "w", format=tarfile.PAX_FORMAT, encoding="latin-1") as tar:
        for name in ("ok.png", "caf\xe9.png"):
            info = tarfile.TarInfo(name)
            tar.addfile(info)
        info = tarfile.TarInfo("x")
        info.pax_headers = {"path": "new\nline"}
        tar.addfile(info)
    data = (root / "c.tar").read_bytes()
    assert b"caf\xc3\xa9" in data  # a pax record
    (root / "c.tar").write_bytes(data.replace(b"caf\xc3\xa9", b"caf\xe9\xe9"))
    listing = listed(root)
    assert listing.files == ("b.zip!/mütt.png", "c.tar!/ok.png", "mätt.png")
    assert dict(listing.problems) == dict.fromkeys(
        [
            *(r"caf\xe9.png", r"fold\xff/in.png", r"new\x0aline.png", r"pack\xe9.zip"),
            *(r"b.zip!/b\xe9b.png", r"b.zip!/tab\x09t.png", r"b.zip!/cut.p\x00g"),
            *(r"c.tar!/caf\xe9\xe9.png", r"c.tar!/new\x0aline"),
        ],
        ODD,
    )
    files = Files(root, root.with_name("cache"))
    assert files.read("b.zip!/mütt.png", 9) == b"1" and files.read("c.tar!/ok.png", 9) == b""


def test_a_name_cut_at_nul_does_not_stand_for_another(root):
    odd_zip(root / "a.zip", [b"cut.png", b"cut.png\0other"])
    data = (root / "a.zip").read_bytes()
    listing = listed(root)
    assert listing.files == ("a.zip!/cut.png",) and data
    assert Files(root, root.with_name("cache")).read("a.zip!/cut.png", 9) == b"1"


# Packs


def test_zip_members_that_are_links_or_devices_are_refused(root):
    with zipfile.ZipFile(root / "a.zip", "w") as pack:
        for name, mode in (("file", stat.S_IFREG), ("plain", 0), ("link", stat.S_IFLNK), ("device", stat.S_IFCHR)):
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode | 0o644) << 16
            pack.writestr(info, b"/dev/zero")
    listing = listed(root)
    assert listing.files == ("a.zip!/file", "a.zip!/plain")
    assert listing.problems == (("a.zip!/device", NOT_REGULAR), ("a.zip!/link", NOT_REGULAR))


def with_method(path, method, content):
    """A zip of a good member, and of one that states a method of compression."""
    with zipfile.ZipFile(path, "w") as pack:
        pack.writestr("good", b"good")
        pack.writestr("odd", content)
    data = bytearray(path.read_bytes())
    for start, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.index(start, data.index(start) + 1) + offset
        data[at : at + 2] = struct.pack("<H", method)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("method", "named"), [(8, ""), (9, "deflate64"), (12, "bzip2"), (14, "LZMA"), (93, "Zstandard"), (99, "method 99")]
)
def test_a_member_that_no_decompressor_reads_is_a_reason(root, method, named):
    for name, content in (("a.zip", b"\x09\x14\x05\0" + random.Random(1).randbytes(999)), ("b.zip", b"\x09\x14\x05")):
        with_method(root / name, method, content)
        found, files = dict(listed(root).problems), Files(root, root.with_name("cache"))
        assert files.read(f"{name}!/good", 9) == b"good"
        if named:
            said = f"compressed with {named}, which is not read; unpack the packed file, or pack it with deflate"
            assert found[f"{name}!/odd"] == said
        with pytest.raises(FilesError, match=r"file cannot be read \(\w+\)|packed file is damaged"):
            files.read(f"{name}!/odd", 1 << 20)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_small_member_of_a_zip_is_never_unpacked_at_once(root, method):
    """zipfile holds all that a piece of the packed bytes unpacks to before it compares that with the stated size."""
    with zipfile.ZipFile(root / "a.zip", "w", method) as pack:
        pack.writestr("a.csv", bytes(32 << 20))
        pack.filelist[0].file_size = 1000

    def look():
        listed(root)
        files = Files(root, root.with_name("cache"))
        with pytest.raises(FilesError):
            files.read("a.zip!/a.csv", 1 << 30)
        with suppress(FilesError, zipfile.BadZipFile):
            files.stream("a.zip!/a.csv")[0].read(100)

    assert peak(look)[1] < 4 << 20


def header(name, kind, size, body=b"", more=b""):
    """A tar's header, with bytes at the place of a sparse file's map, and what follows it."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[386 : 386 + len(more)] = more
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data)
    return bytes(data) + body + bytes(-len(body) % 512)


def pax(record, kind=tarfile.XHDTYPE):
    return header("x", kind, len(record), record)


GOOD = header("a", tarfile.REGTYPE, 3, b"abc")
TOO_LARGE = "packed file has larger headers than any archive of images"
BACKWARDS = "packed file is damaged (a member's size is below 0)"
MAP = bytes(96) + b"\1"  # goes on in blocks whose byte 504 says so, too
TAR_BOMBS = {
    "a name": (header("x", tarfile.GNUTYPE_LONGNAME, 16 << 20, bytes(16 << 20)), TOO_LARGE),
    "a record": (pax(bytes(16 << 20)), TOO_LARGE),
    "names": (header("x", tarfile.GNUTYPE_LONGNAME, 1 << 18, bytes(1 << 18)) * 30, TOO_LARGE),
    "a record for all": (pax(bytes(16 << 20), tarfile.XGLTYPE), TOO_LARGE),
    "records for all": (
        b"".join(pax(b"13 k%06d=v\n" % n, tarfile.XGLTYPE) + GOOD for n in range(1100)),
        TOO_LARGE,
    ),
    "large records for all": (
        b"".join(pax(b"600009 k%d=" % n + b"v" * 599_998 + b"\n", tarfile.XGLTYPE) + GOOD for n in range(3)),
        TOO_LARGE,
    ),
    "a map": (header("x", tarfile.GNUTYPE_SPARSE, 0, (bytes(504) + b"\1" + bytes(7)) * 9999, MAP), TOO_LARGE),
    "digits": (pax(b"1" * 80_000), TOO_LARGE),
    "a size that leads back": (pax(b"14 size=-1536\n"), BACKWARDS),
    "a size below 0": (header("b", tarfile.REGTYPE, -1024), BACKWARDS),
    "a name's size below 0": (header("b", tarfile.GNUTYPE_LONGNAME, -1024), TOO_LARGE),
}


@pytest.mark.parametrize("kind", TAR_BOMBS)
def test_headers_of_a_tar_without_an_end_are_refused(root, kind):
    content, reason = TAR_BOMBS[kind]
    (root / "a.tgz").write_bytes(gzip.compress(GOOD + content + GOOD + bytes(1024), 1))
    with within(20):
        listing, most = peak(lambda: listed(root))
    assert listing.files == () and listing.problems == (("a.tgz", reason),)
    assert most < 8 << 20


def test_a_long_name_and_many_digits_of_a_tar_are_read_as_ever(root):
    names = ["9" * 250, "n" * 3000, "1." * 2000 + "ä"]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(root / f"{format}.tar", "w", format=format, pax_headers={"comment": "for all"}) as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
    listing = listed(root)
    assert listing.problems == () and sorted(listing.files) == sorted(f"{f}.tar!/{n}" for f in (1, 2) for n in names)


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_more_members_than_any_archive_has_are_refused(root, suffix, monkeypatch):
    if suffix == "zip":
        with zipfile.ZipFile(root / "a.zip", "w") as pack:
            for n in range(4):
                pack.writestr(str(n), b"")
    else:
        (root / "a.tar").write_bytes(GOOD * 4 + bytes(1024))
    assert listed(root).files
    monkeypatch.setattr(packs, "MAX_MEMBERS", 3)
    listing = Files(root, root.with_name("other")).walk()
    assert listing.problems == ((f"a.{suffix}", "packed file has more members than any archive of images"),)


def test_what_a_tar_keeps_of_its_members_is_small(root):
    (root / "a.tar").write_bytes(b"".join(pax(b"9000 k=" + b"v" * 8992 + b"\n") + GOOD for _ in range(600)))
    assert peak(lambda: listed(root))[1] < 4 << 20


def test_hard_links_of_a_tar_are_counted_with_what_to_do(root):
    (root / "a.tar").write_bytes(GOOD + header("b", tarfile.LNKTYPE, 0) + bytes(1024))
    listing = listed(root)
    assert listing.files == ("a.tar!/a",)
    reason = "a hard link to another member, which is not followed; unpack the packed file"
    assert listing.problems == (("a.tar!/b", reason),)


def test_a_member_has_the_name_that_the_directory_says(root):
    """Also where a further field (0x7075, of Info-ZIP) says another, or what zipfile makes of it is a folder's."""
    odd_zip(root / "b.zip", [b"folder/\0x"])
    with zipfile.ZipFile(root / "a.zip", "w") as pack:
        info = zipfile.ZipInfo("name")
        said = b"\1" + struct.pack("<I", zlib.crc32(b"name")) + b"other/"
        info.extra = struct.pack("<2H", 0x7075, len(said)) + said
        pack.writestr(info, b"1")
    (root / "c.tar").write_bytes(header("./", tarfile.REGTYPE, 0) + bytes(1024))
    listing = listed(root)
    assert listing.files == ("a.zip!/name",)
    assert listing.problems == (("b.zip!/folder/\\x00x", ODD), ("c.tar", "a member of the packed file has no name"))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tgz"])
def test_damage_of_any_kind_is_a_problem_or_a_reason(root, suffix):
    """Bytes changed, removed and repeated at random, most often where the pack's directory is."""
    plain = root.with_name(f"whole.{suffix}")
    if suffix == "zip":
        with zipfile.ZipFile(plain, "w", zipfile.ZIP_DEFLATED) as pack:
            for n in range(3):
                pack.writestr(f"päth/{n}", bytes(50 * n))
    else:
        with tarfile.open(plain, "w:gz" if suffix == "tgz" else "w") as tar:
            for n in range(3):
                info = tarfile.TarInfo(f"päth/{n}")
                info.size = 50 * n
                tar.addfile(info, io.BytesIO(bytes(info.size)))
    whole, rng = plain.read_bytes(), random.Random(0)
    outcomes = set()
    for number in range(120):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randint(1, 30)]
                case _:
                    data[at:at] = data[max(0, at - 20) : at]
        (root / f"{number}.{suffix}").write_bytes(data)
    listing = listed(root)
    files = Files(root, root.with_name("cache"))
    outcomes = {why.partition(" (")[0] for _, why in listing.problems}
    for name in listing.files:
        try:
            files.read(name, 1 << 16)
        except FilesError as error:
            outcomes.add(str(error).partition(" (")[0])
    assert "packed file is damaged" in outcomes


def test_a_tar_that_is_damaged_in_its_middle_says_so(root):
    with tarfile.open(root / "a.tar", "w") as tar:
        for name in ("a", "b", "c"):
            tar.addfile(tarfile.TarInfo(name))
    data = bytearray((root / "a.tar").read_bytes())
    data[512:600] = b"\x01" * 88
    (root / "a.tar").write_bytes(data)
    listing = listed(root)
    assert listing.files == ("a.tar!/a",)
    assert listing.problems == (
        ("a.tar", "packed file is damaged in its middle; the members after that are not known"),
    )


@pytest.mark.parametrize("suffix", ["zip", "tar"])
def test_of_two_members_of_one_name_the_last_counts(root, suffix):
    if suffix == "zip":
        with zipfile.ZipFile(root / "a.zip", "w") as pack, pytest.warns(UserWarning, match="Duplicate"):
            for content in (b"first", b"last"):
                pack.writestr("a", content)
    else:
        with tarfile.open(root / "a.tar", "w") as tar:
            for content in (b"first", b"last"):
                info = tarfile.TarInfo("./a" if content == b"last" else "a")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    listing = listed(root)
    assert listing.files == (f"a.{suffix}!/a",)
    assert listing.problems == (
        (f"a.{suffix}!/a", "another member of the packed file has this name, too; the last one counts"),
    )
    assert Files(root, root.with_name("cache")).read(f"a.{suffix}!/a", 9) == b"last"


def test_members_that_share_bytes_or_state_what_cannot_be_are_damage(root):
    with zipfile.ZipFile(root / "a.zip", "w", zipfile.ZIP_DEFLATED) as pack:
        for n in range(4):
            pack.writestr(str(n), bytes(9999))
        for info in pack.filelist:
            info.header_offset = 0
        pack._didModify = True
    with zipfile.ZipFile(root / "b.zip", "w", zipfile.ZIP_DEFLATED) as pack:
        pack.writestr("0", b"")
        pack.writestr("1", bytes(99))
        pack.filelist[1].file_size = 1 << 31
    listing = listed(root)
    assert listing.files == ("b.zip!/0",)
    assert listing.problems == (
        ("a.zip", "packed file is damaged (its members overlap)"),
        ("b.zip!/1", "its stated size is impossible"),
    )


def peak(action):
    """What an action returns, and the most memory it held, in bytes."""
    tracemalloc.start()
    try:
        result = action()
        return result, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_a_zip_is_in_memory_once(root, method):
    content = np.random.default_rng(0).bytes(12 << 20)
    with zipfile.ZipFile(root / "a.zip", "w", method, compresslevel=1) as pack:
        pack.writestr("a", content)
    files = Files(root, root / "cache")
    data, most = peak(lambda: files.read("a.zip!/a", 1 << 30))
    assert data == content and most < 1.5 * len(content)


# Tables


@pytest.fixture
def small(monkeypatch):
    """Limits that a small file reaches."""
    for name, value in (("MAX_UNPACKED", 4 << 20), ("MAX_ROW", 1 << 20), ("MAX_EMPTY", 1 << 16), ("CHUNK", 1 << 16)):
        monkeypatch.setattr(tables, name, value)


def rows_of(root, name):
    files = Files(root, root.with_name("cache"))
    return tables.read_rows("siim", files, name, ["a"])


HEAD = b"a,b\n"
ENDLESS = {
    "zeros": bytes(1 << 20),
    "empty rows": b"\n" * (1 << 20),
    "rows": b"1,2\n" * (1 << 18),
    "latin-1": b"\xe9,2\n" * (1 << 18),
}


@pytest.mark.parametrize("suffix", ["gz", "zip"])
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_table_that_unpacks_to_no_end_is_refused_before_its_first_row(root, kind, suffix, small):
    name = f"t.csv.{suffix}"
    content = HEAD + 9 * ENDLESS[kind]
    if suffix == "gz":
        (root / name).write_bytes(gzip.compress(content))
    else:
        with zipfile.ZipFile(root / name, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("t.csv", content)
    with within(20), pytest.raises(SourceError, match="unpacks to more than") as error:
        listed(root)
        next(rows_of(root, f"{name}!/t.csv" if suffix == "zip" else name))
    assert "\n" not in str(error.value)


def test_rows_without_an_end_are_damage(root, small):
    for content in (b"x" * (2 << 20), b'1,"' + b"x\n" * (1 << 20), b"\n" * (1 << 18), b'"\n",' * (1 << 20)):
        (root / "t.csv").write_bytes(HEAD + content)
        with (
            within(20),
            pytest.raises(SourceError, match=r"without an end|a quote in a cell"),
        ):
            list(rows_of(root, "t.csv"))


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_tables_are_read_in_little_memory_and_their_encoding_is_that_of_the_whole(root, name, encoding, small):
    """A letter at the end alone tells the encoding."""
    text = "a,b\r\n" + "1,2\r\n" * 100 + '"x\ry","Ã¤"\r\n' + "3,44444444444444\n" * (1 << 17) + "ä,ö"
    data = text.encode(encoding)
    (root / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    expected = csv.reader(io.StringIO(text, newline=""))
    next(expected)
    assert all([*row.values()] == cells for row, cells in zip(rows_of(root, name), expected, strict=True))
    _, most = peak(lambda: next(rows_of(root, name)))
    assert most < 1 << 20 < len(data)


def manifest(root):
    opened = open_archive("mine", str(root), root.with_name("cache"))
    return read_archive(opened, Source("manifest", str(root), "", manifest="m.parquet"), 0)


def test_a_manifest_that_unpacks_to_no_end_is_refused(root):
    many = pa.table({"image": pa.DictionaryArray.from_arrays(np.zeros(3_000_000, np.int32), pa.array(["x.png"]))})
    large = pa.table({"image": [f"{n}{'x' * (1 << 20)}" for n in range(70)]})
    for table, options in ((many, {}), (large, {"use_dictionary": False})):
        pq.write_table(table, root / "m.parquet", compression="zstd", **options)
        with within(20), pytest.raises(SourceError, match="unpacks to more than any list of images"):
            next(manifest(root))


def test_a_manifest_that_says_more_parts_than_it_holds_takes_no_memory(root):
    """The list of a row group's columns in the footer (Thrift's compact protocol): 1 said to be 999,999."""
    pq.write_table(pa.table({"image": ["x.png"]}), root / "m.parquet", store_schema=False)
    data = (root / "m.parquet").read_bytes()
    start = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    one = b"\x19\x1c\x19\x1c"  # a list of one row group, whose first field is a list of one column
    assert data.count(one, start) == 1
    footer = data[start:-8].replace(one, b"\x19\x1c\x19\xfc\xbf\x84\x3d")
    (root / "m.parquet").write_bytes(data[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    code = (
        "import re, sys; from test_untrusted import Path, manifest, SourceError\n"
        "def most(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = most()\n"
        "try: list(manifest(Path(sys.argv[1])))\n"
        "except SourceError as error: print('damaged' in str(error), most() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, root],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    said, grown = done.stdout.split()
    assert said == "True" and int(grown) < 100_000  # kB


def test_a_text_that_a_manifest_holds_once_is_in_memory_once(root):
    report = "FINDINGS: clear. " + " " * (8 << 20)
    notes = pa.DictionaryArray.from_arrays(np.zeros(3000, np.int32), [report])
    table = pa.table({"image": [f"{n}.png" for n in range(3000)], "note": notes})
    pq.write_table(table, root / "m.parquet", store_schema=False)  # to who reads it, plain text
    studies, most = peak(lambda: list(manifest(root)))
    assert len(studies) == 3000 and most < 100 << 20


# what is small and would take for ever


def test_rows_that_lack_most_columns_are_no_table(tmp_path):
    """31 kB would be 60 million cells; a few short rows are read as ever."""
    header = ["image", *(f"c{n}" for n in range(8000))]
    for rows, well in ((50, True), (7500, False)):
        (tmp_path / "m.csv").write_text(",".join(header) + "\n" + "x\n" * rows)
        found = tables.read_rows("mine", Files(str(tmp_path), tmp_path / "cache"), "m.csv", ["image"])
        if well:
            assert [(row["image"], row["c7999"]) for row in found] == [("x", "")] * rows
        else:
            with within(5), pytest.raises(SourceError, match="rows have far fewer cells than its first one"):
                list(found)


def test_a_long_text_that_every_row_says_costs_once(tmp_path):
    long, longer = "FINDINGS: Clear. " * 5000, "x" * (archive.MAX_REPORT + 1)
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 3000 + [1] * 3000, pa.int32()), pa.array([long, longer]))
    table = pa.table({"image": [f"{n}.png" for n in range(6000)], "report": texts})
    pq.write_table(table, tmp_path / "m.parquet", compression="zstd")
    source = Source("manifest", str(tmp_path), "", manifest="m.parquet")
    with within(20):
        found = list(read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0))
    rejects = [item.reason for item in found if not hasattr(item, "views")]
    assert rejects == ["a text is too large to be a report"] * 3000 and len(found) == 6000


def test_a_study_of_very_many_images_is_read(tmp_path):
    with (tmp_path / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "study"], *([f"{n}.png", "s"] for n in range(60_000))])
    source = Source("manifest", str(tmp_path), "", manifest="m.csv")
    with within(20):
        (study,) = read_archive(open_archive("mine", source.path, tmp_path / "cache"), source, 0)
    assert len(study.views) == 60_000


def test_texts_in_one_another_are_looked_at_once(tmp_path):
    deep = '<AbstractText Label="x">' * 900 + "a" * 100_000 + "</AbstractText>" * 900
    said = '<AbstractText Label="Findings">Clear.</AbstractText><AbstractText Label="FINDINGS">No.</AbstractText>'
    xml = f'<r><Abstract>{deep}{said}</Abstract><parentImage id="CXR1_1_IM-0001-3001"/></r>'
    with within(5):
        study = openi._study("openi", "1.xml", "test", xml.encode())
    assert (study.findings, study.impression) == ("Clear.", None)
