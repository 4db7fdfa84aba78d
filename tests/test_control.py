"""The control: trained on shuffled image-text pairs, a model must stay at chance.

Retrieval shows it in a single run. A zero-shot AUC does not: the direction from "No X" to "X" is then a random one, and
what is random about it is the same for every image of a test set, so that one run may score .3 or .8. Over many
shuffles the mean is .5 if nothing leaks; the drill takes that mean.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.load import load_params
from pipeline.config.params import Bootstrap
from pipeline.config.run_config import run_config
from pipeline.datasets import used_for
from pipeline.evaluation import embed, protocols, retrieval, zero_shot
from pipeline.evaluation.metric_key import MetricKey, read_key
from tests.small_runs import ingested, trained

ROOT = Path(__file__).parents[1]


def control(folder: Path, profile: str, seeds: range, **studies: int) -> tuple[np.ndarray, np.ndarray]:
    """Train the profile's control run once a seed on one set of phantoms (``studies``: how many, where not as there).

    Returns:
        Macro zero-shot AUC over VinDr-CXR, RSNA and SIIM, and MIMIC-CXR R@10 as a multiple of chance; both [seeds].
    """
    p = load_params(ROOT / "profiles" / f"{profile}.yaml")
    datasets = ("mimic_cxr", *used_for("binary_classification"))
    index = ingested(folder, p, **{name: studies.get(name, p.phantom.archives[name]) for name in datasets})
    some = next(iter(p.runs)) if not p.control else p.control
    run = replace(run_config(p, some), datasets=("mimic_cxr",))
    run = replace(run, train=replace(run.train, shuffle_pairs=True, epochs=p.train.epochs))
    aucs, recalls = [], []
    for seed in seeds:
        out = folder / str(seed)
        model = trained(replace(run, seed=seed), index, out)
        chosen = protocols.load_protocols(p.evaluate.protocols[:1])
        prompts = protocols.prompt_texts(p.evaluate.protocols[:1])
        sets = chosen[0].retrieval
        embedder = embed.from_checkpoint(model)
        embed.write_embeddings(embedder, prompts, sets.values(), datasets, index, out / "embeddings")
        few = Bootstrap(samples=50)  # of fewer, none may have both classes of a small test set
        at = (out / "embeddings", index, list(datasets))
        scored = zero_shot.evaluate_zero_shot(*at, chosen, few, 0, {}, run.datasets)["metrics"]
        scores = [scored[MetricKey(name, "zero_shot", "auc")].value for name in used_for("binary_classification")]
        aucs.append(np.mean(scores))
        found = retrieval.evaluate_retrieval(*at, sets, (10,), few, 0)
        recall = found["metrics"][read_key("mimic_cxr_r10")].value
        recalls.append(recall / found["pools"]["mimic_cxr"]["chance"]["r10"])
    return np.array(aucs), np.array(recalls)


def test_a_shuffled_run_retrieves_at_chance(tmp_path):
    aucs, recalls = control(tmp_path, "micro", range(2), mimic_cxr=200)
    assert 0.5 <= recalls.mean() <= 2
    assert ((aucs > 0) & (aucs < 1)).all()


@pytest.mark.drill
def test_sixteen_shuffled_runs_are_at_chance_on_average(tmp_path):
    aucs, recalls = control(tmp_path, "demo", range(16))
    print(f"macro AUC mean {aucs.mean():.3f}, sd {aucs.std(ddof=1):.3f}, {aucs.min():.3f} to {aucs.max():.3f}")
    print(f"MIMIC R@10 / chance mean {recalls.mean():.2f}, {recalls.min():.2f} to {recalls.max():.2f}")
    assert abs(aucs.mean() - 0.5) <= 0.07
    assert (recalls <= 2).all()
