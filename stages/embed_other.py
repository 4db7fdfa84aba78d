"""Stage ``embed_other@name``: weights of somebody else's model and the test images -> data/embeddings/<name>."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline import adapters, embed, evaluation, protocols, tracking
from pipeline import params as config
from pipeline.adapters.checkpoint import MissingWeights


def main(name: str) -> None:
    params = config.load()
    try:
        other = params.others[name]
    except KeyError:
        raise config.ParamsError(f"others.{name}: no such model in params.yaml") from None
    device = evaluation.device(params.evaluate.threads)
    out = Path("data/embeddings") / name
    with tracking.stage_run("embed_other", name, params.evaluate, params.tracking.enabled) as record:
        try:
            embedder = adapters.load(other, device, params.evaluate.batch_size)
        except MissingWeights as error:  # no failure: its cells show —
            evaluation.write_missing(out, str(error))
            print(f"embed_other {name}: skipped: {error}")
            return
        first = protocols.load(params.evaluate.protocols[0])
        sets = protocols.retrieval_sets(first, params.sources).values()
        prompts = protocols.prompt_texts(params.evaluate.protocols)
        counts = embed.embed(embedder, prompts, sets, params.sources, Path("data/index"), out)
        record.metrics({key: float(value) for key, value in counts.items()})
    print(f"embed_other {name}: " + ", ".join(f"{key} {value}" for key, value in counts.items()))


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (ValueError, OSError) as error:
        sys.exit(f"embed_other {sys.argv[1]}: {error}")
