"""Everything a first GPU has to prove, in minutes: python -m benchmarks.gpu

Each part has a deadline of its own and ends with a JSON line; the last line is all of them. A part that fails says why
and the others go on; the exit status is then 1. On data it makes itself, without DVC and MLflow.

    environment   versions, the device, what torch was built for
    masks         keyed dropout has the same bits as on the CPU, and attention as one operation the same values
    precision     steps in bf16 and fp16 against fp32; micro-batches against the whole; a scale of 2^40 comes down;
                  gradients that are not finite end a training; Python waits for the device once a step at most
    collectives   each one we use, and a DDP step, over one process
    speed         ms, studies/s, kernels, CPU ms, peak GB and MFU of a step at the paper's size and batch: bf16, fp16,
                  fp32 and with TF32, attention by torch's operations, convolutions whose algorithms are not timed,
                  torch's own dropout, compiled, 8 length groups, 16 studies, and the release's way
    methods       Swin-Tiny, DeCLIP and mixed, and how often each waits for the device
    training      the loop with workers from shards, stopped by SIGTERM and taken up again
    evaluation    embeddings, a probe's features, fine-tuning

With --device cpu --tiny all of it runs on small models on the CPU, where the figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_correct import collectives, environment, masks, precision
from benchmarks.gpu_setting import Setting
from benchmarks.gpu_speed import evaluation, methods, speed, training
from benchmarks.step import MEDIAN, SHORT_SIDE, made_up_studies
from pipeline.config.devices import cuda_device

DEADLINES = {  # seconds
    **{"environment": 20, "masks": 40, "precision": 80, "collectives": 40},
    **{"speed": 180, "methods": 60, "training": 60, "evaluation": 60},
}
PARTS: tuple[Callable[[Setting], dict[str, Any]], ...] = (
    *(environment, masks, precision, collectives),
    *(speed, methods, training, evaluation),
)


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Raise ``TimeoutError`` in here after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    """Run the parts that are asked for, all of them unless named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(part.__name__ for part in PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--workers", type=int, default=None, help="processes of the loader (8; with --tiny 1)")
    asked = parser.parse_args()
    if unknown := set(asked.parts) - {part.__name__ for part in PARTS}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    device = cuda_device(0, "--device") if asked.device == "cuda" else torch.device(asked.device)
    workers = asked.workers if asked.workers is not None else 1 if asked.tiny else 8
    whole: dict[str, Any] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        size = "demo" if asked.tiny else "paper"
        studies = made_up_studies(Path(folder), MEDIAN[size], SHORT_SIDE[size])
        setting = Setting(device, asked.tiny, studies, workers, Path(folder))
        for part in (p for p in PARTS if not asked.parts or p.__name__ in asked.parts):
            start = time.perf_counter()
            try:
                with deadline(DEADLINES[part.__name__]):
                    found = part(setting)
            except Exception as error:  # of this part; the others go on
                found = {"error": f"{type(error).__name__}: {error}"[:2000]}
            found["seconds"] = round(time.perf_counter() - start, 1)
            whole[part.__name__] = found
            print(json.dumps({part.__name__: found}), flush=True)
    failed = [name for name, found in whole.items() if "error" in found]
    print(json.dumps({**whole, "failed": failed, "seconds": round(time.perf_counter() - began, 1)}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
