"""Stage ``zero_shot``: data/embeddings -> data/results/zero_shot/<run>/<seed>.json and .npz of every row."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.evaluation import protocols, store, zero_shot
from pipeline.evaluation.seen_images import load_seen_images
from pipeline.tracking import mlflow_runs


def main() -> None:
    params = load_params()
    out = Path("data/results/zero_shot")
    out.mkdir(parents=True, exist_ok=True)  # an output of the stage even where there is no run
    chosen = protocols.load_protocols(params.evaluate.protocols)
    seen = load_seen_images(Path("data/audit"))
    for name, trained_on in store.evaluated_rows(params).items():
        with mlflow_runs.stage_run("zero_shot", name, params.evaluate, params.tracking.enabled) as record:
            found = zero_shot.evaluate_zero_shot(
                Path("data/embeddings") / name,
                Path("data/index"),
                list(params.sources),
                chosen,
                params.evaluate.bootstrap,
                params.seed,
                seen,
                trained_on,
            )
            store.write_result(out / f"{name}.json", name, found)
            record.metrics(store.metric_values(found))
        store.print_metrics("zero_shot", name, found)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"zero_shot: {error}")
