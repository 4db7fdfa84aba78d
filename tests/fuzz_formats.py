"""The formats that are read, with whole files of each and what reading one is: what ``fuzz`` damages."""

from __future__ import annotations

import csv
import gzip
import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.clones import ROOT


@dataclass(frozen=True)
class Format:
    """How many inputs the drill asks for; the files they are made from; and what is done with one, which returns what
    came out and raises ``errors`` for what cannot be used. ``whole``: what came out must be the seed's own."""

    inputs: int
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], Any]
    errors: Callable[[], tuple[type[Exception], ...]]
    whole: bool = False


# pictures


def picture_seeds() -> list[bytes]:
    import pydicom.uid as uid
    from PIL import Image

    from tests import test_dicom as made

    grey, deep = made.smooth(8, 40, 48), made.smooth(12, 40, 48)
    blocks = (np.arange(12).reshape(3, 4) * 397) % 4096
    files = [
        made.make(deep, "MONOCHROME1", WindowCenter=2000, WindowWidth=3000, RescaleSlope=1, RescaleIntercept=-5),
        made.make(deep, syntax=uid.ImplicitVRLittleEndian, VOILUTSequence=made.table(0, list(range(4096)))),
        made.make(deep.astype(np.int16), syntax=uid.ExplicitVRBigEndian, PixelPaddingValue=3, ViewPosition="PA"),
        made.make(deep, syntax=uid.DeflatedExplicitVRLittleEndian),
        made.make(deep, syntax=uid.ImplicitVRLittleEndian, preamble=False),
        made.make(made.colours(), "RGB"),
        made.make(
            deep, syntax=uid.RLELossless, frame=made.rle([(deep >> 8).astype(np.uint8), (deep & 255).astype(np.uint8)])
        ),
        made.make(grey, syntax=uid.JPEGBaseline8Bit, frame=made.by_opencv(grey)),
        made.make(
            np.kron(blocks, np.ones((8, 8), int)).astype(np.uint16),
            syntax=uid.JPEGExtended12Bit,
            frame=made.by_hand(blocks),
            BitsStored=12,
        ),
        made.make(deep, syntax=uid.JPEGLosslessSV1, frame=made.by_gdcm(deep, "JPEGLosslessProcess14_1", 12)),
        made.make(grey, syntax=uid.JPEGLossless, frame=made.by_gdcm(grey, "JPEGLosslessProcess14", 8)),
        made.make(deep, syntax=uid.JPEGLSLossless, frame=made.by_gdcm(deep, "JPEGLSLossless", 12)),
        made.make(deep, syntax=uid.JPEG2000Lossless, frame=made.by_openjpeg(deep, 12)),
        made.make(grey, syntax=uid.JPEG2000, frame=made.by_openjpeg(grey, 8, False)),
    ]
    for values, kind, options in (
        (grey, "JPEG", {}),
        (grey, "JPEG", {"progressive": True}),
        (np.dstack([grey, grey // 2, grey]), "JPEG", {"quality": 90}),
        (grey, "PNG", {}),
        (deep, "PNG", {}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


def read_picture(data: bytes, _: Path) -> None:
    from pipeline.ingest.images import read_view

    image, position, *_ = read_view(data, 16 if len(data) % 2 else 0)
    assert image.dtype == np.uint8 and image.ndim == 2 and position in ("PA", "AP", "LATERAL", "")


# lists, reports and packs of an archive


ROWS = [["image", "study", "patient", "view", "report", "label:Edema", "split"]] + [
    [f"a/{n}.png", f"s{n}", f"p{n // 2}", "PA", f"FINDINGS: Größe {n} mm.\nIMPRESSION: Normal.", str(n % 2), "train"]
    for n in range(12)
]
XML = (
    '<?xml version="1.0" encoding="utf-8"?><eCitation><MedlineCitation><Abstract>'
    '<AbstractText Label="FINDINGS">Clear &amp; normal — ok.</AbstractText>'
    '<AbstractText Label="IMPRESSION">1. Normal.</AbstractText></Abstract></MedlineCitation>'
    '<parentImage id="CXR1_1_IM-0001-3001"/><parentImage id="CXR1_1_IM-0001-4001"/></eCitation>'
).encode()
REPORT = (
    b" FINAL REPORT\n EXAMINATION: CHEST (PA AND LAT)\n\n INDICATION: ___F with cough.\n\n"
    b" FINDINGS:\n\n The heart is normal.\n No effusion.\n\n IMPRESSION:\n\n 1. No acute process.\n"
)


def table_seeds() -> list[bytes]:
    out = io.StringIO()
    csv.writer(out).writerows(ROWS)
    text = out.getvalue()
    plain = [text.encode(), ("\ufeff" + text).encode(), text.encode("latin-1", "replace")]
    return [*plain, *(gzip.compress(data, mtime=0) for data in plain)]


def manifest_seeds() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {name: list(values) for name, *values in zip(*ROWS, strict=True)}
    found = []
    for options in ({}, {"compression": "zstd"}, {"use_dictionary": False, "compression": "gzip"}):
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink, **options)
        found.append(sink.getvalue())
    return found


def read_list(data: bytes, folder: Path, name: str) -> int:
    from pipeline.config.archive_params import Source
    from pipeline.ingest.sources import open_archive, read_archive

    (folder / name).write_bytes(data)
    source = Source("manifest", str(folder), "", manifest=name)
    return sum(1 for _ in read_archive(open_archive("mine", source.path, folder / "cache"), source, 0))


def read_xml(data: bytes, _: Path) -> None:
    from pipeline.ingest.sources.openi import _study

    _study("openi", "1.xml", "test", data)


def read_report(data: bytes, _: Path) -> None:
    from pipeline.ingest.report_sections import sections
    from pipeline.storage.files import decode_text

    for part in sections(decode_text(data)):
        assert part is None or part


def pack_seeds() -> list[bytes]:
    members = {"a/1.png": b"x" * 500, "b/2.txt": REPORT, "ö.csv": b"image\n1.png\n"}
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", method) as archive:
            for name, data in members.items():
                archive.writestr(zipfile.ZipInfo(name), data, method)
        found.append(out.getvalue())
    for mode in ("w", "w:gz"):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode=mode) as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        found.append(out.getvalue())
    return found


def read_pack(data: bytes, folder: Path) -> None:
    """A pack whose first bytes say what it is; all that it lists is read or refused."""
    from pipeline.storage import files
    from pipeline.storage.files import Files, FilesError

    name = "a.zip" if data[:2] == b"PK" else "a.tar.gz" if data[:2] == b"\x1f\x8b" else "a.tar"
    for old in folder.glob("a.*"):
        old.unlink()
    (folder / name).write_bytes(data)
    files._open_pack.cache_clear()
    archive = Files(str(folder), folder / "cache")
    listing = archive.walk()
    for item in listing.files:
        try:
            archive.read(item, 1 << 20)
        except FilesError as error:
            assert "\n" not in str(error)
    for item, reason in listing.problems:
        item.encode()
        assert "\n" not in reason


# what a user gives beside archives


def checkpoint_seeds() -> list[bytes]:
    import torch
    from safetensors.torch import save

    tensors = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(2)}
    found = [save(tensors)]
    for new in (True, False):
        for value in (tensors, {"state_dict": tensors, "epoch": 3, "name": "x"}):
            out = io.BytesIO()
            torch.save(value, out, _use_new_zipfile_serialization=new)
            found.append(out.getvalue())
    return found


def read_checkpoint(data: bytes, folder: Path) -> None:
    from pipeline.storage.foreign_weights import read_weights

    path = folder / ("x.safetensors" if data[8:9] == b"{" else "x.pt")
    path.write_bytes(data)
    read_weights(path)


def params_seeds() -> list[bytes]:
    return [(ROOT / "profiles" / f"{name}.yaml").read_bytes() for name in ("micro", "paper")]


def read_params(data: bytes, folder: Path) -> None:
    from pipeline.config.load import load_params

    (folder / "params.yaml").write_bytes(data)
    load_params(folder / "params.yaml")


def yaml_seeds() -> list[bytes]:
    folder = ROOT / "pipeline" / "text"
    like = f"like: {folder}/prompts".encode()  # the file that another one names
    return [p.read_bytes().replace(b"like: prompts", like) for p in sorted(folder.glob("prompts*.yaml"))]


def read_prompts(data: bytes, folder: Path) -> None:
    from pipeline.text.prompts import load_templates

    (folder / "p.yaml").write_bytes(data)
    load_templates(folder / "p.yaml")


def protocol_seeds() -> list[bytes]:
    folder = ROOT / "pipeline" / "evaluation" / "protocols"
    here = str(ROOT / "pipeline" / "text").encode()  # of the files that they name
    return [p.read_bytes().replace(b"../../text", here) for p in sorted(folder.glob("*.yaml"))]


def read_protocol(data: bytes, folder: Path) -> None:
    from pipeline.evaluation.protocols import load_protocols

    (folder / "mine.yaml").write_bytes(data)
    load_protocols([str(folder / "mine.yaml")])


# what we wrote ourselves


def _studies(folder: Path) -> list[Any]:
    from pipeline.storage.pictures import encode
    from pipeline.storage.shards import EncodedPicture, ShardWriter
    from pipeline.study import Study, View

    rng = np.random.default_rng(0)
    placed = []
    with ShardWriter(folder / "a-000000.tar", "a-000000.tar") as writer:
        for n in range(3):
            image = rng.integers(0, 256, (24, 32), dtype=np.uint8)
            study = Study("a", f"p{n}", f"s{n}", "train", (View(f"v{n}"),), f"Größe {n}.", None, {"Edema": n - 1})
            placed.append(writer.write(study, [EncodedPicture(encode(image, 90), 32, 24)]))
    return placed


def index_seeds() -> list[bytes]:
    from pipeline.storage.index import write_studies

    with tempfile.TemporaryDirectory() as name:
        write_studies(Path(name) / "i.parquet", _studies(Path(name)))
        return [(Path(name) / "i.parquet").read_bytes()]


def read_index(data: bytes, folder: Path) -> list[Any]:
    from pipeline.storage.index import read_studies

    (folder / "i.parquet").write_bytes(data)
    return list(read_studies(folder / "i.parquet"))


def shard_seeds() -> list[bytes]:
    with tempfile.TemporaryDirectory() as name:
        _studies(Path(name))
        return [(Path(name) / "a-000000.tar").read_bytes()]


def read_shard(data: bytes, folder: Path) -> list[bytes]:
    """Every picture that the index names; the first that is not as it was ends it."""
    from pipeline.storage.shards import ShardReader

    with tempfile.TemporaryDirectory() as name:
        placed = _studies(Path(name))
    (folder / "a-000000.tar").write_bytes(data)
    reader = ShardReader(folder)
    try:
        return [reader.load_view(study.views[0]).tobytes() for study in placed]
    finally:
        reader.close()


def weights_seeds() -> list[bytes]:
    import torch

    from pipeline.models.weights_file import save_weights

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "w.safetensors"
        save_weights(path, {"a": torch.arange(300.0).reshape(3, 100), "b": torch.tensor(7)})
        return [path.read_bytes()]


def read_own_weights(data: bytes, folder: Path) -> list[Any]:
    from pipeline.models.weights_file import load_weights

    (folder / "w.safetensors").write_bytes(data)
    return [(name, value.tolist()) for name, value in sorted(load_weights(folder / "w.safetensors").items())]


def arrays_seeds() -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        out = io.BytesIO()
        save(out, images=np.arange(300, dtype=np.float16).reshape(3, 100), texts=np.ones((2, 5)))
        found.append(out.getvalue())
    return found


def read_arrays(data: bytes, folder: Path) -> list[Any]:
    from pipeline.evaluation.store import load_arrays

    (folder / "a.npz").write_bytes(data)
    return [(name, value.tolist()) for name, value in sorted(load_arrays(folder / "a.npz", "dvc repro").items())]


def _errors(*names: str) -> Callable[[], tuple[type[Exception], ...]]:
    """Classes by the names of their modules, which are imported when they are needed."""

    def found() -> tuple[type[Exception], ...]:
        from importlib import import_module

        return tuple(getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names)

    return found


_SOURCE = _errors("pipeline.ingest.sources.archive.SourceError")
_VALUE = _errors("builtins.ValueError")
FORMATS = {
    "picture": Format(500_000, picture_seeds, read_picture, _errors("pipeline.storage.pictures.ImageError")),
    "table": Format(60_000, table_seeds, lambda data, at: read_list(data, at, "m.csv"), _SOURCE),
    "manifest": Format(60_000, manifest_seeds, lambda data, at: read_list(data, at, "m.parquet"), _SOURCE),
    "xml": Format(60_000, lambda: [XML], read_xml, tuple),
    "report": Format(60_000, lambda: [REPORT], read_report, tuple),
    "pack": Format(60_000, pack_seeds, read_pack, tuple),
    "checkpoint": Format(60_000, checkpoint_seeds, read_checkpoint, _VALUE),
    "params": Format(5_000, params_seeds, read_params, _errors("pipeline.config.records.ParamsError")),
    "prompts": Format(3_000, yaml_seeds, read_prompts, _errors("pipeline.text.prompts.PromptError")),
    "protocol": Format(2_000, protocol_seeds, read_protocol, _VALUE),
    "index": Format(50_000, index_seeds, read_index, _VALUE, True),
    "shard": Format(40_000, shard_seeds, read_shard, _errors("pipeline.storage.shards.ShardError"), True),
    "weights": Format(20_000, weights_seeds, read_own_weights, _VALUE, True),
    "arrays": Format(20_000, arrays_seeds, read_arrays, _VALUE, True),
}
