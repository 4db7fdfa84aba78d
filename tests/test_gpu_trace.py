"""What a step would do on a GPU, traced: kernels it starts, memory they touch, and how often Python waits for it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.step import BERT_BASE, MEDIAN, VOCABULARY
from pipeline.config.load import load_params
from pipeline.config.params import ImageEncoder, TextEncoder
from pipeline.config.run_config import RunConfig, run_config
from pipeline.training.batches import StudyDraw
from pipeline.training.distributed import Process
from pipeline.training.methods import method_of
from pipeline.training.step import apply_gradients, compute_gradients
from tests.conftest import RESNET, SWIN, make_config, make_mixed
from tests.mixed_steps import Ids
from tests.step_ranks import CASES
from tests.traced import CUDA, Trace, fake_cuda, onto_cuda

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
DECLIP = {**CASES["declip"]["loss"], "queue": 64}


class Many(Ids):
    """``Ids`` of as many words as a run's vocabulary says."""

    def __init__(self, config: RunConfig) -> None:
        self.size = config.text_encoder.vocabulary

    def __len__(self) -> int:
        return self.size


def drawn(config: RunConfig, studies: int) -> list[StudyDraw]:
    """Two images a study (a mixed run: one), and texts whose lengths are those of the step's benchmark. Of a mixed run
    every fourth study has no text, and every fourth one no image."""
    rng = np.random.default_rng(0)
    image = np.zeros((config.image_size, config.image_size), dtype=np.uint8)
    made = []
    for place in range(studies):
        lengths = [m * np.exp(s * rng.normal()) for m, s in zip(MEDIAN["paper"], (0.45, 0.7), strict=True)]
        texts = [" ".join(["7"] * int(np.clip(round(n), 4, config.text_encoder.max_tokens))) for n in lengths]
        images, key = [image, image], int(rng.integers(2**62))
        if config.mixed:
            images, texts = [image] * (place % 4 != 2), texts[: place % 4 != 3]
        made.append(StudyDraw(images, texts, place, key))
    return made


def traced(config: RunConfig, studies: int) -> Trace:
    """The second of two steps."""
    method = method_of(config, Many(config), Process(CPU))
    batch = method.collate(drawn(config, studies))
    method.learner.train()
    with fake_cuda() as mode:
        onto_cuda(method.learner)
        method.process = Process(CUDA)
        optimizer = torch.optim.AdamW(method.learner.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cuda", enabled=config.train.precision == "fp16")
        shown = batch.each(mode.from_tensor)
        for _ in range(2):
            with Trace() as trace:
                optimizer.zero_grad(set_to_none=True)
                loss, *_ = compute_gradients(method, shown, scaler, flags=lambda: [False, False])
                apply_gradients(method.learner, optimizer, scaler, loss)
    assert loss.device == CUDA
    assert all(p.grad is not None and p.grad.device == CUDA for p in method.learner.parameters())
    return trace


def test_the_papers_step_starts_few_kernels_and_waits_for_none():
    """ResNet-50 and BERT-base with dropout at B = 128 in four length groups. By torch's own operations the masks took
    9,900 of 14,300 launches, and 115 of 305 GB."""
    config = run_config(load_params(ROOT / "profiles" / "paper.yaml"), "resnet_m")
    bert = {"model_type": "bert", **BERT_BASE}
    config = replace(
        config,
        image_encoder=ImageEncoder("resnet50", False),
        text_encoder=TextEncoder("", VOCABULARY["paper"], bert, config.text_encoder.max_tokens),
        train=replace(config.train, precision="bf16"),
    )
    assert config.train.batch_size == 128 and config.train.length_groups == 4
    trace = traced(config, 128)
    there_and_back = 2 * 4  # of each group
    assert trace.launches["cxr::keyed_dropout"] == there_and_back * (1 + 2 * 12)  # embeddings, two of each layer
    assert trace.launches["cxr::keyed_attention"] == trace.launches["cxr::keyed_attention_backward"] / 2 == 4 * 12
    assert trace.launches.total() <= 4600
    assert trace.bytes <= 180e9
    assert not trace.waits


RUNS = {  # and launches of a step at most, of tiny models of two layers or stages
    "resnet": ({"image_encoder": replace(RESNET, args={**RESNET.args, "drop_path_rate": 0.2})}, 1260),
    "swin": ({"image_encoder": replace(SWIN, args={**SWIN.args, "drop_path_rate": 0.2})}, 1240),
    "declip": ({"loss": DECLIP}, 1630),
    "mixed": ({}, 1510),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("run", RUNS)
def test_a_step_of_any_method_waits_for_no_device_in_any_precision(run, precision):
    changes, most = RUNS[run]
    config = (make_mixed if run == "mixed" else make_config)(**changes, train={"precision": precision})
    text = {"model_type": "bert", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = replace(config, text_encoder=replace(config.text_encoder, args={**config.text_encoder.args, **text}))
    trace = traced(config, 8)
    assert not trace.waits
    assert trace.launches.total() <= most
