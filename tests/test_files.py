import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from pipeline.storage import files as files_module
from pipeline.storage.files import Files, FilesError, Gone, decode_text

CONTENT = {f"folder/{n:03}.bin": np.random.default_rng(n).bytes(20_000 + n) for n in range(40)}


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


def packed(path, mode):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in CONTENT.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, mode) as tar:
            for name, data in CONTENT.items():
                add(tar, f"./{name}", data)


@pytest.mark.parametrize(("name", "mode"), [("a.zip", ""), ("a.tar", "w"), ("a.tar.gz", "w:gz"), ("a.tgz", "w:gz")])
def test_packed_files_are_read_in_place_in_any_order(tmp_path, name, mode):
    (tmp_path / "root" / "deep").mkdir(parents=True)
    packed(tmp_path / "root" / "deep" / name, mode)
    (tmp_path / "root" / "loose.txt").write_bytes(b"here")
    files = Files(tmp_path / "root", tmp_path / "cache")
    listing = files.walk()
    assert listing.files == tuple(sorted(["loose.txt", *(f"deep/{name}!/{n}" for n in CONTENT)]))
    assert listing.problems == ()
    there = pickle.loads(pickle.dumps(files))  # as another process gets it
    for n in np.random.default_rng(0).permutation(len(CONTENT)):
        member = list(CONTENT)[n]
        assert there.read(f"deep/{name}!/{member}", 1 << 20) == CONTENT[member]
    assert there.read("loose.txt", 4) == b"here"
    assert sorted(p.name for p in (tmp_path / "root").rglob("*") if p.is_file()) == [name, "loose.txt"]


def test_what_is_too_large_is_refused_whatever_its_directory_says(tmp_path):
    packed(tmp_path / "a.zip", "")
    packed(tmp_path / "a.tar", "w")
    (tmp_path / "loose").write_bytes(bytes(101))
    files = Files(tmp_path, tmp_path / "cache")
    files.walk()
    for name in ("a.zip!/folder/000.bin", "a.tar!/folder/000.bin", "loose"):
        with pytest.raises(FilesError, match="too large"):
            files.read(name, 100)


def test_a_pack_that_changed_is_listed_again(tmp_path):
    (tmp_path / "root").mkdir()
    packed(tmp_path / "root" / "a.tar", "w")
    files = Files(tmp_path / "root", tmp_path / "cache")
    before = files.walk()
    with tarfile.open(tmp_path / "root" / "a.tar", "w") as tar:
        add(tar, "other", b"1")
    after = files.walk()
    assert after.files == ("a.tar!/other",)
    assert before.fingerprint != after.fingerprint == files.walk().fingerprint


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_a_tar_that_changed_since_it_was_listed_is_not_read_by_its_old_places(tmp_path, name):
    """Not even by a process that listed nothing, and no member of it is rejected for that."""
    (tmp_path / "root").mkdir()
    packed(tmp_path / "root" / name, "w:gz" if name == "a.tgz" else "w")
    files = Files(tmp_path / "root", tmp_path / "cache")
    (first, *_) = files.walk().files
    with tarfile.open(tmp_path / "root" / name, "w:gz" if name == "a.tgz" else "w") as tar:
        for n in range(len(CONTENT)):
            add(tar, str(n), bytes(30_000))
    for look in (lambda: files.read(first, 1 << 20), lambda: files.stream(first)):
        with pytest.raises(Gone, match=rf"/root/{name} has changed since it was listed$"):
            look()
    files.walk()
    assert files.read(f"{name}!/7", 1 << 20) == bytes(30_000)


def test_archives_that_share_a_cache_keep_their_own_places(tmp_path):
    """Of tars of one name, size and time of change."""
    for n in range(2):
        (tmp_path / str(n)).mkdir()
        with tarfile.open(tmp_path / str(n) / "a.tar", "w") as tar:
            add(tar, f"member {n}", b"%d" % n)
        os.utime(tmp_path / str(n) / "a.tar", ns=(1, 1))
    both = [Files(tmp_path / str(n), tmp_path / "cache") for n in range(2)]
    assert [files.walk().files for files in both] == [("a.tar!/member 0",), ("a.tar!/member 1",)]
    assert [files.read(f"a.tar!/member {n}", 9) for n, files in enumerate(both)] == [b"0", b"1"]


@pytest.mark.parametrize("name", ["a.tar", "a.tgz"])
def test_no_byte_of_the_kept_places_changes_what_is_read(tmp_path, name, capfd):
    (tmp_path / "root").mkdir()
    with tarfile.open(tmp_path / "root" / name, "w:gz" if name == "a.tgz" else "w") as tar:
        add(tar, "1", b"content")
    files = Files(tmp_path / "root", tmp_path / "cache")
    listing = files.walk()
    for kept in (tmp_path / "cache").iterdir():
        whole = kept.read_bytes()
        for at in {*range(0, len(whole), 1 + len(whole) // 60), len(whole) - 1}:
            kept.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            files_module._open_pack.cache_clear()
            with pytest.raises(Gone, match="damaged"):
                files.read(f"{name}!/1", 9)
            assert files.walk() == listing and "damaged: starting anew" in capfd.readouterr().err
    assert files.read(f"{name}!/1", 9) == b"content"


def test_a_link_that_takes_a_files_place_after_it_was_listed_is_not_followed_out(tmp_path):
    root, secret = tmp_path / "root", tmp_path / "secret"
    (root / "in").mkdir(parents=True)
    packed(secret.with_suffix(".zip"), "")
    (root / "in" / "x").write_bytes(b"inside")
    for name, target in (("out", secret.with_suffix(".zip")), ("near", "in/x"), ("chain", "out"), ("p.zip", "out")):
        (root / name).symlink_to(target)
    files, free = (Files(root, tmp_path / "cache", follow_links=follows) for follows in (False, True))
    assert files.read("near", 9) == b"inside"
    for name in ("out", "chain", "p.zip!/folder/000.bin"):
        assert free.read(name, 1 << 30)
        with pytest.raises(FilesError, match="a link leads out of the archive"):
            files.read(name, 1 << 30)
        with pytest.raises(FilesError, match="a link leads out of the archive"):
            files.stream(name)


def test_the_fingerprint_is_of_names_sizes_and_times(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").write_bytes(b"1")
    prints = [Files(root, tmp_path).walk().fingerprint]
    os.utime(root / "a", ns=(1, 1))
    prints.append(Files(root, tmp_path).walk().fingerprint)
    (root / "a").rename(root / "b")
    prints.append(Files(root, tmp_path).walk().fingerprint)
    (root / "c").write_bytes(b"")
    prints.append(Files(root, tmp_path).walk().fingerprint)
    assert len(set(prints)) == 4


def test_links_are_followed_but_never_in_a_circle(tmp_path):
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_bytes(b"1")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "a" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "nowhere").symlink_to(tmp_path / "nothing")
    listing = Files(tmp_path / "root", tmp_path / "cache", follow_links=True).walk()
    assert listing.files == ("link/x",)
    assert dict(listing.problems) == {
        "a/up": "a link leads back to a folder that is listed already",
        "nowhere": "file cannot be read (FileNotFoundError)",
    }


def test_members_that_leave_the_pack_or_are_no_files_are_not_listed(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "../up.txt", b"1")
        add(tar, "/etc/absolute", b"1")
        add(tar, "fine/in.txt", b"1")
        add(tar, "link", b"", type=tarfile.SYMTYPE, linkname="/etc/hostname")
        add(tar, "device", b"", type=tarfile.CHRTYPE)
    listing = Files(tmp_path, tmp_path / "cache").walk()
    assert [f for f in listing.files if not f.startswith("cache")] == ["a.tar!/fine/in.txt"]
    assert listing.problems == (
        ("a.tar!/../up.txt", "a member's name leaves the packed file"),
        ("a.tar!//etc/absolute", "a member's name leaves the packed file"),
        ("a.tar!/device", "not a regular file"),
        ("a.tar!/link", "not a regular file"),
    )


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_a_damaged_pack_is_a_problem_and_not_an_end(tmp_path, name):
    packed(tmp_path / name, "w:gz" if name.endswith("gz") else "w")
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 3] if name != "a.tar" else b"garbage" * 500)
    (tmp_path / "loose").write_bytes(b"1")
    listing = Files(tmp_path, tmp_path / "cache").walk()
    assert "loose" in listing.files
    ((problem, reason),) = listing.problems
    assert problem == name and "packed file is damaged" in reason


def test_what_a_pack_says_often_is_said_once(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(1000):
            tar.addfile(tarfile.TarInfo("x.png"))
            tar.addfile(tarfile.TarInfo("../y.png"))
    assert len(Files(tmp_path, tmp_path / "cache").walk().problems) == 2


def test_an_encrypted_member_says_so(tmp_path):
    packed(tmp_path / "a.zip", "")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[6] |= 1  # general purpose flag of the first local header ...
    data[data.index(b"PK\x01\x02") + 8] |= 1  # ... and of the first entry of the directory
    (tmp_path / "a.zip").write_bytes(bytes(data))
    with pytest.raises(FilesError, match="encrypted"):
        Files(tmp_path, tmp_path / "cache").read("a.zip!/folder/000.bin", 1 << 20)


def test_a_file_that_cannot_be_read_and_an_archive_that_is_gone(tmp_path):
    (tmp_path / "root").mkdir()
    files = Files(tmp_path / "root", tmp_path / "cache")
    with pytest.raises(FilesError, match="file missing"):
        files.read("none", 10)
    (tmp_path / "root").rmdir()
    with pytest.raises(Gone):
        files.read("none", 10)


def test_permission_denied_is_a_reason(tmp_path, monkeypatch):
    for name in ("open", "closed"):
        (tmp_path / "root" / name).mkdir(parents=True)
        (tmp_path / "root" / name / "x").write_bytes(b"1")
    scan = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)  # root may look into any folder, so the system would not refuse here
    listing = Files(tmp_path / "root", tmp_path / "cache").walk()
    assert listing.files == ("open/x",)
    assert listing.problems == (("closed", "folder cannot be read (PermissionError)"),)


def test_text_of_any_encoding_people_meet():
    assert (
        decode_text("é".encode())
        == decode_text(b"\xef\xbb\xbf" + "é".encode())
        == decode_text("é".encode("latin-1"))
        == "é"
    )
    assert (
        decode_text("5 mm “nodule”".encode("cp1252"))
        == decode_text("5 mm “nodule”".encode("utf-16"))
        == "5 mm “nodule”"
    )
    assert decode_text(b"a\x81\xff") == "a\ufffdÿ"  # no letter of cp1252


@pytest.mark.parametrize("name", ["a.tar", "a.zip"])
def test_a_pack_that_is_written_over_while_it_is_open_is_not_read(tmp_path, name):
    """In place, so that the file that is open is the one that changes: a place is then another member's."""

    def content(order):
        out = io.BytesIO()
        if name.endswith(".tar"):
            with tarfile.open(fileobj=out, mode="w") as tar:
                for letter in order:
                    add(tar, letter, letter.encode() * 5000)
        else:
            with zipfile.ZipFile(out, "w") as archive:
                for letter in order:
                    archive.writestr(letter, letter * 5000)
        return out.getvalue()

    pack = tmp_path / "in" / name
    pack.parent.mkdir()
    pack.write_bytes(content("ab"))
    files = Files(str(pack.parent), tmp_path / "cache")
    files.walk()
    assert files.read(f"{name}!/a", 1 << 20) == b"a" * 5000
    with pack.open("r+b") as file:
        file.write(content("ba"))
    os.utime(pack, ns=(1, 1))
    with pytest.raises(Gone, match="has changed since it was opened"):
        files.read(f"{name}!/a", 1 << 20)
