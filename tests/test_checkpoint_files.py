"""Checkpoints of other people that promise more than they hold: refused in one line, unread."""

import argparse
import codecs
import json
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from pipeline.adapters.weights import Weights
from pipeline.storage.foreign_weights import read_weights
from pipeline.storage.torch_archive import Refused, check_archive
from tests.foreign import deflated, one_line

pytestmark = pytest.mark.usefixtures("guard")


def shared(path):
    """A hundred entries of the directory are the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
        archive.filelist += archive.filelist * 99


def large_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes((16 << 20) + 1))


def commented(path):
    """Two readers may find different ends of the directory."""
    torch.save({"w": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = path.read_bytes()[-22:] + b"."


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "pickle")


def no_directory(path):
    torch.save({"w": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (deflated, "compressed entry"),
        (shared, "larger than the file"),
        (large_pickle, "its pickle is larger than 4 MB"),
        (commented, "not an archive as torch writes it"),
        (no_directory, "not an archive as torch writes it"),
        (tar, "a tar archive"),
    ],
)
def test_an_archive_that_promises_more_than_it_holds_is_refused_unread(tmp_path, make, says):
    path = tmp_path / "w.pt"
    make(path)
    tracemalloc.start()
    one_line(lambda: read_weights(path), f"{path}: ", says, error=Refused)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


class Calls:
    """Pickled, it is a call of a function, which torch's own check allows."""

    def __init__(self, function, *values):
        self.call = function, values

    def __reduce__(self):
        return self.call


def hexed(times):
    text = "a" * 1000
    for _ in range(times):
        text = Calls(codecs.encode, text, "hex_codec")
    return text


def repickled(path, change):
    """Put other bytes in the place of an archive's pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


LARGE = 1 << 28
LETTERS = "ab" * (1 << 19)
CALLS = {
    "bytearray": (Calls(bytearray, LARGE), "holds builtins.bytearray"),
    "tensor": (Calls(torch.FloatTensor, LARGE), "holds torch.FloatTensor"),
    "storage": (Calls(torch.UntypedStorage, LARGE), "holds torch.storage.UntypedStorage"),
    "sparse": (torch.ones(2, 2).to_sparse(), "holds torch._utils._rebuild_sparse_tensor"),
    "meta": (torch.ones(2, device="meta"), "holds torch._utils._rebuild_meta_tensor_no_storage"),
    "wider": (
        Calls(torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.ones(1), torch.double, "cpu", False),
        "",
    ),
    "kept as it is": (Calls(torch._tensor._rebuild_from_type_v2, dict, dict, (), {}), "holds torch._tensor."),
    "encoded": (hexed(14), "encodes a text"),
    "copies": ([Calls(set, LETTERS) for _ in range(20)], "copies the same part again and again"),
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", CALLS)
def test_a_pickle_that_makes_much_of_little_is_refused_unread(tmp_path, kind, new):
    """Each is a call that torch allows where it loads weights only."""
    value, says = CALLS[kind]
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1), "more": value}, path, _use_new_zipfile_serialization=new)
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    one_line(lambda: read_weights(path), f"{path}: ", says, "; refused", error=Refused)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 << 20


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("old", "changed", "says"),
    [
        (b"K\x07\x85", b"J\0\0\0\x10\x85", "larger than its storage"),  # its size
        (b"K\x07\x85", b"\x8a\x05\0\0\0\0\x10\x85", "larger than its storage"),
        (b"K\x01\x85", b"J\0\0\0\x10\x85", "larger than its storage"),  # its stride
        (b"QK\0", b"QM\0\x10", "larger than its storage"),  # where it begins
        (b"QK\0", b"QJ\xff\xff\xff\xff", "negative size"),
        (b"cpuq\x06K\x07", b"cpuq\x06J\0\0\0\x10", "states more numbers than it holds"),  # its storage
        (b"s.", b"Nbs.", "changes a tensor"),
        (b"s.", b"s\x96\0\0\0\x10\0\0\0\0.", "not a checkpoint of torch"),  # protocol 5: its number comes first
        (b"}q", b"cdatetime\ndate\n0}q", "holds datetime.date"),
    ],
)
def test_a_size_in_a_pickle_is_compared_with_what_the_file_holds(tmp_path, old, changed, says, new):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(7)}, path, _use_new_zipfile_serialization=new)

    def change(content):
        at = content.index(b"_rebuild_tensor_v2") - 30  # an old file's first table is of the machine
        cut = content.index(old, max(at, 0))
        return content[:cut] + changed + content[cut + len(old) :]

    if new:
        repickled(path, change)
    else:
        path.write_bytes(change(path.read_bytes()))
    one_line(lambda: read_weights(path), f"{path}: ", says, error=Refused)


def test_what_torch_writes_is_read(tmp_path):
    path = tmp_path / "w.pt"
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    tensors = {
        "w": torch.arange(5),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0),
        "none": torch.ones(0, 3).half(),
    }
    tensors |= {"turned": base.permute(2, 0, 1), "part": base[1:, ::2, 3:], "row": torch.ones(1, 4).expand(3, 4)}
    tensors |= {f"of {kind}": torch.ones(2, dtype=kind) for kind in (torch.bool, torch.bfloat16, torch.complex64)}
    tensors |= {"parameter": torch.nn.Parameter(base)}
    more = {"seed": 2**40, "lr": 1e-3, "sets": {1, 2}, "counts": Counter("aab"), "bytes": b"\xff\0", "none": None}
    more |= {"args": argparse.Namespace(lr=0.1), "table": defaultdict(list, a=[1]), "number": np.float32(2)}
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    more |= {"optimizer_states": [optimizer.state_dict()], "state_dict": model.state_dict(), "size": base.shape}
    for new in (True, False):
        torch.save({**tensors, "more": more}, path, _use_new_zipfile_serialization=new)
        found = read_weights(path)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        assert torch.equal(found["more"]["state_dict"]["weight"], model.weight)
        torch.save(tensors, path, _use_new_zipfile_serialization=new)
        check_archive(path)


def test_following_a_large_checkpoint_takes_no_time(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({f"layer.{i}.weight": torch.ones(2, 3) for i in range(3000)}, path)
    start = time.process_time()
    check_archive(path)
    assert time.process_time() - start < 5


def test_a_row_that_is_stated_to_repeat_is_not_a_tensor_of_that_size(tmp_path):
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "w.pt")
    one_line(lambda: Weights.of(tmp_path / "w.pt"), "w.pt: states more numbers than it holds: w")
    torch.save({"w": torch.ones(2, 2).to_sparse()}, tmp_path / "w.pt")
    one_line(lambda: Weights.of(tmp_path / "w.pt"), "w.pt: ")


def test_a_header_of_safetensors_is_no_larger_than_its_file(tmp_path):
    path = tmp_path / "w.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    for content in (struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", len(header)) + header):
        path.write_bytes(content)
        one_line(lambda: read_weights(path), f"{path}: not a safetensors file")


def number(value: int) -> bytes:
    """A step of a pickle that puts a whole number on the stack."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


NESTED = b")" + b"q\x00h\x00\x86" * 40  # a tuple in itself, forty times: to hash it has no end
KEYS = {
    "nested": b"\x80\x02}" + NESTED + b"K\x00s.",
    "of a set": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nset\n(](" + NESTED + b"etRs.",
    "of a list of pairs": b"\x80\x02ccollections\nOrderedDict\n(](" + NESTED + b"K\x01\x86etR.",
    "that collide": b"\x80\x02}(" + b"".join(number(((1 << 61) - 1) * n) + b"N" for n in range(1, 9)) + b"u.",
    "of a storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + NESTED
    + b"X\x03\x00\x00\x00cpuK\x01tQ.",
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_is_never_computed_is_refused(tmp_path, kind):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", KEYS[kind])
    one_line(lambda: read_weights(path), f"{path}: has a ", "refused", error=Refused)


def test_an_archive_of_two_directories_is_refused(tmp_path):
    """zipfile takes the one before the last record, torch the one where that record says."""
    kept, hidden, path = (tmp_path / f"{name}.pt" for name in ("kept", "hidden", "both"))
    torch.save({"w": torch.ones(3)}, kept)
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr(
            "archive/data.pkl", b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n" + number(1 << 40) + b"\x85Rs."
        )
    start = hidden.read_bytes()
    path.write_bytes(start + kept.read_bytes())
    one_line(lambda: read_weights(path), f"{path}: not an archive as torch writes it", error=Refused)


def test_a_checkpoint_of_several_pickles_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/CONSTANTS.PKL", b"\x80\x02}.")
    one_line(lambda: read_weights(path), f"{path}: has several pickles", error=Refused)


def test_a_tensor_without_a_name_is_one_line(tmp_path):
    torch.save({1: torch.ones(3), "w": torch.ones(2)}, tmp_path / "w.pt")
    one_line(lambda: Weights.of(tmp_path / "w.pt"), "not tensors: 1")
