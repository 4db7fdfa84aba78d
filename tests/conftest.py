"""Tiny studies in real shards, tiny models and their configuration: what the tests of the training half share."""

import builtins
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

# One thread a process, before a library reads it: two processes whose threads wait for one another on two cores take
# several times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import huggingface_hub.constants
import numpy as np
import pytest

from pipeline.config.params import Augment, ImageEncoder, Loss, MixedModel, Sampling, TextEncoder, Train
from pipeline.config.run_config import NOT_MIXED, Roles, RunConfig
from pipeline.storage import files
from pipeline.storage.index import write_studies
from pipeline.storage.pictures import encode
from pipeline.storage.shards import EncodedPicture, ShardWriter
from pipeline.study import Study, View
from pipeline.text.prompts import PromptSentences
from pipeline.training import loop
from pipeline.training.corpus import write_corpus

RESNET = ImageEncoder(
    "resnet50", False, args={"layers": [1] * 4, "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4}
)
SWIN = ImageEncoder(
    "swin_tiny_patch4_window7_224",
    False,
    (0.5, 0.5, 0.5),
    (0.5, 0.5, 0.5),
    {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "drop_path_rate": 0.0},
)
BERT = TextEncoder(
    "",
    300,
    {
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    },
    48,
)
LONGEST = "test_repro.py"
CLASSES = tuple(f"Class{i}" for i in range(14))
PLACES = ("apex", "base", "hilum", "margin", "angle", "field", "zone", "lobe")
THINGS = ("opacity", "nodule", "scar", "effusion", "catheter", "fracture")
PLAIN = {  # of a RunConfig
    "name": "tiny",
    "seed": 7,
    "datasets": ("mimic_cxr", "chexpert", "chestxray14"),
    "image_encoder": SWIN,
    "text_encoder": BERT,
    "dim": 16,
    "temperature": 0.1,
    "image_size": 32,
    "sampling": Sampling(),
    "augment": Augment(),
    "loss": Loss(),
    "captioned": ("chexpert", "chestxray14"),
    "random_negatives": ("chestxray14",),
    "train": Train(epochs=2, batch_size=8, lr=1e-3, precision="fp32", device="cpu", threads=1),
}


def pytest_collection_modifyitems(items):
    """The longest file first, so that of two processes none is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != LONGEST)


def make_config(**changes) -> RunConfig:
    """The tiny run; a mapping changes single keys of a section."""
    values = dict(PLAIN)
    for key, value in changes.items():
        values[key] = replace(values[key], **value) if isinstance(value, dict) else value
    return RunConfig(**values)


def make_mixed(**changes) -> RunConfig:
    """The tiny run, mixed: all kinds of studies, 8 x 8 and 4 x 4 tokens an image, all terms."""
    roles = changes.pop("roles", Roles(("mimic_cxr",), ("chestxray14",), (), 0.5))
    mixed = MixedModel(patch=4, scales=2, width=16, layers=2, heads=2, mask_ratio=0.5)
    loss = {**NOT_MIXED, "regeneration_weight": 1.0, "mlm_weight": 0.3, "alignment_weight": 0.5}
    values = {
        **{"image_encoder": None, "roles": roles, "mixed": mixed, "loss": Loss(**loss)},
        "datasets": (*roles.paired, *roles.images, *roles.texts),
    }
    for key, value in changes.items():
        values[key] = replace(values.get(key, PLAIN.get(key)), **value) if isinstance(value, dict) else value
    return make_config(**values)


def make_study(number: int, dataset: str = "mimic_cxr", split: str = "train") -> Study:
    """Study ``number``: 1 to 3 views; a report of two or one section, or labels."""
    positions = (("PA", "LATERAL"), ("AP",), ("PA", "PA", "LATERAL"), ("AP", "AP"))[number % 4]
    views = tuple(View(f"{dataset}-{number}-{i}", position) for i, position in enumerate(positions))
    ids = (dataset, f"p{number // 2}", f"s{number}", split, views)
    if dataset == "mimic_cxr":
        place, thing = PLACES[number % 8], THINGS[number % 6]
        findings = f"There is a {thing} at the {place}. The heart is normal. Image {number} is clear elsewhere."
        impression = f"A {thing} of the {place}. Nothing else in {number}."
        return Study(*ids, findings=findings, impression=None if number % 5 == 4 else impression)
    positive = {CLASSES[number % 14], CLASSES[(3 * number + 1) % 14]}
    labels = {c: int(c in positive) for c in CLASSES}
    if dataset == "chexpert":
        labels = {CLASSES[i]: (1, 0, -1)[(number + i) % 3] for i in range(number % 3 + 1)}
    return Study(*ids, labels=labels)


@pytest.fixture(scope="session")
def config():
    return make_config


@pytest.fixture(scope="session")
def prompts():
    """Every sentence tells its class, value and template, so that a caption can be taken apart again."""
    words = {1: "present", 0: "absent", -1: "possible"}
    pools = {c: {v: tuple(f"{c} {w} {k}." for k in range(4)) for v, w in words.items()} for c in CLASSES}
    pools["No Finding"] = {1: ("Normal chest.",), 0: (), -1: ()}
    return {"chexpert": PromptSentences(pools), "chestxray14": PromptSentences(pools)}


@pytest.fixture(scope="session")
def studies(tmp_path_factory):
    """24 training and 6 validation studies of reports, 8 and 4 of each label set, with random pictures in shards."""
    placed = []
    for dataset, counts in {"mimic_cxr": (24, 6), "chexpert": (8, 4), "chestxray14": (8, 4)}.items():
        with ShardWriter(tmp_path_factory.mktemp(dataset) / f"{dataset}-000000.tar") as writer:
            for number in range(sum(counts)):
                study = make_study(number, dataset, "train" if number < counts[0] else "valid")
                rng = np.random.default_rng([len(dataset), number])
                coarse = rng.integers(0, 256, (len(study.views), 5, 6), dtype=np.uint8)
                images = coarse.repeat(8, axis=1).repeat(8, axis=2)
                pictures = [EncodedPicture(encode(image, 95), image.shape[1], image.shape[0]) for image in images]
                placed.append(writer.write(study, pictures))
    return placed


def make_corpus(folder, run: RunConfig, studies, prompts):
    """What the corpus stage gives to training, made below ``folder``; where it is."""
    for dataset in run.datasets:
        write_studies(folder / "index" / f"{dataset}.parquet", [s for s in studies if s.dataset == dataset])
    for dataset, pools in prompts.items():
        pools.write_pools(folder / "prompts" / f"{dataset}.json")
    write_corpus(run, folder / "index", folder / "prompts", folder / "corpus")
    return folder / "corpus"


def run_python(code: str, *words: str, **env: str) -> str:
    """What a process of its own prints that runs ``code`` from the repository's root; it has to end well."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, cwd=root, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def in_steps(patch, steps, before=lambda method: None, after=lambda method: None):
    """Have something done to a training's method before, or after, it computes the gradients of some steps.

    Steps are counted from 1 over the whole training (None: all). How many there were so far, as a list of one number.
    """
    real, count = loop.compute_gradients, [0]

    def gradients(method, *rest):
        count[0] += 1
        chosen = steps is None or count[0] in steps
        if chosen:
            before(method)
        computed = real(method, *rest)
        if chosen:
            after(method)
        return computed

    patch.setattr(loop, "compute_gradients", gradients)
    return count


@pytest.fixture
def corpus(tmp_path, studies, prompts):
    return lambda run: make_corpus(tmp_path, run, studies, prompts)


@pytest.fixture
def s3(monkeypatch):
    """An S3 of the test's own, without a bucket, that ``s3://`` addresses lead to."""
    import s3fs
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    def forget():
        files.file_system.cache_clear()
        s3fs.S3FileSystem.clear_instance_cache()

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL_S3": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    forget()
    yield s3fs.S3FileSystem(skip_instance_cache=True)
    server.stop()
    forget()  # the next test's server is another one ...
    s3_backends[DEFAULT_ACCOUNT_ID]["aws"].reset()  # ... and servers of one process share what they hold


class Unread:
    """A standard input that nobody may read."""

    def __getattr__(self, name):
        raise AssertionError(f"stdin.{name}")


@pytest.fixture
def guard(tmp_path, monkeypatch):
    """Writes code into the folder it gives; what must not happen fails the test even if somebody catches the error."""
    seen, marker = [], tmp_path / "ran"

    def noted(what):
        def call(*args, **values):
            seen.append(what)
            raise OSError(what)

        return call

    monkeypatch.setattr(socket.socket, "connect", noted("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", noted("getaddrinfo"))
    monkeypatch.setattr(builtins, "input", noted("input"))
    monkeypatch.setattr(sys, "stdin", Unread())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as where nobody set the variable
    folder = tmp_path / "model"
    for place in (folder, folder / "text", folder / "tokenizer"):
        place.mkdir()
        (place / "planted.py").write_text(f"open({str(marker)!r}, 'w')\nPlanted = object\n")
    yield folder
    assert seen == [] and not marker.exists()
