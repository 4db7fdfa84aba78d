"""The methods of pre-training, one file each: what it draws, embeds and compares is in its file and nowhere else."""

from __future__ import annotations

from typing import Any

from pipeline.config.run_config import RunConfig
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.distributed import Process
from pipeline.training.method import Method
from pipeline.training.methods.cxr_clip import CxrClipMethod
from pipeline.training.methods.declip import DeclipMethod, has_declip_terms
from pipeline.training.methods.mixed import MixedMethod


def method_of(config: RunConfig, tokenizer: Tokenizer, process: Process) -> Method[Any]:
    """The method that a run's parameters ask for, with untrained weights: the only place that names methods."""
    if config.mixed:
        return MixedMethod.build(config, tokenizer, process)
    if has_declip_terms(config.loss):
        return DeclipMethod.build(config, tokenizer, process)
    return CxrClipMethod.build(config, tokenizer, process)
