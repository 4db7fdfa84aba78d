"""Our training step against the release's way of doing it, and against the model alone: python -m benchmarks.step

Three ways to do a step on the same studies with the same architecture and optimizer, measured in turns:

- ours: the loader hands over a batch, texts are padded to their length group, one pass an encoder, dropout by study;
- ideal: the same pass on tensors that are ready on the device, with nothing around it but the optimizer;
- release: every text padded to the tokenizer's maximum, a pass for each view and each text, torch's own dropout.

Studies are made up: two views in JPEG shards with the short side of the profile (512, demo 96), which the loader's
processes read, crop and augment, and two sections whose lengths in tokens are log-normal (findings with median 65,
impression 25; a third of that for the demo). A first round warms up and is not counted. The last line is one JSON
object: ``step_ratio`` is release / ours, ``share_of_ideal`` ideal / ours, each the median over rounds, at ResNet-50 +
BERT-base size and, with ``_demo``, at the size of profiles/demo.yaml.

On a CUDA device, at the paper's size: python -m benchmarks.step --studies 128 --steps 20 --rounds 5 --workers 8
--precision fp16 (--compile for torch.compile). Without --device it takes CUDA where there is any.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import torch
from torch import Tensor

from pipeline.config.load import load_params
from pipeline.config.params import ImageEncoder, TextEncoder
from pipeline.config.run_config import RunConfig, run_config
from pipeline.models import encoders
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.keyed_dropout import Rows
from pipeline.storage.pictures import encode
from pipeline.storage.shards import EncodedPicture, ShardWriter
from pipeline.study import Study, View
from pipeline.training.batches import Batch, TrainingSet, training_batches
from pipeline.training.distributed import Process
from pipeline.training.losses import Embeddings, cxr_clip_loss
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.step import PRECISIONS, compute_gradients

BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VOCABULARY = {"paper": 28996, "demo": 2000}  # words: BioClinicalBERT's, the demo's
MEDIAN = {"paper": (65, 25), "demo": (22, 8)}  # tokens of findings and impression
SHORT_SIDE = {"paper": 512, "demo": 96}  # pixels


class Words:
    """A tokenizer that has nothing to look up: a word is an id."""

    def __init__(self, vocabulary: int, max_tokens: int) -> None:
        self.vocabulary, self.max_tokens = vocabulary, max_tokens
        # DeCLIP and mixed runs ask for these
        self.tokenizer = SimpleNamespace(mask_token_id=3, all_special_ids=[0, 1, 2, 3])

    def __len__(self) -> int:
        """Number of ids."""
        return self.vocabulary

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int64 [L]."""
        ids = [[zlib.crc32(word.encode()) % (self.vocabulary - 1) + 1 for word in text.split()] for text in texts]
        return [np.array(row[: self.max_tokens], dtype=np.int64) for row in ids]


def main() -> None:
    """Measure both sizes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4, help="a step, at ResNet-50 + BERT-base size")
    parser.add_argument("--steps", type=int, default=1, help="of each way in a round; ten times as many for the demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes of the loader")
    parser.add_argument("--precision", choices=("fp32", *PRECISIONS), default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    figures = {}
    for size in ("demo", "paper"):
        config = configuration(size, options)
        steps = options.steps if size == "paper" else 10 * options.steps
        with tempfile.TemporaryDirectory() as folder:
            spent = measure(config, size, Path(folder), steps, options.rounds, torch.device(options.device))
        seconds = {way: statistics.median(times) for way, times in spent.items()}
        print(f"{size}: " + ", ".join(f"{way} {1000 * s:.1f} ms a step" for way, s in seconds.items()), flush=True)
        suffix = "" if size == "paper" else "_demo"
        figures[f"step_ratio{suffix}"] = _median_ratio(spent["release"], spent["ours"])
        figures[f"share_of_ideal{suffix}"] = _median_ratio(spent["ideal"], spent["ours"])
        figures[f"studies_per_second{suffix}"] = round(config.train.batch_size / seconds["ours"], 2)
    print(json.dumps({**figures, **vars(options), "threads": torch.get_num_threads()}))


def configuration(size: str, options: argparse.Namespace) -> RunConfig:
    """The demo's run, or the paper's encoders with random weights."""
    config = run_config(load_params(Path("profiles/demo.yaml")), "resnet_m")
    changes = {"workers": options.workers, "precision": options.precision, "device": options.device.split(":")[0]}
    if size == "paper":
        config = replace(
            config,
            image_encoder=ImageEncoder("resnet50", False),
            text_encoder=TextEncoder("", VOCABULARY[size], {"model_type": "bert", **BERT_BASE}, 256),
            image_size=224,
        )
        changes |= {"batch_size": options.studies, "length_groups": 4, "compile": options.compile}
    return replace(config, train=replace(config.train, **changes))


def measure(
    config: RunConfig, size: str, folder: Path, steps: int, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds a step of each way in each round."""
    words = Words(VOCABULARY[size], config.text_encoder.max_tokens)
    data = TrainingSet(made_up_studies(folder, MEDIAN[size], SHORT_SIDE[size]) * config.train.batch_size, {}, config)
    torch.manual_seed(0)
    ours = CxrClip(config, words.vocabulary).to(device).train()
    with mock.patch.object(encoders, "draw_by_study", lambda *_: Rows()):  # dropout stays torch's own
        theirs = CxrClip(config, words.vocabulary).to(device).train()
    if config.train.compile:
        theirs.compile_towers()
    method = CxrClipMethod(ours, words, config, Process(device))  # type: ignore[arg-type]
    optimizers = {net: torch.optim.AdamW(net.parameters(), lr=config.train.lr, fused=True) for net in (ours, theirs)}
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")

    def update(net: CxrClip) -> None:
        scaler.step(optimizers[net])
        scaler.update()
        net.clamp_scale()

    def loop(loader: Iterator[Batch]) -> None:
        optimizers[ours].zero_grad(set_to_none=True)
        loss, parts, _ = compute_gradients(method, next(loader), scaler)
        update(ours)
        for number in (loss, *parts.values()):
            number.item()

    def alone(batches: Iterator[Batch]) -> None:
        optimizers[ours].zero_grad(set_to_none=True)
        scaler.scale(method.loss(next(batches))[0]).backward()
        update(ours)

    def release(batches: Iterator[Batch]) -> None:
        optimizers[theirs].zero_grad(set_to_none=True)
        scaler.scale(release_loss(theirs, next(batches), config)).backward()
        update(theirs)

    def stream() -> Iterator[Batch]:
        for epoch in count():
            yield from training_batches(data, method.collate, epoch, 0, 1, config.train.workers)

    spent: dict[str, list[float]] = {"ours": [], "ideal": [], "release": []}

    def timed(way: str, do: Callable[[Iterator[Batch]], None], batches: Iterator[Batch]) -> None:
        _wait(device)
        start = time.perf_counter()
        for _ in range(steps):
            do(batches)
        _wait(device)
        spent[way].append((time.perf_counter() - start) / steps)

    loader = stream()  # one for all rounds, whose processes stay ahead as they do in a long training
    for _ in range(rounds + 1):
        taken: list[Batch] = []  # the other two ways get the studies that ours was handed
        timed("ours", loop, (taken.append(batch) or batch for batch in loader))  # type: ignore[func-returns-value]
        ready = [batch.to(device) for batch in taken]
        timed("ideal", alone, iter(ready))
        timed("release", release, iter([padded_whole(batch, words.max_tokens) for batch in ready]))
    return {way: times[1:] for way, times in spent.items()}


def release_loss(net: CxrClip, batch: Batch, config: RunConfig) -> Tensor:
    """The objective by a pass for each view and each text; ``batch`` has one length group, padded to the maximum."""
    half = config.train.precision != "fp32"
    with torch.autocast(batch.images.device.type, PRECISIONS.get(config.train.precision), enabled=half):
        image1, image2 = (net.encode_image(images) for images in batch.images.split(batch.studies))
        tokens, mask = batch.tokens[0].split(batch.studies), batch.mask[0].split(batch.studies)
        text1, text2 = (net.encode_text(*text) for text in zip(tokens, mask, strict=True))
    return cxr_clip_loss(Embeddings(image1, text1, image2, text2), net.scale, config.loss)[0]


def padded_whole(batch: Batch, length: int) -> Batch:
    """The same studies as one group of texts in their order, [m * B, length]."""
    whole = []
    for groups in (batch.tokens, batch.mask):
        rows = torch.cat([torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in groups])
        whole.append((rows[batch.order],))
    return replace(batch, tokens=whole[0], mask=whole[1])


def made_up_studies(folder: Path, medians: tuple[int, int], side: int) -> list[Study]:
    """64 studies of two views of ``side`` x 39/32 ``side`` pixels and two sections, in a shard."""
    rng = np.random.default_rng(0)
    placed = []
    with ShardWriter(folder / "studies-000000.tar") as writer:
        for n in range(64):
            pictures = []
            for _ in range(2):
                coarse = rng.integers(0, 256, (40, 33), dtype=np.uint8)
                image = cv2.resize(coarse, (side, side * 39 // 32), interpolation=cv2.INTER_CUBIC)
                pictures.append(EncodedPicture(encode(image, 95), image.shape[1], image.shape[0]))
            findings, impression = (
                _text(rng, median, spread) for median, spread in zip(medians, (0.45, 0.7), strict=True)
            )
            views = (View(f"{n}-0", "PA"), View(f"{n}-1", "LATERAL"))
            study = Study("mimic_cxr", f"p{n}", f"s{n}", "train", views, findings=findings, impression=impression)
            placed.append(writer.write(study, pictures))
    return placed


def _text(rng: np.random.Generator, median: int, spread: float) -> str:
    """Sentences of ten words, as many words as a log-normal draw of at least four says."""
    words = [f"w{i}" for i in rng.integers(0, 5000, max(4, round(median * float(np.exp(spread * rng.normal())))))]
    return " ".join(word + "." * (i % 10 == 9 or i == len(words) - 1) for i, word in enumerate(words))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _median_ratio(above: list[float], below: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3)


if __name__ == "__main__":
    main()
