import multiprocessing
import os
import signal

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import ingest as module
from pipeline.images import decode, encode, read_image, resize
from pipeline.ingest import IngestError, ingest
from pipeline.params import Ingest, Source
from pipeline.shards import read_bytes
from pipeline.study import read_studies

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
    return Source(str(root), "")


def run(source, tmp_path, name="out", **options):
    keys = {"short_side": 16, "shard_size": 7, "workers": 2, **options}
    shards, index = tmp_path / name / "shards", tmp_path / name / "index.parquet"
    return ingest("chestxray14", source, Ingest(**keys), shards, index, 0)


def test_every_image_arrives_reduced_and_in_order(tmp_path):
    source = archive(tmp_path / "archive")
    summary = run(source, tmp_path)
    studies = read_studies(tmp_path / "out" / "index.parquet")
    assert [s.study for s in studies] == [f"{n:08}_000" for n in range(N)]
    for study in studies:
        view = study.views[0]
        expected = resize(read_image(tmp_path / "archive" / "images" / f"{study.study}.png"), 16)
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
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == ["rejects.parquet"]


def test_labels_only_opens_no_image(tmp_path, monkeypatch):
    source = archive(tmp_path / "archive", dict.fromkeys(range(N)).items())
    monkeypatch.setattr(module, "_decode_all", None)
    summary = run(source, tmp_path, labels_only=True)
    assert summary["listed"]["train"] == {"studies": 24, "images": 24}
    assert (summary["found_images"], summary["written_images"], summary["rejected_images"]) == (0, 0, 0)
    assert read_studies(tmp_path / "out" / "index.parquet") == []


def _crash_on_the_third(root, path, options, decode=module._decode_view):
    if path.endswith("00000003_000.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(root, path, options)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the patched function must be inherited")
def test_a_crashing_decoder_costs_one_image(tmp_path, monkeypatch):
    source = archive(tmp_path / "archive")
    monkeypatch.setattr(module, "_decode_view", _crash_on_the_third)
    summary = run(source, tmp_path, max_rejected=0.1)
    assert (summary["written_images"], summary["reasons"]) == (
        N - 1,
        {"no readable image": 1, "the decoder crashed on it": 1},
    )


def test_an_archive_without_a_usable_study_fails(tmp_path):
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Patient ID,View Position\na,Flu,1,PA\n"
    )
    with pytest.raises(IngestError, match="lists no usable study"):
        run(Source(str(tmp_path / "archive"), ""), tmp_path)
