"""Stage ``embed@run``: data/models/<run> and the test images -> data/embeddings/<run>."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pipeline import embed, model, protocols, tracking
from pipeline import params as config


def main(name: str) -> None:
    params = config.load()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tracking.stage_run("embed", name, params.evaluate, params.tracking.enabled) as record:
        net, tokenizer, run = model.load(Path("data/models") / name, device)
        counts = embed.embed(
            net,
            tokenizer,
            run.image_size,
            params.sources,
            Path("data/index"),
            protocols.prompt_texts(params.evaluate.protocols),
            params.evaluate.batch_size,
            device,
            Path("data/embeddings") / name,
        )
        record.metrics({key: float(value) for key, value in counts.items()})
    print(f"embed {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except ValueError as error:
        sys.exit(f"embed {sys.argv[1]}: {error}")
