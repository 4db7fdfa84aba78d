"""Two controls of retrieval: trained on shuffled pairs, or on pairs taken apart, a model must stay at chance.

Retrieval shows it in a single run. A zero-shot AUC does not: the direction from "No X" to "X" is then a random one, and
what is random about it is the same for every image of a test set, so that one run may score .3 or .8. Over many
shuffles the mean is .5 if nothing leaks; the drill takes that mean.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.load import load_params
from pipeline.config.params import Bootstrap, Params
from pipeline.config.run_config import Roles, run_config
from pipeline.datasets import used_for
from pipeline.evaluation import embed, protocols, retrieval, zero_shot
from pipeline.evaluation.metric_key import MetricKey, read_key
from tests.small_runs import ingested, trained

ROOT = Path(__file__).parents[1]
FEW = Bootstrap(samples=200)  # of many fewer, none may have both classes of a small test set


@pytest.fixture(scope="module")
def micro(tmp_path_factory) -> tuple[Params, Path]:
    p = load_params(ROOT / "profiles/micro.yaml")
    return p, ingested(tmp_path_factory.mktemp("micro"), p, mimic_cxr=200)


def shuffled(p: Params, index: Path, seed: int, epochs: int, out: Path) -> Path:
    """Train the profile's control run (its first one if it has none) with texts of other studies: the model."""
    run = replace(run_config(p, p.control or next(iter(p.runs))), datasets=("mimic_cxr",), seed=seed)
    return trained(replace(run, train=replace(run.train, shuffle_pairs=True, epochs=epochs)), index, out)


def mixed(p: Params, index: Path, fraction: float, epochs: int, out: Path) -> Path:
    """Train a mixed run on pairs of which this share is whole: the model.

    Where none is, the two projections were never trained, and nobody else would ask them.
    """
    run = run_config(p, "mixed")
    weights = replace(run.loss, alignment_weight=1.0 if fraction else 0.0)
    roles = Roles(paired=("mimic_cxr",), paired_fraction=fraction)
    run = replace(run, roles=roles, datasets=("mimic_cxr",), loss=weights, train=replace(run.train, epochs=epochs))
    return trained(run, index, out)


def recall(model: Path, index: Path) -> dict[str, float]:
    """R@10 of MIMIC-CXR and its interval, as multiples of chance."""
    sets = {"mimic_cxr": protocols.load_protocol("paper").retrieval["mimic_cxr"]}
    at = model.with_name("pairs")
    embed.write_embeddings(embed.from_checkpoint(model), [], sets.values(), ["mimic_cxr"], index, at)
    found = retrieval.evaluate_retrieval(at, index, ["mimic_cxr"], sets, (10,), FEW, 0)
    r10 = found["metrics"][read_key("mimic_cxr_r10")]
    return {end: getattr(r10, end) / found["pools"]["mimic_cxr"]["chance"]["r10"] for end in ("value", "low", "high")}


def auc(model: Path, index: Path, p: Params, seen: tuple[str, ...]) -> float:
    """Zero-shot macro AUC, the mean over the data sets of one label."""
    chosen, prompts = (f(p.evaluate.protocols[:1]) for f in (protocols.load_protocols, protocols.prompt_texts))
    names = list(used_for("binary_classification"))
    at = model.with_name("images")
    embed.write_embeddings(embed.from_checkpoint(model), prompts, [], names, index, at)
    scored = zero_shot.evaluate_zero_shot(at, index, names, chosen, FEW, 0, {}, seen)["metrics"]
    return float(np.mean([scored[MetricKey(name, "zero_shot", "auc")].value for name in names]))


def test_a_shuffled_run_retrieves_at_chance(micro, tmp_path):
    p, index = micro
    found = [recall(shuffled(p, index, seed, 1, tmp_path / str(seed)), index)["value"] for seed in (0, 1)]
    assert 0.5 <= np.mean(found) <= 2


def test_pairs_taken_apart_retrieve_at_chance(micro, tmp_path):
    p, index = micro
    assert 0.2 <= recall(mixed(p, index, 0.0, 2, tmp_path), index)["value"] <= 2


@pytest.mark.drill
def test_sixteen_shuffled_runs_are_at_chance_on_average(tmp_path):
    p = load_params(ROOT / "profiles/demo.yaml")
    names = ("mimic_cxr", *used_for("binary_classification"))
    index = ingested(tmp_path, p, **{name: p.phantom.archives[name] for name in names})
    models = [shuffled(p, index, seed, p.train.epochs, tmp_path / str(seed)) for seed in range(16)]
    aucs = np.array([auc(model, index, p, ("mimic_cxr",)) for model in models])
    recalls = np.array([recall(model, index)["value"] for model in models])
    print(f"macro AUC mean {aucs.mean():.3f}, sd {aucs.std(ddof=1):.3f}, {aucs.min():.3f} to {aucs.max():.3f}")
    print(f"MIMIC R@10 / chance mean {recalls.mean():.2f}, {recalls.min():.2f} to {recalls.max():.2f}")
    assert abs(aucs.mean() - 0.5) <= 0.07
    assert (recalls <= 2).all()


@pytest.mark.drill
def test_pairs_retrieve_above_chance_and_the_same_data_apart_at_chance(tmp_path):
    p = load_params(ROOT / "profiles/demo.yaml")
    studies = ingested(tmp_path, p, mimic_cxr=p.phantom.archives["mimic_cxr"])
    whole = recall(mixed(p, studies, 1.0, 23, tmp_path / "pairs"), studies)
    apart = recall(mixed(p, studies, 0.0, 12, tmp_path / "apart"), studies)  # as many steps: each study is two
    for name, r in (("pairs", whole), ("apart", apart)):
        print(f"{name}: R@10 {r['value']:.2f} times chance ({r['low']:.2f} to {r['high']:.2f})")
    assert whole["low"] > 1 and apart["low"] <= 1 <= apart["high"]
