"""Stage ``embed_other@name``: weights of somebody else's model and the test images -> data/embeddings/<name>."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import adapters
from pipeline.adapters.weights import MissingWeights
from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.evaluation import embed, protocols, store
from pipeline.evaluation.device import evaluation_device
from pipeline.tracking import mlflow_runs


def main(name: str) -> None:
    params = load_params()
    try:
        other = params.others[name]
    except KeyError:
        raise ParamsError(f"others.{name}: no such model in params.yaml") from None
    device = evaluation_device(params.evaluate.threads)
    out = Path("data/embeddings") / name
    with mlflow_runs.stage_run("embed_other", name, params.evaluate, params.tracking.enabled) as record:
        try:
            embedder = adapters.load_other(other, device, params.evaluate.batch_size)
        except MissingWeights as error:  # no failure: its cells show —
            store.write_missing(out, str(error))
            print(f"embed_other {name}: skipped: {error}")
            return
        first = protocols.load_protocol(params.evaluate.protocols[0])
        sets = protocols.retrieval_sets(first, params.sources).values()
        prompts = protocols.prompt_texts(params.evaluate.protocols)
        counts = embed.write_embeddings(embedder, prompts, sets, params.sources, Path("data/index"), out)
        record.metrics({key: float(value) for key, value in counts.items()})
    print(f"embed_other {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"embed_other {sys.argv[1]}: {error}")
