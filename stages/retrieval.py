"""Stage ``retrieval``: data/embeddings -> data/results/retrieval/<run>/<seed>.json and .npz of every row."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.evaluation import protocols, retrieval, store
from pipeline.evaluation.seen_images import clean_images, load_seen_images
from pipeline.tracking import mlflow_runs


def main() -> None:
    params = load_params()
    out = Path("data/results/retrieval")
    out.mkdir(parents=True, exist_ok=True)  # an output of the stage even where there is no run
    sets = protocols.retrieval_sets(protocols.load_protocol(params.evaluate.protocols[0]), params.sources)
    seen = load_seen_images(Path("data/audit"))
    for name, trained_on in store.evaluated_rows(params).items():
        with mlflow_runs.stage_run("retrieval", name, params.evaluate, params.tracking.enabled) as record:
            found = retrieval.evaluate_retrieval(
                Path("data/embeddings") / name,
                Path("data/index"),
                list(params.sources),
                sets,
                params.evaluate.retrieval.k,
                params.evaluate.bootstrap,
                params.seed,
                partial(clean_images, seen, trained_on=trained_on),
            )
            store.write_result(out / f"{name}.json", name, found)
            record.metrics(store.metric_values(found))
        store.print_metrics("retrieval", name, found)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"retrieval: {error}")
