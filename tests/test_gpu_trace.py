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
from pipeline.models.cxr_clip import CxrClip
from pipeline.training.batches import StudyDraw, collate
from pipeline.training.distributed import Process
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.step import apply_gradients, compute_gradients
from tests.conftest import RESNET, SWIN, make_config
from tests.mixed_steps import Ids
from tests.traced import CUDA, Trace, fake_cuda, onto_cuda

ROOT = Path(__file__).parents[1]


def batch_of(config: RunConfig, studies: int):
    """Two images a study, and texts whose lengths are those of the step's benchmark."""
    rng = np.random.default_rng(0)
    image = np.zeros((config.image_size, config.image_size), dtype=np.uint8)
    drawn = []
    for place in range(studies):
        lengths = [m * np.exp(s * rng.normal()) for m, s in zip(MEDIAN["paper"], (0.45, 0.7), strict=True)]
        texts = [" ".join(["1"] * int(np.clip(round(n), 4, config.text_encoder.max_tokens))) for n in lengths]
        drawn.append(StudyDraw([image, image], texts, place, int(rng.integers(2**62))))
    return collate(drawn, Ids(), config.train.length_groups)


def traced(config: RunConfig, studies: int) -> Trace:
    """The second of two steps."""
    net, batch = CxrClip(config, config.text_encoder.vocabulary).train(), batch_of(config, studies)
    with fake_cuda() as mode:
        onto_cuda(net)
        method = CxrClipMethod(net, Ids(), config, Process(CUDA))
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        shown = batch.each(mode.from_tensor)
        for _ in range(2):
            with Trace() as trace:
                optimizer.zero_grad(set_to_none=True)
                loss, *_ = compute_gradients(method, shown, flags=lambda: [False, False])
                apply_gradients(net, optimizer, scaler, loss)
    assert loss.device == CUDA and all(p.grad is not None and p.grad.device == CUDA for p in net.parameters())
    return trace


def test_the_papers_step_starts_few_kernels_and_waits_for_none():
    """ResNet-50 and BERT-base with dropout at B = 128 in four length groups. By torch's own operations the masks took
    9,900 of 14,300 launches, and 115 of 305 GB."""
    paper = load_params(ROOT / "profiles" / "paper.yaml")
    config = run_config(paper, "resnet_m")
    bert = {"model_type": "bert", **BERT_BASE}
    config = replace(
        config,
        image_encoder=ImageEncoder("resnet50", False),
        text_encoder=TextEncoder("", VOCABULARY["paper"], bert, config.text_encoder.max_tokens),
        train=replace(config.train, precision="bf16"),
    )
    assert config.train.batch_size == 128 and config.train.length_groups == 4
    trace = traced(config, 128)
    assert trace.launches["cxr::keyed_dropout"] == 2 * 4 * (
        1 + 3 * 12
    )  # there and back, a group: embeddings, 12 layers
    assert trace.launches.total() <= 5500
    assert trace.bytes <= 200e9
    assert not trace.waits


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("encoder", [RESNET, SWIN])
def test_a_step_runs_on_a_gpu_in_every_precision(encoder, precision):
    drop = {"args": {**encoder.args, "drop_path_rate": 0.2}}
    text = {"model_type": "bert", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config = make_config(image_encoder=replace(encoder, **drop), train={"precision": precision})
    config = replace(config, text_encoder=replace(config.text_encoder, args={**config.text_encoder.args, **text}))
    assert not traced(config, 8).waits
