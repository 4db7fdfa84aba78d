import hashlib
import json
import os
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.storage.pictures import encode
from pipeline.storage.shards import (
    MAX_KEY,
    SAMPLED,
    EncodedPicture,
    ShardError,
    ShardReader,
    ShardWriter,
    key,
    load_view,
    read_bytes,
)
from pipeline.study import Study, View


def picture(seed, height=20, width=24):
    image = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    return EncodedPicture(encode(image, 95), width, height, "AP")


def study(number, views=2):
    of_study = tuple(
        View(id=f"v{number}.{i}", position="LATERAL" if i else "", path=f"secret/{i}.jpg") for i in range(views)
    )
    return Study("openi", f"p{number}", f"s.{number}", "test", of_study, findings="Clear — “ok”.", labels={"Edema": -1})


def write(folder, studies, size=2):
    placed = []
    for start in range(0, len(studies), size):
        with ShardWriter(folder / f"openi-{start // size:06d}.tar") as writer:
            for n, s in enumerate(studies[start : start + size], start):
                placed.append(writer.write(s, [picture(10 * n + i) for i in range(len(s.views))]))
    return placed


@pytest.fixture
def written(tmp_path):
    return write(tmp_path / "shards", [study(0), study(1, 1), study(2, 3)])


def test_index_addresses_the_very_bytes(written):
    for n, s in enumerate(written):
        for i, view in enumerate(s.views):
            expected = picture(10 * n + i)
            assert read_bytes(view) == expected.data
            assert (view.width, view.height) == (expected.width, expected.height)
            assert load_view(view).shape == (view.height, view.width)
            assert view.digest == hashlib.blake2b(expected.data, digest_size=8).hexdigest()


def test_a_view_is_read_at_parts_of_its_size(written, tmp_path):
    view = written[0].views[0]
    full = load_view(view).astype(float)
    for reduce in (2, 4):
        small = load_view(view, reduce)
        assert small.shape == (view.height // reduce, view.width // reduce)
        means = full.reshape(small.shape[0], reduce, small.shape[1], reduce).mean(axis=(1, 3))
        assert np.corrcoef(small.ravel(), means.ravel())[0, 1] > 0.9  # low frequencies of noise, not its means
    for wrong in (replace(view, width=view.width + 4), replace(view, height=view.height - 8)):
        for reduce in (1, 2, 4):
            with pytest.raises(ShardError, match=r"^\S*openi-000000\.tar: a picture is not as large as its index says"):
                load_view(wrong, reduce)


def test_no_flipped_bit_of_a_picture_is_read(written, tmp_path):
    view, rng = written[0].views[0], np.random.default_rng(0)
    shard = Path(view.shard)
    whole = shard.read_bytes()
    for at in view.offset + rng.permutation(view.length)[:300]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        shard.write_bytes(damaged)
        for read in (read_bytes, load_view):
            with pytest.raises(ShardError, match=r"^\S*openi-000000\.tar: damaged, a picture is not the one that was"):
                read(view)
        assert read_bytes(written[0].views[1]) == picture(1).data  # its neighbour is whole


def test_training_finds_a_damaged_picture_soon(written):
    """It looks at one read in SAMPLED; a picture that cannot be decoded is damaged, whether it was that one or not."""
    view = written[0].views[0]
    shard = Path(view.shard)
    data = bytearray(shard.read_bytes())
    data[view.offset + view.length - 5] ^= 16
    shard.write_bytes(data)
    reader = ShardReader()
    found = 0
    for _ in range(3 * SAMPLED):
        try:
            assert reader.load_view(view, every=SAMPLED).shape == (view.height, view.width)
        except ShardError:
            found += 1
    assert found == 3
    data[view.offset : view.offset + 20] = bytes(20)
    shard.write_bytes(data)
    for _ in range(SAMPLED):
        with pytest.raises(ShardError, match="damaged, a picture"):
            reader.load_view(view, every=SAMPLED)


def test_position_is_filled_only_where_unknown(written):
    assert [view.position for view in written[2].views] == ["AP", "LATERAL", "LATERAL"]


def test_shards_hold_so_many_studies_and_nothing_partial(written, tmp_path):
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert names == ["openi-000000.tar", "openi-000001.tar"]
    assert {view.shard for view in written[2].views} == {(tmp_path / "shards" / "openi-000001.tar").as_posix()}


def test_plain_webdataset_reads_the_samples(written, tmp_path):
    wds = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((tmp_path / "shards").glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == ["p0_s%2E0", "p1_s%2E1", "p2_s%2E2"]
    for n, (sample, s) in enumerate(zip(samples, written, strict=True)):
        images = sorted(name for name in sample if name.endswith("jpg"))
        assert images == [f"{i}.jpg" for i in range(len(s.views))]
        assert all(sample[name] == picture(10 * n + i).data for i, name in enumerate(images))
        record = json.loads(sample["json"])
        assert record == {
            "dataset": "openi",
            "patient": f"p{n}",
            "study": f"s.{n}",
            "split": "test",
            "findings": "Clear — “ok”.",
            "impression": None,
            "labels": {"Edema": -1},
            "views": [{"id": v.id, "position": v.position, "width": 24, "height": 20} for v in s.views],
        }
        assert b"secret" not in sample["json"]


def test_tar_headers_say_nothing_of_machine_or_moment(written, tmp_path):
    with tarfile.open(tmp_path / "shards" / "openi-000000.tar") as tar:
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o644 and member.isreg()


def test_same_studies_same_bytes(written, tmp_path):
    write(tmp_path / "again", [study(0), study(1, 1), study(2, 3)])
    for path in (tmp_path / "shards").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_a_failure_leaves_no_half_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "x.tar") as writer:
        writer.write(study(0, 1), [picture(0)])
        assert len(list(tmp_path.iterdir())) == 1 and not (tmp_path / "x.tar").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_no_shard_without_studies(tmp_path):
    with ShardWriter(tmp_path / "x.tar"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_a_second_study_of_one_key_and_missing_pictures(tmp_path):
    with ShardWriter(tmp_path / "x.tar") as writer:
        writer.write(study(0, 1), [picture(0)])
        with pytest.raises(ShardError, match="two studies"):
            writer.write(study(0, 1), [picture(0)])
        with pytest.raises(ShardError, match="one picture for each"):
            writer.write(study(1, 2), [picture(0)])


def test_keys_fit_a_tar_and_stay_apart():
    long = [Study("siim", "1." * 60 + end, "1." * 60 + end, "train", (View("v"),)) for end in ("1", "2")]
    keys = [key(s) for s in long]
    assert len(set(keys)) == 2
    assert all(len(k) <= MAX_KEY and "." not in k and "/" not in k for k in keys)


def test_reader_says_what_is_wrong(written, tmp_path):
    view = written[0].views[0]
    reader = ShardReader(tmp_path)
    with pytest.raises(ShardError, match="run ingest first"):
        reader.read_bytes(View("v", shard="none.tar", offset=0, length=1))
    with pytest.raises(ShardError, match="shorter"):
        reader.read_bytes(View("v", shard=view.shard, offset=1 << 20, length=view.length))
    with pytest.raises(ShardError):
        reader.read_bytes(View("v"))


def test_reader_closes_the_oldest_descriptors(written, monkeypatch):
    monkeypatch.setattr("pipeline.storage.shards.MAX_OPEN", 1)
    reader = ShardReader()
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else None
    for _ in range(5):
        for s in written:
            reader.read_bytes(s.views[0])
    if before is not None:
        assert len(list(descriptors.iterdir())) == before + 1
    reader.close()
    assert reader.read_bytes(written[0].views[0]) == picture(0).data
    reader.close()


def test_one_reader_serves_threads_and_a_forked_process(written):
    reader = ShardReader()
    views = [(10 * n + i, view) for n, s in enumerate(written) for i, view in enumerate(s.views)]
    expected = {seed: picture(seed).data for seed, _ in views}
    wrong = []

    def check():
        for _ in range(50):
            wrong.extend(seed for seed, view in views if reader.read_bytes(view) != expected[seed])

    threads = [threading.Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    child = os.fork()
    if child == 0:
        check()
        os._exit(1 if wrong else 0)
    check()
    for thread in threads:
        thread.join()
    assert os.waitpid(child, 0)[1] == 0
    assert wrong == []
    reader.close()
