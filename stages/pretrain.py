"""Stage ``pretrain@run``: data/corpus/<run> -> data/models/<run>, data/results/pretrain/<run>.csv.

Exit status: 0 done; 75 a signal stopped it and the next start goes on; else it failed, and one line says why.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipeline import params as config
from pipeline import pretrain, resume, tracking


def main(name: str) -> None:
    params = config.load()
    run = config.run_config(params, name)
    first = os.environ.get("RANK", "0") == "0"
    with tracking.stage_run("pretrain", name, run, params.tracking.enabled and first) as record:
        history = Path("data/results/pretrain") / f"{name}.csv"
        corpus, out = (Path("data") / part / name for part in ("corpus", "models"))
        best = pretrain.train(corpus, out, history, tracking.work(f"pretrain/{name}"), record.metrics)
        record.metrics({"best_valid_loss": best})
        if first:
            record.artifact(history)
            print(f"pretrain {name}: best validation loss {best:.4f}")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except resume.Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"pretrain {sys.argv[1]}: {stopped}", file=sys.stderr)
        sys.exit(resume.EXIT_STOPPED)
    except (ValueError, FloatingPointError, resume.StateError) as error:
        sys.exit(f"pretrain {sys.argv[1]}: {error}" if str(error) else 1)  # one rank says it for all
