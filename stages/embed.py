"""Stage ``embed@run-seed``: data/models/<run>/<seed> and the test images -> data/embeddings/<run>/<seed>."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.evaluation import embed, protocols, store
from pipeline.evaluation.device import evaluation_device
from pipeline.models.checkpoint import load_model
from pipeline.tracking import mlflow_runs


def main(name: str) -> None:
    params = load_params()
    device = evaluation_device(params.evaluate.threads)
    names, index, out = params.evaluate.protocols, Path("data/index"), Path("data/embeddings") / name
    with mlflow_runs.stage_run("embed", name, params.evaluate, params.tracking.enabled) as record:
        net, tokenizer, run = load_model(Path("data/models") / name, device)
        if not run.aligned:  # no failure: its cells show —
            store.write_missing(out, embed.NOT_ALIGNED)
            print(f"embed {name}: skipped: {embed.NOT_ALIGNED}")
            return
        embedder = embed.embedder_of(net, tokenizer, run.image_size, params.evaluate.batch_size)
        first = protocols.load_protocol(names[0])
        sets = protocols.retrieval_sets(first, params.sources).values()
        counts = embed.write_embeddings(embedder, protocols.prompt_texts(names), sets, params.sources, index, out)
        classes = {t.rule.dataset: {c: texts[0] for c, texts in t.positive.items()} for t in first.tasks.values()}
        embed.write_maps(net, embedder, run.image_size, classes, params.sources, index, out)
        record.metrics({key: float(value) for key, value in counts.items()})
    print(f"embed {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m stages.embed RUN SEED")
    try:
        main("/".join(sys.argv[1:3]))
    except (ValueError, OSError) as error:
        sys.exit(f"embed {'/'.join(sys.argv[1:3])}: {error}")
