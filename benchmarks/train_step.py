"""Time of one training step by part, on the corpus of a run: python -m benchmarks.train_step resnet_mcc [steps].

The last line is one JSON object: seconds a step spent on data, gradients (forward and backward) and optimizer, and
studies per second.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from pipeline.config.run_config import read_run_config
from pipeline.storage.index import read_studies
from pipeline.text.prompts import read_pools
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.batches import TrainingSet, epoch_draws
from pipeline.training.distributed import Process
from pipeline.training.methods import method_of
from pipeline.training.step import compute_gradients


def main(run: str, steps: int) -> None:
    """Time ``steps`` steps after two of warm-up, on the CPU or the first CUDA device."""
    corpus = Path("data/corpus") / run
    config = read_run_config(corpus / "run.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    studies = read_studies(corpus / "studies.parquet", ("train",))
    prompts = {path.stem: read_pools(path) for path in sorted((corpus / "prompts").glob("*.json"))}
    tokenizer = Tokenizer.build(config.text_encoder, [s.findings or s.impression or "normal" for s in studies])
    method = method_of(config, tokenizer, Process(device))
    method.learner.train()
    optimizer = torch.optim.AdamW(method.learner.parameters(), lr=config.train.lr)
    data = TrainingSet(studies, prompts, config)
    order = epoch_draws(len(data), config.train.batch_size, config.seed, 0)
    spent = dict.fromkeys(("data", "gradients", "optimizer"), 0.0)

    def lap(part: str, since: float, counted: bool) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        spent[part] += (now - since) * counted
        return now

    for step in range(steps + 2):
        counted = step >= 2
        now = time.perf_counter()
        batch = method.collate([data[draw] for draw in order[step % len(order)]])
        now = lap("data", now, counted)
        optimizer.zero_grad(set_to_none=True)
        compute_gradients(method, batch)
        now = lap("gradients", now, counted)
        optimizer.step()
        lap("optimizer", now, counted)
    figures = {f"{part}_s": round(seconds / steps, 4) for part, seconds in spent.items()}
    figures["studies_per_second"] = round(config.train.batch_size * steps / sum(spent.values()), 1)
    print(json.dumps({"run": run, "device": device.type, "threads": torch.get_num_threads(), **figures}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
