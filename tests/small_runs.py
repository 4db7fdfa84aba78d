"""A run from phantoms to its model, without DVC: what the tests and drills of whole trainings have in common."""

from pathlib import Path

from pipeline.config.archive_params import Source
from pipeline.config.params import Params
from pipeline.config.run_config import RunConfig
from pipeline.ingest.build import ingest_archive
from pipeline.phantom.archives import write_archive
from pipeline.training import corpus, loop


def ingested(folder: Path, p: Params, **studies: int) -> Path:
    """Phantoms of some archives, so many studies each, drawn and ingested as ``p`` says: the folder of indexes."""
    index = folder / "index"
    for name, count in studies.items():
        write_archive(name, folder / "phantom" / name, count, p.phantom.size, p.seed)
        source = Source(name, str(folder / "phantom" / name), "")
        places = (folder / "shards" / name, index / f"{name}.parquet", folder / "work" / name)
        ingest_archive(name, source, p.ingest, *places, p.seed)
    return index


def trained(run: RunConfig, index: Path, out: Path) -> Path:
    """Train a run on reports alone (no prompts): the folder of its model."""
    corpus.write_corpus(run, index, out / "no prompts", out / "corpus")
    loop.train_run(out / "corpus", out / "model", out / "history.csv", out / "work", lambda row, epoch: None)
    return out / "model"
