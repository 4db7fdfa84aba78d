import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.archive_params import Ingest, Source
from pipeline.ingest import build as module
from pipeline.ingest import pieces
from pipeline.ingest.build import IngestError, ingest_archive
from pipeline.ingest.images import read_view
from pipeline.ingest.pieces import Job, decode_file
from pipeline.ingest.sources import SourceError, open_archive
from pipeline.storage.files import Gone
from pipeline.storage.index import read_studies
from pipeline.storage.pictures import decode, encode, resize
from pipeline.storage.shards import EncodedPicture, read_bytes

N = 30


def archive(root, bad=()):
    """A ChestX-ray14 of ``N`` small PNGs; those named in ``bad`` hold the given bytes, or are missing (None)."""
    (root / "images").mkdir(parents=True)
    rows = ["Image Index,Finding Labels,Patient ID,View Position"]
    random = np.random.default_rng(0)
    for n in range(N):
        rows.append(f"{n:08}_000.png,{'Mass' if n % 2 else 'No Finding'},{n},AP")
        path = root / "images" / f"{n:08}_000.png"
        Image.fromarray(random.integers(0, 256, (20 + n, 24), dtype=np.uint8)).save(path)
        if n in dict(bad):
            path.unlink()
            if dict(bad)[n] is not None:
                path.write_bytes(dict(bad)[n])
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(rows) + "\n")
    return Source("chestxray14", str(root), "")


def run(source, tmp_path, name="out", **options):
    keys = {"short_side": 16, "shard_size": 7, "workers": 2, **options}
    shards, index = tmp_path / name / "shards", tmp_path / name / "index.parquet"
    return ingest_archive("chestxray14", source, Ingest(**keys), shards, index, tmp_path / name / "work", 0)


def test_every_image_arrives_reduced_and_in_order(tmp_path):
    source = archive(tmp_path / "archive")
    summary = run(source, tmp_path)
    studies = read_studies(tmp_path / "out" / "index.parquet")
    assert [s.study for s in studies] == [f"{n:08}_000" for n in range(N)]
    for study in studies:
        view = study.views[0]
        expected = resize(read_view((tmp_path / "archive" / "images" / f"{study.study}.png").read_bytes())[0], 16)
        assert np.array_equal(decode(read_bytes(view)), decode(encode(expected, 95)))
        assert min(view.width, view.height) == 16 and view.path == ""
    assert (
        summary["written"]
        == summary["listed"]
        == {
            "train": {"studies": 24, "images": 24},
            "valid": {"studies": 6, "images": 6},
            "test": {"studies": 0, "images": 0},
        }
    )
    assert (summary["found_images"], summary["written_images"], summary["rejected_images"]) == (N, N, 0)
    assert summary["phantom"] is False


def test_same_bytes_whatever_the_workers(tmp_path):
    source = archive(tmp_path / "archive")
    run(source, tmp_path, workers=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "shards").iterdir()}
    index = (tmp_path / "out" / "index.parquet").read_bytes()
    run(source, tmp_path, workers=3)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "shards").iterdir()} == before
    assert (tmp_path / "out" / "index.parquet").read_bytes() == index


def test_bad_files_are_counted_and_do_not_stop_the_rest(tmp_path, capfd):
    source = archive(tmp_path / "archive", {3: b"not an image", 4: None, 5: b""}.items())
    (tmp_path / "archive" / "PHANTOM.json").write_text("{}")
    summary = run(source, tmp_path, max_rejected=0.1)
    assert (summary["found_images"], summary["written_images"], summary["rejected_images"]) == (N, N - 3, 3)
    assert summary["reasons"] == {
        "file is empty": 1,
        "file missing": 1,
        "no readable image": 3,
        "not a DICOM, JPEG or PNG file": 1,
    }
    assert summary["phantom"] is True
    rejects = pq.read_table(tmp_path / "out" / "shards" / "rejects.parquet").to_pylist()
    assert [(r["item"], r["reason"]) for r in rejects if r["kind"] == "image"] == [
        ("images/00000003_000.png", "not a DICOM, JPEG or PNG file"),
        ("00000004_000", "file missing"),
        ("images/00000005_000.png", "file is empty"),
    ]
    assert len(read_studies(tmp_path / "out" / "index.parquet")) == N - 3
    printed = capfd.readouterr().out
    assert "30 found = 27 written + 3 rejected" in printed and "1 x file missing" in printed


def test_too_many_rejects_fail_after_they_are_written(tmp_path):
    source = archive(tmp_path / "archive", {3: b"", 4: b""}.items())
    with pytest.raises(IngestError, match=r"6\.7% of 30 images rejected.*file is empty: 2"):
        run(source, tmp_path, max_rejected=0.05)
    assert pq.read_table(tmp_path / "out" / "shards" / "rejects.parquet").num_rows == 4
    assert not (tmp_path / "out" / "index.parquet").exists()


def test_an_old_result_does_not_outlive_a_failed_run(tmp_path):
    source = archive(tmp_path / "archive")
    run(source, tmp_path)
    for path in (tmp_path / "archive" / "images").iterdir():
        path.unlink()
    with pytest.raises(IngestError, match=r"looked for anywhere under"):
        run(source, tmp_path)
    left = {p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left - set((tmp_path / "out" / "work").rglob("*")) == {tmp_path / "out" / "shards" / "rejects.parquet"}


def test_labels_only_opens_no_image(tmp_path, monkeypatch):
    source = archive(tmp_path / "archive", dict.fromkeys(range(N)).items())
    monkeypatch.setattr(module, "write_piece", None)
    summary = run(source, tmp_path, labels_only=True)
    assert summary["listed"]["train"] == {"studies": 24, "images": 24}
    assert (summary["found_images"], summary["written_images"], summary["rejected_images"]) == (0, 0, 0)
    assert read_studies(tmp_path / "out" / "index.parquet") == []


def _dies_in_a_pool(job, number, alone=False, write=module.write_piece):
    if number == 0 and not alone:
        os.kill(os.getpid(), signal.SIGKILL)
    write(job, number, alone)


def _dies_on_the_third(job, path, decode=pieces.decode_file):
    if path.endswith("00000003_000.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(job, path)


def test_a_crashing_decoder_costs_one_image(tmp_path, monkeypatch):
    source = archive(tmp_path / "archive")
    monkeypatch.setattr(module, "write_piece", _dies_in_a_pool)
    monkeypatch.setattr(pieces, "decode_file", _dies_on_the_third)
    summary = run(source, tmp_path, max_rejected=0.1)
    assert (summary["written_images"], summary["reasons"]) == (
        N - 1,
        {"no readable image": 1, "the decoder crashed on it": 1},
    )


def _never_ends_on_the_third(job, path, decode=pieces.decode_file):
    if path.endswith("00000003_000.png"):
        re.match(r"(a+)+$", "a" * 60 + "b")  # C code that hears nothing
    return decode(job, path)


def _never_ends(job, number, alone=False, write=module.write_piece):
    pieces.MOST_SECONDS, pieces.decode_file = 1.0, _never_ends_on_the_third
    write(job, number, alone)


def test_a_decoder_that_does_not_end_costs_one_image_and_its_seconds_once(tmp_path, monkeypatch):
    source = archive(tmp_path / "archive")
    monkeypatch.setattr(module, "write_piece", _never_ends)
    for name in ("MOST_SECONDS", "decode_file"):
        monkeypatch.setattr(pieces, name, getattr(pieces, name))
    before, used = set(psutil.Process().children(recursive=True)), os.times()
    summary = run(source, tmp_path, max_rejected=0.1)
    spent = os.times()
    assert (summary["written_images"], summary["reasons"]) == (
        N - 1,
        {"no readable image": 1, "takes more than 1 s to decode": 1},
    )
    spent = sum(spent[:4]) - sum(used[:4])  # of all processes that have ended
    left = [
        p for p in set(psutil.Process().children(recursive=True)) - before if "resource_tracker" not in str(p.cmdline())
    ]
    assert not left and 1.5 < spent < 15


def test_a_process_killed_from_outside_costs_nothing(tmp_path, monkeypatch):
    source = archive(tmp_path / "archive")
    run(source, tmp_path, "whole")
    monkeypatch.setattr(module, "write_piece", _dies_in_a_pool)
    run(source, tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_lists_that_contradict_themselves(tmp_path):
    source = archive(tmp_path / "archive")
    table = tmp_path / "archive" / "Data_Entry_2017_v2020.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([*rows, rows[1]]) + "\n")  # one image twice: split by image, so on one side
    summary = run(source, tmp_path)
    assert summary["reasons"] == {"a study of this id was listed before": 1}
    manifest = ["image,study,split", "images/00000000_000.png,a,train", "images/00000001_000.png,a,test"]
    (tmp_path / "archive" / "own.csv").write_text("\n".join(manifest))
    own = Source("manifest", source.path, "", manifest="own.csv")
    with pytest.raises(SourceError, match="two splits"):
        ingest_archive("own", own, Ingest(), tmp_path / "o", tmp_path / "o.parquet", tmp_path / "w", 0)


def test_an_archive_of_links_names_the_key_that_follows_them(tmp_path):
    source = archive(tmp_path / "archive")
    (tmp_path / "archive" / "images").rename(tmp_path / "elsewhere")
    (tmp_path / "archive" / "images").mkdir()
    for file in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "archive" / "images" / file.name).symlink_to(file)
    said = rf"file missing: {N}; a link leads out of the archive; follow_links of its source allows that: {N}\)"
    with pytest.raises(IngestError, match=said):
        run(source, tmp_path)
    assert run(replace(source, follow_links=True), tmp_path)["written_images"] == N


def test_images_no_list_names_are_recorded(tmp_path):
    source = archive(tmp_path / "archive")
    (tmp_path / "archive" / "images" / "stray.png").write_bytes(b"x")
    summary = run(source, tmp_path)
    assert summary["reasons"] == {module.UNLISTED: 1} and summary["rejected_images"] == 0


# Killed, full, gone


def contents(out):
    """Bytes of every file of a result, by name; the index's shard addresses hold the folder, so they are compared
    without it."""
    found = {p.name: p.read_bytes() for p in (out / "shards").iterdir()}
    table = read_studies(out / "index.parquet")
    found["index"] = [s.with_views(replace(v, shard=Path(v.shard).name) for v in s.views) for s in table]
    assert not (out / "work").exists()
    return found


SCRIPT = """
import resource, sys
from pathlib import Path
from pipeline.ingest.build import IngestError, ingest_archive
from pipeline.config.params import Ingest, Source

if __name__ == "__main__":
    root, out, limit, scheduler = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    options = Ingest(short_side=16, shard_size=7, workers=2, scheduler=scheduler)
    try:
        source = Source("chestxray14", root, "")
        ingest_archive("chestxray14", source, options, out / "shards", out / "index.parquet", out / "work", 0)
    except IngestError as error:
        sys.exit(f"ingest: {error}")
"""


def start(tmp_path, out, limit=0, scheduler=""):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path / "archive"), str(out), str(limit), scheduler]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


def killed_and_resumed(tmp_path, kills, seed, scheduler=""):
    """Kill ingests of one archive at random moments, each time into the same folders, then let one end."""
    source = archive(tmp_path / "archive")
    run(source, tmp_path, "whole")
    begin = time.monotonic()
    assert start(tmp_path, tmp_path / "timed", scheduler=scheduler).wait() == 0
    whole_run = time.monotonic() - begin
    random = np.random.default_rng(seed)
    started = interrupted = 0
    while interrupted < kills:
        process = start(tmp_path, tmp_path / "out", scheduler=scheduler)
        started += 1
        try:
            process.wait(random.uniform(0.2, 1.0) * whole_run)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            interrupted += 1
    assert start(tmp_path, tmp_path / "out", scheduler=scheduler).wait() == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    return started


def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(tmp_path):
    assert killed_and_resumed(tmp_path, kills=3, seed=0) >= 3


@pytest.mark.drill
def test_many_kills_of_local_processes(tmp_path):
    print("started", killed_and_resumed(tmp_path, kills=30, seed=1))


@pytest.mark.drill
def test_many_kills_beside_dask(tmp_path):
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        print("started", killed_and_resumed(tmp_path, kills=30, seed=2, scheduler=cluster.scheduler_address))


def test_dask_workers_give_the_same_bytes(tmp_path):
    from distributed import LocalCluster

    source = archive(tmp_path / "archive", {3: b"not an image"}.items())
    run(source, tmp_path, "whole")
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        run(source, tmp_path, scheduler=cluster.scheduler_address)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_full_disk_stops_with_a_line_and_the_next_run_goes_on(tmp_path):
    source = archive(tmp_path / "archive")
    run(source, tmp_path, "whole")
    process = start(tmp_path, tmp_path / "out", limit=12_000)  # a shard is 17 kB or more
    _, said = process.communicate()
    assert process.returncode == 1 and "could not be written" in said.splitlines()[-1]
    assert not list((tmp_path / "out" / "shards").glob("*"))
    run(source, tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_done_pieces_are_not_done_again_unless_something_changed(tmp_path, monkeypatch):
    source = archive(tmp_path / "archive")
    run(source, tmp_path, "whole")
    done = []
    monkeypatch.setattr(module, "_executor", _here(done))
    monkeypatch.setattr(module, "_finish", _stop)
    for change, expected in ((None, 5), (None, 0), ("option", 5), ("image", 5)):
        if change == "image":
            Image.fromarray(np.eye(24, dtype=np.uint8) * 255).save(tmp_path / "archive" / "images" / "00000001_000.png")
        with pytest.raises(InterruptedError):
            run(source, tmp_path, jpeg_quality=90 if change else 95)
        assert len(done) == expected, change
        done.clear()


def _stop(*args):
    raise InterruptedError


def _here(done):
    """In the place of processes: pieces are done at once, and counted."""

    class Here:
        def submit(self, write, job, number):
            done.append(number)
            future = Future()
            future.set_result(write(job, number))
            return future

    @contextmanager
    def executor(options):
        yield Here(), 1

    return executor


def test_a_vanished_archive_is_no_reason_to_reject_its_files(tmp_path):
    source = archive(tmp_path / "archive")
    opened = open_archive("chestxray14", source.path, tmp_path / "packs")
    job = Job("chestxray14", opened.files, opened.names[0], str(tmp_path), "t", 16, 95)
    image = opened.images[0]
    assert isinstance(decode_file(job, image), EncodedPicture)
    (tmp_path / "archive" / image).unlink()
    assert decode_file(job, image) == "file missing"
    (tmp_path / "archive").rename(tmp_path / "gone")
    with pytest.raises(Gone):
        decode_file(job, image)


# What earlier runs have left


@pytest.fixture
def here(monkeypatch):
    """No processes, which take seconds to start."""
    monkeypatch.setattr(module, "_executor", _here([]))


def interrupted(source, tmp_path, monkeypatch, **options):
    """A run that ends before the last step, and the pieces that it did."""
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "_executor", _here(done))
        patch.setattr(module, "_finish", _stop)
        with pytest.raises(InterruptedError):
            run(source, tmp_path, **options)
    return done


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"\xff\xfe\0" * 99])
def test_damaged_state_costs_the_piece_and_a_line(tmp_path, monkeypatch, capfd, damage, here):
    source = archive(tmp_path / "archive", {3: b"not an image"}.items())
    run(source, tmp_path, "whole")
    work = tmp_path / "out" / "work"
    assert interrupted(source, tmp_path, monkeypatch) == [0, 1, 2, 3, 4]
    for name, redone in (
        ("parts/000001.parquet", [1]),
        ("parts/000002.rejects", [2]),
        ("shards/chestxray14-000003.tar", [3]),
        ("plan/000004.parquet", []),
        ("state.json", [0, 1, 2, 3, 4]),
    ):
        (work / name).write_bytes(damage)
        capfd.readouterr()
        assert interrupted(source, tmp_path, monkeypatch) == redone, name
        said = [line for line in capfd.readouterr().err.splitlines() if "damaged: starting anew" in line]
        assert len(said) == bool(redone)
    for name in ("parts/000001.rejects", "shards/chestxray14-000003.tar"):
        (work / name).unlink()
    assert interrupted(source, tmp_path, monkeypatch) == [1, 3]
    run(source, tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_part_that_is_damaged_at_the_end_is_done_again_by_the_next_run(tmp_path, monkeypatch, here):
    source = archive(tmp_path / "archive")
    run(source, tmp_path, "whole")
    settle = module._finish

    def late(job, *args):
        job.part(2).write_bytes(b"PAR1")
        return settle(job, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", late)
        with pytest.raises(IngestError, match=r"parts/000002\.parquet: damaged since it was written; run again"):
            run(source, tmp_path)
    assert interrupted(source, tmp_path, monkeypatch) == [2]
    run(source, tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("suffix", ["json", "gzidx"])
def test_damaged_places_of_a_pack_are_looked_up_anew(tmp_path, monkeypatch, capfd, suffix, here):
    source = archive(tmp_path / "archive")
    with tarfile.open(tmp_path / "archive" / "images.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "archive" / "images", "images")
    shutil.rmtree(tmp_path / "archive" / "images")
    run(source, tmp_path, "whole")
    interrupted(source, tmp_path, monkeypatch)
    (place,) = (tmp_path / "out" / "work" / "packs").glob(f"*.{suffix}")
    for damage in (b"", place.read_bytes()[:-3] + b"???"):
        place.write_bytes(damage)
        capfd.readouterr()
        assert interrupted(source, tmp_path, monkeypatch) == []
        assert ".json: damaged: starting anew" in capfd.readouterr().err
    run(source, tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_that_is_gone_from_its_bucket_is_made_again(s3, tmp_path, monkeypatch):
    source = archive(tmp_path / "archive")
    s3.mkdir("bucket")
    options = {"target": "s3://bucket/shards"}
    assert interrupted(source, tmp_path, monkeypatch, **options) == [0, 1, 2, 3, 4]
    names = sorted(s3.find("bucket/shards"))
    before = [s3.cat_file(name) for name in names]
    s3.rm_file(names[1])
    s3.pipe_file(names[2], before[2][:5000])
    assert interrupted(source, tmp_path, monkeypatch, **options) == [1, 2]
    assert [s3.cat_file(name) for name in names] == before


def test_names_that_are_not_utf_8_are_counted_to_the_end(tmp_path, here):
    source = archive(tmp_path / "archive")
    for name in (b"images/caf\xe9.png", b"new\nline.png"):
        path = tmp_path / "archive" / os.fsdecode(name)
        path.write_bytes((tmp_path / "archive" / "images" / "00000001_000.png").read_bytes())
    table = tmp_path / "archive" / "Data_Entry_2017_v2020.csv"
    table.write_bytes(table.read_bytes() + b'caf\xe9.png,Mass,99,AP\n"new\nline.png",Mass,99,AP\n')
    summary = run(source, tmp_path, max_rejected=0.1)
    assert (summary["found_images"], summary["written_images"], summary["rejected_images"]) == (N + 2, N, 2)
    rejects = pq.read_table(tmp_path / "out" / "shards" / "rejects.parquet").to_pylist()
    assert [r["item"] for r in rejects if r["kind"] == "file"] == [r"images/caf\xe9.png", r"new\x0aline.png"]


# Elsewhere than in a folder


def test_s3_gives_the_same_bytes(s3, tmp_path):
    source = archive(tmp_path / "archive", {3: b"not an image"}.items())
    run(source, tmp_path, "whole")
    s3.mkdir("bucket")
    s3.put(str(tmp_path / "archive"), "bucket/archive", recursive=True)
    far = replace(source, path="s3://bucket/archive")
    run(far, tmp_path, target="s3://bucket/shards")
    whole = contents(tmp_path / "whole")
    fetched = {n.rpartition("/")[2]: s3.cat_file(n) for n in s3.find("bucket/shards")}
    assert fetched == {name: data for name, data in whole.items() if name.endswith(".tar")}
    studies = read_studies(tmp_path / "out" / "index.parquet")
    assert {v.shard.rpartition("/")[0] for s in studies for v in s.views} == {"s3://bucket/shards/chestxray14"}
    near = read_studies(tmp_path / "whole" / "index.parquet")
    assert read_bytes(studies[4].views[0]) == read_bytes(near[4].views[0])


def test_an_archive_without_a_usable_study_fails(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Patient ID,View Position\na,Flu,1,PA\n"
    )
    with pytest.raises(IngestError, match="lists no usable study"):
        run(Source("chestxray14", str(tmp_path / "archive"), ""), tmp_path)
