"""Time of one training step by part, on the corpus of a run: python -m benchmarks.train_step resnet_mcc [steps].

The last line is one JSON object: seconds a step spent on data, forward, backward and optimizer, and studies per second.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from pipeline.config.run_config import read_run_config
from pipeline.models.cxr_clip import CxrClip
from pipeline.storage.index import read_studies
from pipeline.text.prompts import read_pools
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.batches import TrainingSet, collate, epoch_draws
from pipeline.training.step import training_loss


def main(run: str, steps: int) -> None:
    """Time ``steps`` steps after two of warm-up, on the CPU or the first CUDA device."""
    corpus = Path("data/corpus") / run
    config = read_run_config(corpus / "run.json")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    studies = read_studies(corpus / "studies.parquet", ("train",))
    prompts = {path.stem: read_pools(path) for path in sorted((corpus / "prompts").glob("*.json"))}
    tokenizer = Tokenizer.build(config.text_encoder, [s.findings or s.impression or "normal" for s in studies])
    net = CxrClip(config, len(tokenizer)).to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=config.train.lr)
    data = TrainingSet(studies, prompts, config)
    order = epoch_draws(len(data), config.train.batch_size, config.seed, 0)
    spent = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0)

    def lap(part: str, since: float, counted: bool) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        spent[part] += (now - since) * counted
        return now

    for step in range(steps + 2):
        counted = step >= 2
        now = time.perf_counter()
        batch = collate([data[draw] for draw in order[step % len(order)]], tokenizer, config.train.length_groups)
        now = lap("data", now, counted)
        loss, _ = training_loss(net, batch, config, device, world=1)
        now = lap("forward", now, counted)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        now = lap("backward", now, counted)
        optimizer.step()
        lap("optimizer", now, counted)
    figures = {f"{part}_s": round(seconds / steps, 4) for part, seconds in spent.items()}
    figures["studies_per_second"] = round(config.train.batch_size * steps / sum(spent.values()), 1)
    print(json.dumps({"run": run, "device": device.type, "threads": torch.get_num_threads(), **figures}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 20)
