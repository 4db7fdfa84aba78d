"""Pairs are what aligns images and texts: the same data taken apart must leave retrieval at chance."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import params
from pipeline.config.load import load_params
from pipeline.config.params import Bootstrap
from pipeline.config.run_config import Roles, run_config
from pipeline.evaluation import embed, protocols, retrieval
from pipeline.evaluation.metric_key import read_key
from tests.small_runs import ingested, trained

ROOT = Path(__file__).parents[1]


def recall(p: params.Params, index: Path, fraction: float, out: Path, **train: float) -> dict[str, float]:
    """R@10 of MIMIC-CXR and its interval, as multiples of chance, of a mixed run on pairs of which this share is whole.

    Where none is, the two projections were never trained, and nobody else would ask them.
    """
    run = run_config(p, "mixed")
    roles = Roles(paired=("mimic_cxr",), paired_fraction=fraction)
    weights = replace(run.loss, alignment_weight=1.0 if fraction else 0.0)
    run = replace(run, roles=roles, datasets=("mimic_cxr",), loss=weights, train=replace(run.train, **train))
    model = trained(run, index, out)
    sets = {"mimic_cxr": protocols.load_protocol("paper").retrieval["mimic_cxr"]}
    embed.write_embeddings(embed.from_checkpoint(model), [], sets.values(), ["mimic_cxr"], index, out / "embeddings")
    found = retrieval.evaluate_retrieval(
        out / "embeddings", index, ["mimic_cxr"], sets, (10,), Bootstrap(samples=200), 0
    )
    chance = found["pools"]["mimic_cxr"]["chance"]["r10"]
    recall = found["metrics"][read_key("mimic_cxr_r10")]
    return {end: getattr(recall, end) / chance for end in ("value", "low", "high")}


def test_pairs_taken_apart_retrieve_at_chance(tmp_path):
    p = load_params(ROOT / "profiles/micro.yaml")
    assert 0.2 <= recall(p, ingested(tmp_path, p, mimic_cxr=200), 0.0, tmp_path / "apart")["value"] <= 2


@pytest.mark.drill
def test_pairs_retrieve_above_chance_and_the_same_data_apart_at_chance(tmp_path):
    p = load_params(ROOT / "profiles/demo.yaml")
    studies = ingested(tmp_path, p, mimic_cxr=p.phantom.archives["mimic_cxr"])
    whole = recall(p, studies, 1.0, tmp_path / "pairs", epochs=23)
    apart = recall(p, studies, 0.0, tmp_path / "apart", epochs=12)  # as many steps: each study is two
    for name, r in (("pairs", whole), ("apart", apart)):
        print(f"{name}: R@10 {r['value']:.2f} times chance ({r['low']:.2f} to {r['high']:.2f})")
    assert whole["low"] > 1 and apart["low"] <= 1 <= apart["high"]
