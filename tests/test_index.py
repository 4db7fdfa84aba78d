import hashlib
import multiprocessing
import os
import pickle
import random
import tracemalloc
from dataclasses import FrozenInstanceError, replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.storage import index as module
from pipeline.storage import parquet
from pipeline.storage.index import GROUP, INDEX_SCHEMA, join_studies, read_studies, write_rejects, write_studies
from pipeline.study import Reject, Study, View


def some(count, seed=0):
    """Studies of every shape: no view to three, texts of any script or none, labels or none, numbers of any size."""
    draw = random.Random(seed)
    texts = [None, "Clear.", "Größe 3 µm, Δ and 心.", "No change. " * 20, "x"]
    for n in range(count):
        views = tuple(
            View(
                id=draw.choice([f"{n}-{i}", "f" * 44, "é", ""]),
                position=draw.choice(["PA", "AP", "LATERAL", ""]),
                shard=f"shards/a-{n // 7:05}.tar",
                offset=draw.choice([-1, 0, n, 2**33 + n]),
                length=draw.choice([0, 7, 70_000, 2**31 - 1]),
                width=draw.randint(0, 70_000),
                height=512,
                digest=f"{draw.getrandbits(64):016x}",
            )
            for i in range(draw.randint(0, 3))
        )
        names = draw.sample(["A", "B b", "Ç", "No Finding"], draw.randint(0, 4))
        labels = {name: draw.choice([1, 0, -1]) for name in names}
        split = draw.choice(["train", "train", "valid", "test"])
        yield Study(
            draw.choice(["a", "b"]), f"p{n // 2}", f"s{n}", split, views, draw.choice(texts), draw.choice(texts), labels
        )


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(module, "GROUP", 16)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300])
def test_what_was_written_is_read(tmp_path, small_groups, count):
    wanted = list(some(count))
    write_studies(tmp_path / "new" / "i.parquet", iter(wanted))
    found = read_studies(tmp_path / "new" / "i.parquet")
    assert list(found) == wanted and found == wanted and len(found) == count and bool(found) == (count > 0)
    assert [list(s.labels) for s in found] == [list(s.labels) for s in wanted]  # the order of labels, too
    assert [found[i] for i in range(-count, count)] == wanted * 2
    for s in found:
        for v in s.views:
            assert {type(n) for n in (v.offset, v.length, v.width, v.height)} == {int} and type(v.id) is str
    assert pq.ParquetFile(tmp_path / "new" / "i.parquet").num_row_groups == -(-count // 16)


def test_other_tools_read_the_same(tmp_path, small_groups):
    wanted = list(some(100))
    write_studies(tmp_path / "i.parquet", wanted)
    table = pq.read_table(tmp_path / "i.parquet")
    assert table.schema == INDEX_SCHEMA
    for row, s in zip(table.to_pylist(), wanted, strict=True):
        assert (row["dataset"], row["patient"], row["study"], row["split"]) == (s.dataset, s.patient, s.study, s.split)
        assert (row["findings"], row["impression"], dict(row["labels"])) == (s.findings, s.impression, s.labels)
        assert [View(**v) for v in row["views"]] == list(s.views)


def test_other_row_groups_and_encodings_are_read(tmp_path):
    wanted = list(some(60))
    write_studies(tmp_path / "i.parquet", wanted)
    table = pq.read_table(tmp_path / "i.parquet")
    for name, size, options in (("a", 60, {"use_dictionary": False}), ("c", 7, {})):
        with parquet.writing(tmp_path / name, table.schema, **options) as writer:
            writer.write_table(table, row_group_size=size)
        assert read_studies(tmp_path / name) == wanted
        assert read_studies(tmp_path / name, ("valid",)) == [s for s in wanted if s.split == "valid"]


def test_no_changed_byte_is_read(tmp_path):
    """Any one bit of the file, any cut, anything added; and a file that says nothing of its digest."""
    file, wanted = tmp_path / "i.parquet", [replace(s, findings=f"{parquet.KEY} 0") for s in some(20)]
    write_studies(file, wanted)
    whole, draw = file.read_bytes(), random.Random(3)
    assert read_studies(file) == wanted
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), tmp_path / "other", compression="zstd")
    damaged = [whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [whole[:at] for at in range(0, len(whole), 7)]
    damaged += [whole + b"\0", b"\0" + whole, whole * 2, (tmp_path / "other").read_bytes()]
    for data in damaged:
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"^\S*i\.parquet: damaged, or not written by this pipeline"):
            read_studies(file)
    assert len(damaged) > 5000


def test_a_file_that_is_cut_while_it_is_open_is_read_as_it_was(tmp_path):
    """Where it is mapped into memory, the process ends at the first page that is gone."""
    wanted = list(some(20))
    write_studies(tmp_path / "i.parquet", wanted)
    whole = parquet.read_table(tmp_path / "i.parquet")
    with parquet.open_file(tmp_path / "i.parquet") as file:
        os.truncate(tmp_path / "i.parquet", 0)
        assert file.read().replace_schema_metadata(None) == whole


def test_a_file_that_is_written_is_not_in_memory_for_its_digest(tmp_path):
    table = pa.table({"a": [random.Random(n).randbytes(1 << 20) for n in range(24)]})
    tracemalloc.start()
    parquet.write_table(tmp_path / "a", table)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 << 20 < (tmp_path / "a").stat().st_size and parquet.read_table(tmp_path / "a") == table


def test_a_digest_is_of_the_table_alone(tmp_path):
    write_studies(tmp_path / "a", some(20))
    parquet.write_table(tmp_path / "b", parquet.read_table(tmp_path / "a"))
    parquet.write_table(tmp_path / "c", parquet.read_table(tmp_path / "b"))
    assert digest(tmp_path / "b") == digest(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        parquet.read_table(tmp_path / "none")


def test_splits_and_slices_and_select(tmp_path, small_groups):
    wanted = list(some(200))
    write_studies(tmp_path / "i.parquet", wanted)
    everything = read_studies(tmp_path / "i.parquet")
    for splits in [("train",), ("valid", "test"), ("test",), ()]:
        assert read_studies(tmp_path / "i.parquet", splits) == [s for s in wanted if s.split in splits]
    for part in [slice(5), slice(-9, None), slice(10, 90, 7), slice(None, None, -1), slice(50, 20), slice(0, 999)]:
        assert list(everything[part]) == wanted[part]
    assert everything.select(split="valid") == [s for s in wanted if s.split == "valid"]
    assert everything.select(dataset="b") == [s for s in wanted if s.dataset == "b"]
    both = everything.select(dataset="a", split="train")
    assert both == [s for s in wanted if s.dataset == "a" and s.split == "train"]
    assert both[3:9] == list(both)[3:9] and both[-1] == list(both)[-1]
    assert everything[50:100].select(split="test") == [s for s in wanted[50:100] if s.split == "test"]
    assert not everything.select(dataset="none") and not everything[:0].select(split="train")
    assert everything != wanted[:-1] and everything != wanted[::-1] and everything != 3
    assert wanted[7] in everything and everything.index(wanted[7]) == 7
    for wrong in (200, -201):
        with pytest.raises(IndexError):
            everything[wrong]


def test_only_the_row_groups_of_a_split_are_read(tmp_path, small_groups, monkeypatch):
    wanted = [replace(s, split="train" if n < 160 else "valid") for n, s in enumerate(some(176))]
    write_studies(tmp_path / "i.parquet", wanted)
    read = []
    whole = pq.ParquetFile.read_row_group

    def counted(self, group, columns=None, **options):
        read.append(group) if columns is None else None
        return whole(self, group, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert len(read_studies(tmp_path / "i.parquet", ("valid",))) == 16 and read == [10]


def test_same_studies_same_bytes_however_they_come(tmp_path, small_groups):
    wanted = list(some(100))
    for name, studies in {"a": wanted, "b": iter(wanted), "c": (s for s in wanted), "d": None}.items():
        write_studies(tmp_path / name, read_studies(tmp_path / "a") if studies is None else studies)
    assert len({digest(tmp_path / name) for name in "abcd"}) == 1
    write_studies(tmp_path / "e", wanted[:-1])
    assert digest(tmp_path / "e") != digest(tmp_path / "a")


def test_an_index_may_be_rewritten_from_itself(tmp_path, small_groups):
    wanted = list(some(100))
    write_studies(tmp_path / "a", wanted)
    before = (tmp_path / "a").read_bytes()
    with (tmp_path / "a").open("rb") as old:  # who reads the old file goes on doing so
        write_studies(tmp_path / "a", (s for s in read_studies(tmp_path / "a") if s.labels))
        assert old.read() == before
    assert read_studies(tmp_path / "a") == [s for s in wanted if s.labels]


def test_writing_holds_one_group_at_a_time(tmp_path, small_groups):
    alive, most = set(), 0

    class Counted(str):
        def __del__(self):
            alive.discard(id(self))

    def stream():
        nonlocal most
        for n in range(500):
            name = Counted(f"s{n}")
            alive.add(id(name))
            most = max(most, len(alive))
            yield Study("a", "p", name, "train", ())

    write_studies(tmp_path / "a", stream())
    assert len(read_studies(tmp_path / "a")) == 500 and most <= 2 * 16 + 1


def test_a_failure_leaves_the_old_index_and_nothing_else(tmp_path, small_groups):
    write_studies(tmp_path / "a", list(some(20)))
    before = digest(tmp_path / "a")

    def broken():
        yield from some(40)
        raise RuntimeError("disk pulled")

    with pytest.raises(RuntimeError):
        write_studies(tmp_path / "a", broken())
    with pytest.raises(AttributeError):
        write_rejects(tmp_path / "r", [Reject("a", "b", "row", "c"), None])
    assert digest(tmp_path / "a") == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def _first(studies, queue):
    queue.put([studies[i] for i in range(len(studies))])


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_another_process_sees_the_same_studies(tmp_path, small_groups, way):
    wanted = list(some(50))
    write_studies(tmp_path / "i.parquet", wanted)
    context = multiprocessing.get_context(way)
    queue = context.Queue()
    worker = context.Process(target=_first, args=(read_studies(tmp_path / "i.parquet")[::-3], queue))
    worker.start()
    assert queue.get(timeout=60) == wanted[::-3]
    worker.join()


def test_a_pickle_is_small_and_knows_when_its_file_has_changed(tmp_path, monkeypatch):
    wanted = list(some(200))
    write_studies(tmp_path / "i.parquet", wanted)
    monkeypatch.chdir(tmp_path)
    packed = pickle.dumps(read_studies("i.parquet", ("train", "valid")))
    monkeypatch.chdir("/")
    assert len(packed) < 1000 and pickle.loads(packed) == [s for s in wanted if s.split != "test"]
    write_studies(tmp_path / "i.parquet", wanted[:-1])
    os.utime(tmp_path / "i.parquet", ns=(1, 1))
    with pytest.raises(ValueError, match="has changed"):
        pickle.loads(packed)


def test_records_are_frozen_checked_and_picklable(tmp_path):
    s = next(some(1))
    write_studies(tmp_path / "i.parquet", [replace(s, views=(View("a"),), labels={})])
    for one in (s, read_studies(tmp_path / "i.parquet")[0]):
        assert pickle.loads(pickle.dumps(one)) == one
        with pytest.raises(FrozenInstanceError):
            one.split = "test"
    read = read_studies(tmp_path / "i.parquet")[0].views[0]
    assert read == View("a") and hash(read) == hash(View("a")) and replace(read, id="b") == View("b")
    with pytest.raises(FrozenInstanceError):
        read.id = "b"
    with pytest.raises(ValueError, match="none of"):
        Study("a", "p", "s", "dev", ())
    with pytest.raises(ValueError, match="not an empty string"):
        Study("a", "p", "s", "train", (), findings="")


def test_a_view_loses_its_path(tmp_path):
    write_studies(tmp_path / "i.parquet", [Study("a", "p", "s", "train", (View("v", path="secret/name.png"),))])
    assert b"secret" not in (tmp_path / "i.parquet").read_bytes()
    assert read_studies(tmp_path / "i.parquet")[0].views == (View("v"),)


def test_what_is_no_index(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_studies(tmp_path / "none.parquet")
    (tmp_path / "text").write_text("no parquet at all")
    with pytest.raises(ValueError, match="text: damaged"):
        read_studies(tmp_path / "text")
    write_rejects(tmp_path / "r", [Reject("a", "b", "row", "c")])
    write_studies(tmp_path / "i", some(3))
    parquet.write_table(tmp_path / "less", pq.read_table(tmp_path / "i").drop_columns("findings"))
    for name in ("r", "less"):
        with pytest.raises(ValueError, match=f"{name}: no index"):
            read_studies(tmp_path / name)


def test_rejects(tmp_path):
    rejects = [Reject("a", "b.png", "image", "too small"), Reject("a", "7", "row", "no split")]
    write_rejects(tmp_path / "new" / "r.parquet", iter(rejects))
    assert [Reject(**row) for row in pq.read_table(tmp_path / "new" / "r.parquet").to_pylist()] == rejects


@pytest.mark.drill
def test_a_long_index(tmp_path):
    wanted = list(some(3 * GROUP + 5, seed=4))
    write_studies(tmp_path / "i.parquet", wanted)
    found = read_studies(tmp_path / "i.parquet")
    order = random.Random(5).sample(range(len(wanted)), len(wanted))
    assert all(found[i] == wanted[i] for i in order)


def test_parts_joined_are_the_index_of_all_their_studies(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP", 32)
    studies = list(some(150))
    for n, cut in enumerate([slice(0, 7), slice(7, 7), slice(7, 100), slice(100, 150)]):
        write_studies(tmp_path / f"{n}.parquet", studies[cut])
    write_studies(tmp_path / "all.parquet", studies)
    join_studies(tmp_path / "joined.parquet", [tmp_path / f"{n}.parquet" for n in range(4)])
    assert (tmp_path / "joined.parquet").read_bytes() == (tmp_path / "all.parquet").read_bytes()
    join_studies(tmp_path / "none.parquet", [])
    assert read_studies(tmp_path / "none.parquet") == []
