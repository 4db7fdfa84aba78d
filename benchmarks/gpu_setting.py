"""What the parts of the check for a GPU share: models, data and a step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import (
    BERT_BASE,
    VOCABULARY,
    Words,
)
from pipeline.config.load import load_params
from pipeline.config.params import ImageEncoder, TextEncoder
from pipeline.config.run_config import RunConfig, run_config
from pipeline.models.cxr_clip import CxrClip
from pipeline.study import Study
from pipeline.training.batches import StudyDraw, TrainingSet
from pipeline.training.distributed import Process
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.step import apply_gradients, compute_gradients


@dataclass(frozen=True)
class Setting:
    """What all parts share: the device, whether models are tiny, made-up studies and processes of the loader."""

    device: torch.device
    tiny: bool
    studies: list[Study]
    workers: int
    folder: Path

    @property
    def half(self) -> str:
        """The precision that is timed: bf16, on the CPU fp32."""
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def batch(self) -> int:
        """Studies of a step: the paper's 128."""
        return 8 if self.tiny else 128

    def config(self, precision: str = "fp32", dropout: float = 0.1, **train: Any) -> RunConfig:
        """The paper's ResNet-50 and BERT-base with random weights; tiny ones instead."""
        config = run_config(load_params(Path("profiles/demo.yaml")), "resnet_m")
        drops = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        sizes = {key: value for key, value in config.text_encoder.args.items() if key != "embedding_size"}  # RoFormer's
        text = replace(config.text_encoder, args={"model_type": "bert", **sizes, **drops})
        if not self.tiny:
            bert = {"model_type": "bert", **BERT_BASE, **drops}
            text = TextEncoder("", VOCABULARY["paper"], bert, 256)
            config = replace(config, image_encoder=ImageEncoder("resnet50", False), image_size=224)
        options = {"batch_size": self.batch, "length_groups": 4, "precision": precision, **train}
        options |= {"device": self.device.type, "workers": self.workers}
        return replace(config, text_encoder=text, train=replace(config.train, **options))

    def words(self, config: RunConfig) -> Words:
        """A tokenizer that has nothing to look up."""
        return Words(config.text_encoder.vocabulary, config.text_encoder.max_tokens)

    def draws(self, config: RunConfig) -> list[StudyDraw]:
        """Those of one step."""
        data = TrainingSet(self.studies, {}, config)
        return [data[0, i % len(data)] for i in range(config.train.batch_size)]

    def method(self, config: RunConfig) -> CxrClipMethod:
        """CXR-CLIP with weights by a seed, on the device."""
        torch.manual_seed(0)
        net = CxrClip(config, config.text_encoder.vocabulary).train()
        return CxrClipMethod(net, self.words(config), config, Process(self.device))  # type: ignore[arg-type]


def optimizer_of(method: Any) -> torch.optim.Optimizer:
    """AdamW as trainings have it."""
    return torch.optim.AdamW(method.learner.parameters(), lr=1e-5, fused=True)


def unscaled(s: Setting) -> torch.amp.GradScaler:
    """A scaler that does nothing."""
    return torch.amp.GradScaler(s.device.type, enabled=False)


def take_step(method: Any, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, batch: Any) -> Tensor:
    """A step as the loop does it, but for reading its numbers."""
    optimizer.zero_grad(set_to_none=True)
    loss, *_ = compute_gradients(method, batch, scaler, lambda: [False, False])
    apply_gradients(method.learner, optimizer, scaler, loss)
    method.net.clamp_scale()
    return loss


def waits(s: Setting, method: Any, batch: Any) -> float:
    """How often a step makes Python wait for the device, as torch's own check counts."""
    if s.device.type != "cuda":
        return 0.0
    optimizer, off, steps = optimizer_of(method), unscaled(s), 4
    on = batch.to(s.device)
    take_step(method, optimizer, off, on)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(steps):
                take_step(method, optimizer, off, on)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = sum("synchroniz" in str(w.message) for w in said) / steps
    must(found <= 1, f"Python waits {found} times a step: {[str(w.message)[:200] for w in said][:3]}")
    return found


def wait(s: Setting) -> None:
    """Until the device is done."""
    if s.device.type == "cuda":
        torch.cuda.synchronize()


def must(holds: bool, what: str) -> None:
    """Raise ``AssertionError`` if something does not hold."""
    if not holds:
        raise AssertionError(what)
