"""Stage ``pretrain@run``: data/corpus/<run> -> data/models/<run>, data/results/pretrain/<run>.csv."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline import params as config
from pipeline import pretrain, tracking


def main(name: str) -> None:
    params = config.load()
    run = config.run_config(params, name)
    first = os.environ.get("RANK", "0") == "0"
    with tracking.stage_run("pretrain", name, run, params.tracking.enabled and first) as record:
        history = Path("data/results/pretrain") / f"{name}.csv"
        best = pretrain.train(Path("data/corpus") / name, Path("data/models") / name, history, record.metrics)
        record.metrics({"best_valid_loss": best})
        if first:
            record.artifact(history)
            print(f"pretrain {name}: best validation loss {best:.4f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"pretrain {sys.argv[1]}: {error}")
