"""Training from shards that are in an object store, not on this machine."""

import csv
from dataclasses import replace

import torch

from pipeline.training import loop
from tests.conftest import make_corpus


def far(studies, system):
    """The same studies, their shards in a bucket."""
    system.mkdir("bucket")
    address = {v.shard: f"s3://bucket/{v.shard.rpartition('/')[2]}" for s in studies for v in s.views}
    for shard, url in address.items():
        system.put_file(shard, url)
    return [s.with_views([replace(v, shard=address[v.shard]) for v in s.views]) for s in studies]


def train(folder, run, studies, prompts):
    """History without its times, and the weights' bytes."""
    loop.train_run(
        make_corpus(folder, run, studies, prompts),
        folder / "model",
        folder / "history.csv",
        folder / "work",
        lambda values, step: None,
    )
    with (folder / "history.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return rows, (folder / "model" / "model.safetensors").read_bytes()


def test_training_from_a_bucket_ends_with_the_same_bits(s3, config, studies, prompts, tmp_path):
    """Read by a process of the loader and, in validation, by the training itself, which forks another afterwards."""
    run = config(datasets=("mimic_cxr",), train={"workers": 1, "epochs": 2})
    threads = torch.get_num_threads()
    try:
        near = train(tmp_path / "near", run, studies, prompts)
        assert train(tmp_path / "far", run, far(studies, s3), prompts) == near
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    assert len(near[0]) == 2
