"""What a disk or a URL refuses, through every library that writes: one line with path and cure, never a trace."""

import errno
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fake_results import SMALL, make, params, save_params
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

import stages
from pipeline.evaluation.store import write_missing
from pipeline.phantom.archives import write_archive
from pipeline.storage.atomic import emptied, replacing, write_text
from pipeline.storage.files import file_system

ROOT = Path(__file__).parents[1]


def many_words(path):
    words = Tokenizer(models.BPE())
    words.add_tokens([f"token {i}" for i in range(5000)])
    words.save(str(path))


def table(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")
        connection.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 400)
        connection.commit()


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, a=np.arange(40_000))


WRITERS = {
    "text": lambda path: path.write_text("x" * 200_000),
    "npz": arrays,
    "parquet": lambda path: pq.write_table(pa.table({"a": np.arange(40_000)}), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(40_000)}, path),
    "torch": lambda path: torch.save({"a": torch.zeros(40_000)}, path),
    "tokenizer": many_words,
    "sqlite": table,
}


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    """Away from this repository, whose folders a stage closes to others, and with the umask as it was afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 KiB, and how to mount it again."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)), capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    yield place, lambda how: subprocess.run(("mount", "-o", f"remount,{how}", str(place)), check=True)
    subprocess.run(("umount", "--lazy", str(place)), check=True)


def ended(monkeypatch, main, *words):
    """The line a stage ends with."""
    monkeypatch.setattr(sys, "argv", ["stages.some", *words])
    with pytest.raises(SystemExit) as end:
        stages.run("some", main)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize("library", WRITERS)
def test_a_full_disk_is_one_line_and_what_was_there_stays(monkeypatch, disk, library):
    place, _ = disk
    (place / "out").write_bytes(b"whole")

    def main():
        with replacing(place / "out") as partial:
            WRITERS[library](partial)

    said = ended(monkeypatch, main)
    why = os.strerror(errno.EIO if library == "torch" else errno.ENOSPC)  # torch does not say what the system said
    assert said.startswith(f"some: {place / 'out'}: {why}; ") and said.endswith(", then run again")
    assert [file.name for file in place.iterdir()] == ["out"] and (place / "out").read_bytes() == b"whole"


@pytest.mark.parametrize("library", sorted(WRITERS.keys() - {"torch", "sqlite"}))
def test_a_full_disk_is_one_line_where_a_file_is_written_in_place(monkeypatch, disk, library):
    place, _ = disk
    said = ended(monkeypatch, lambda: WRITERS[library](place / "own"))
    assert os.strerror(errno.ENOSPC) in said and said.endswith("make room on that disk, then run again")


@pytest.mark.parametrize(
    "write",
    [
        lambda place: write_text(place / "new" / "a.txt", "x"),
        lambda place: write_text(place / "there" / "a.txt", "x"),
        lambda place: write_missing(place / "there", "no weights"),
        lambda place: emptied(place / "there"),
        lambda place: write_archive("rsna", place / "rsna", 20, 64, 0, workers=1),
        *(lambda place, name=name: WRITERS[name](place / "there" / "x") for name in WRITERS if name != "sqlite"),
    ],
)
def test_a_read_only_disk_is_one_line(monkeypatch, disk, write):
    place, mounted = disk
    write_text(place / "there" / "b.txt", "x")
    mounted("ro")
    said = ended(monkeypatch, lambda: write(place))
    assert str(place) in said or "a file below" in said
    assert said.endswith(", then run again")


def test_a_file_where_a_folder_has_to_be_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "data").write_text("x")
    for write in (
        lambda: write_text(tmp_path / "data" / "a.txt", "x"),
        lambda: write_text(tmp_path / "data" / "b" / "a.txt", "x"),
        lambda: emptied(tmp_path / "data"),
        lambda: (tmp_path / "data").mkdir(),
        lambda: np.savez(tmp_path / "data" / "x.npz", a=np.zeros(3)),
    ):
        said = ended(monkeypatch, write)
        assert said.startswith(f"some: {tmp_path / 'data'}") and "move it away, then run again" in said


def test_a_folder_of_somebody_else_is_one_line():
    """As a user who may not write there; root may always."""
    code = (
        "import os, sys; from pathlib import Path; import stages; from pipeline.storage.atomic import write_text\n"
        "os.geteuid() or os.seteuid(65534)\n"
        "sys.argv = ['some']; stages.run('some', lambda: write_text(Path(os.environ['PLACE']) / 'a.txt', 'x'))"
    )
    with tempfile.TemporaryDirectory() as name:  # pytest's own are for their owner alone, up to the root
        Path(name).chmod(0o755)
        locked = Path(name, "locked")
        locked.mkdir(mode=0o555)
        # A repository of its own: that of this code may be open to others, which is said in a line more.
        env = {**os.environ, "DVC_ROOT": name, "PLACE": str(locked), "PYTHONPATH": str(ROOT)}
        done = subprocess.run((sys.executable, "-c", code), cwd=name, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"some: {locked / 'a.txt'}: Permission denied; give this user the right to it")
    assert done.stderr.count("\n") == 1


def test_what_is_no_fault_of_the_disk_keeps_its_trace(monkeypatch):
    """Bugs show, also those met while a missing file was handled; text that only speaks of a disk is no refusal."""

    def after(kind):
        try:
            Path("nowhere").read_text()
        except FileNotFoundError:
            raise kind("of ours") from None

    def met():
        try:
            Path("nowhere").read_text()
        except FileNotFoundError:
            {}["key"]

    monkeypatch.setattr(sys, "argv", ["stages.some"])
    for bug, kind in (
        (lambda: after(TypeError), TypeError),
        (met, KeyError),
        (lambda: torch.zeros(2) @ torch.zeros(3), RuntimeError),
        (lambda: (_ for _ in ()).throw(Exception("No space left on device, says a report")), Exception),
    ):
        with pytest.raises(kind):
            stages.run("some", bug)


def test_the_first_refusal_is_told_though_the_record_of_the_run_could_not_be_kept_either(monkeypatch, tmp_path):
    def main():
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "data/results/a.json")
        finally:
            raise OSError(errno.ENOSPC, "No space left on device", "state/tracking/1/record.json")

    assert ended(monkeypatch, main).startswith("some: data/results/a.json: No space left on device; ")


@pytest.mark.parametrize("url", ["foo://bar", "gs://bucket/a"])
def test_a_scheme_that_nobody_knows_is_one_line(monkeypatch, url):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if not installed
    said = ended(monkeypatch, lambda: file_system(url))
    assert said.startswith(f"some: {url}: ") and "use a local folder" in said


@pytest.mark.drill
def test_the_tables_stage_on_a_read_only_disk(tmp_path, disk):
    """The stage as a process, reports/ being on that disk."""
    place, mounted = disk
    make(tmp_path, params(**SMALL))
    save_params(tmp_path, **SMALL)
    (tmp_path / "reports").symlink_to(place)
    mounted("ro")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = (sys.executable, "-m", "stages.tables")
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tables: reports/table1.md: Read-only file system; make that disk writable")


def test_what_a_stage_writes_becomes_whole_at_once():
    """In these rooms nothing is written in place: a file half written never has a result's name."""
    writes = r"(?<!partial)\.(write_text|write_bytes|open)\(|shutil\.copy|savez\w*\((?!file)|to_csv\((?!index)"
    for file in (f for room in ("stages", *(f"pipeline/{r}" for r in ROOMS)) for f in (ROOT / room).glob("*.py")):
        assert not [line for line in file.read_text().splitlines() if re.search(writes, line)], file


ROOMS = ("reporting", "evaluation", "audit")
