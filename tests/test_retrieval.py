"""Retrieval: ranks against brute force, degenerate encoders, clean queries, and the stage's results."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config.params import Bootstrap
from pipeline.evaluation import exact_ranks, protocols, retrieval
from pipeline.evaluation.candidates import candidate_texts
from pipeline.evaluation.exact_ranks import ITEMS, _products, _sortable, ranks, text_ranks
from pipeline.evaluation.metric_key import RSUM, read_key
from pipeline.evaluation.metrics import resamples
from pipeline.storage.index import write_studies
from pipeline.study import Study, View

ARCHIVES = ("chexpert", "mimic_cxr", "openi")
SETS = protocols.load_protocol("paper").retrieval


def study(name, findings=None, impression=None, positions=("PA",)):
    views = tuple(View(f"{name}{i}", p) for i, p in enumerate(positions))
    return Study("mimic_cxr", name, name, "test", views, findings, impression)


def brute_force(images, texts, targets):
    """Both ways' ranks from the whole matrix in extended precision."""
    cosines = images.astype(np.longdouble) @ texts.astype(np.longdouble).T
    own = cosines[np.arange(len(images)), targets]
    foreign = targets[:, None] != np.arange(len(texts))
    best = np.where(foreign, -np.inf, cosines).max(axis=0)
    return (cosines >= own[:, None]).sum(axis=1).tolist(), (1 + (foreign & (cosines >= best)).sum(axis=0)).tolist()


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def encoders(case):
    """Embeddings of 150 images and 90 texts, each text with at least one image, in a kind of space."""
    rng = np.random.default_rng(3)
    images, texts = rng.normal(size=(150, 12)), rng.normal(size=(90, 12))
    targets = rng.permutation(np.r_[np.arange(90), rng.integers(90, size=60)])
    if case == "trained":
        images += 2 * texts[targets]
    elif case == "cone":  # everything points the same way, as contrastive embeddings do
        images, texts = images / 50 + np.eye(12)[0], texts / 50 + np.eye(12)[0]
    elif case == "nearly collapsed":
        images, texts = images * 1e-6 + np.eye(12)[0], texts * 1e-6 + np.eye(12)[1]
    elif case == "duplicates":
        images, texts = images[rng.integers(20, size=150)], texts[rng.integers(15, size=90)]
    elif case == "integers":  # a few distinct cosines, all exact
        return (
            rng.integers(-1, 2, size=(150, 12)).astype("f4"),
            rng.integers(-1, 2, size=(90, 12)).astype("f4"),
            targets,
        )
    elif case == "one-hot":
        return (
            np.eye(12, dtype="f4")[rng.integers(12, size=150)],
            np.eye(12, dtype="f4")[rng.integers(12, size=90)],
            targets,
        )
    elif case == "collapsed":
        return np.ones((150, 12), "f4"), np.ones((90, 12), "f4"), targets
    elif case == "zero":
        return np.zeros((150, 12), "f4"), unit(texts), targets
    return unit(images), unit(texts), targets


CASES = ("random", "trained", "cone", "nearly collapsed", "duplicates", "integers", "one-hot", "collapsed", "zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_brute_force(case, dtype, monkeypatch):
    """In blocks of all shapes, whatever the first product is rounded to."""
    monkeypatch.setattr(exact_ranks, "_rough_dtype", lambda queries, items: dtype)
    images, texts, targets = encoders(case)
    forward, backward = brute_force(images, texts, targets)
    for queries, items in ((256, 4096), (37, 50), (70, 7)):
        monkeypatch.setattr(exact_ranks, "QUERIES", queries)
        monkeypatch.setattr(exact_ranks, "ITEMS", items)
        assert ranks(images, texts, targets).tolist() == forward
        assert text_ranks(images, texts, targets).tolist() == backward
    assert ranks(images, texts, targets).dtype == np.int64


def test_ranks_of_a_pool_large_enough_for_the_quick_product():
    rng = np.random.default_rng(0)
    texts = unit(rng.normal(size=(ITEMS + 5, 32)))
    targets = rng.integers(len(texts), size=700)
    images = unit(texts[targets] + rng.normal(size=(700, 32)) * 0.4)
    cosines = images.astype(float) @ texts.T.astype(float)
    own = cosines[np.arange(700), targets][:, None]
    assert np.abs(cosines - own)[cosines != own].min() > 1e-12  # no near tie: plain double precision is exact here
    assert ranks(images, texts, targets).tolist() == (cosines >= own).sum(axis=1).tolist()


def test_only_what_is_near_is_computed_again(monkeypatch):
    """The bounds are not so wide that all pairs are taken twice, nor so narrow that none is."""
    monkeypatch.setattr(exact_ranks, "_rough_dtype", lambda queries, items: torch.bfloat16)
    again, products = [], _products
    monkeypatch.setattr(exact_ranks, "_products", lambda *a: again.append(len(a[3])) or products(*a))
    rng = np.random.default_rng(1)
    images, texts = unit(rng.normal(size=(400, 128))), unit(rng.normal(size=(2000, 128)))
    ranks(images, texts, rng.integers(2000, size=400))
    assert 400 * 2 < sum(again) < 400 * 2000 / 20


def test_rounded_numbers_keep_their_order():
    """Both zeros are one: a product that ends as -0 is no less than a bound of 0."""
    values = torch.tensor([-3e38, -1.5, -1e-3, -1e-39, -0.0, 0.0, 1e-39, 1e-3, 1.0, 1.0078125, 3e38]).bfloat16()
    keys = _sortable(values.clone()).astype(int)
    assert (np.sign(keys[:, None] - keys) == torch.sign(values[:, None].double() - values.double()).numpy()).all()


def test_one_item_and_embeddings_that_are_broken():
    one, none = np.ones((1, 4), "f4"), np.zeros(1, dtype=np.int64)
    assert ranks(one, one, none).tolist() == text_ranks(one, one, none).tolist() == [1]
    with pytest.raises(ValueError, match="not finite"):
        ranks(one, np.array([[1, np.nan, 0, 0]], "f4"), none)
    with pytest.raises(ValueError, match="do not fit"):
        ranks(one, np.ones((1, 5), "f4"), none)
    with pytest.raises(ValueError, match="1 of 2 texts belong to no image"):
        text_ranks(one, np.ones((2, 4), "f4"), none)


def test_threads_are_as_many_afterwards():
    before = torch.get_num_threads()
    ranks(*encoders("random"))
    assert torch.get_num_threads() == before


def test_candidates_are_distinct_and_the_longer_section():
    studies = [
        study("a", "Clear lungs.", "Normal chest radiograph."),
        study("b", "Normal chest radiograph.", "Ok."),
        study("c"),
        study("d", "Only a lateral.", positions=("LATERAL",)),
        study("e", None, "Effusion.", positions=("LATERAL", "AP")),
    ]
    pool = candidate_texts(studies, SETS["mimic_cxr"])
    assert pool.texts == ["Normal chest radiograph.", "Effusion."]
    assert pool.queries == [0, 1, 4]
    assert pool.targets.tolist() == [0, 0, 1]
    for name, text in (("chexpert5x200", "Short."), ("mimic_cxr", "Long findings."), ("openi", "Long findings.")):
        assert candidate_texts([study("x", "Long findings.", "Short.")], SETS[name]).texts == [text]


def test_of_equally_long_sections_the_first_named_stands_for_the_study():
    both = [study("a", "four", "long")]
    for text, wanted in ((("findings", "impression"), "four"), (("impression", "findings"), "long")):
        assert candidate_texts(both, replace(SETS["openi"], text=text)).texts == [wanted]
    assert candidate_texts([study("a", "four")], replace(SETS["openi"], text=("impression",))).texts == []


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A test set each of 60 studies of 30 patients with 40 texts; the patients of the first six are not clean."""
    folder = tmp_path_factory.mktemp("retrieval")
    rng = np.random.default_rng(0)
    truth = {}
    for dataset in ARCHIVES:
        said = [f"text {i}" for i in rng.permutation([*range(40), *rng.integers(40, size=20)])]
        studies = [
            Study(dataset, f"p{i % 30}", f"s{i}", "test", (View(f"v{i}", "PA", shard="x", length=1),), None, said[i])
            for i in range(60)
        ]
        (folder / "index").mkdir(exist_ok=True)
        write_studies(folder / "index" / f"{dataset}.parquet", studies)
        pool = candidate_texts(studies, SETS["mimic_cxr"])
        texts = unit(rng.normal(size=(40, 8)))
        images = unit(texts[pool.targets] + rng.normal(size=(60, 8)))
        (folder / "model").mkdir(exist_ok=True)
        np.savez(folder / "model" / f"{dataset}.npz", images=images, texts=texts)
        truth[dataset] = (images, texts, pool.targets)
    return folder, truth


def is_clean(dataset, studies):
    return np.array([dataset != "openi" or int(s.patient[1:]) >= 6 for s in studies])


def evaluate(folder, model="model", clean=is_clean, sources=ARCHIVES, sets=SETS):
    return retrieval.evaluate_retrieval(
        folder / model, folder / "index", sources, sets, (1, 5, 10), Bootstrap(100), 0, clean
    )


def test_recalls_both_ways_of_all_and_of_clean_queries(evaluated):
    folder, truth = evaluated
    found = evaluate(folder)
    images, texts, targets = truth["openi"]
    forward, backward = (np.array(r) for r in brute_force(images, texts, targets))
    weights = resamples([f"p{i % 30}" for i in range(60)], Bootstrap(100), 0).astype(float)
    fresh = np.arange(60) % 30 >= 6
    first = np.array([targets.tolist().index(t) for t in range(40)])
    fresh_text = np.array([fresh[targets == t].all() for t in range(40)])
    for key, hits, w, kept in (
        ("openi_r5", forward <= 5, weights, fresh),
        ("openi_t2i_r5", backward <= 5, weights[:, first], fresh_text),
    ):
        whole, clean = (found["metrics"][read_key(f"{key}{end}")] for end in ("", "_clean"))
        assert whole.value == pytest.approx(hits.mean()) and whole.n == len(hits)
        assert whole.samples == pytest.approx((w * hits).sum(axis=1) / w.sum(axis=1))
        assert clean.value == pytest.approx(hits[kept].mean()) and clean.n == kept.sum()
        w = w[:, kept]
        assert clean.samples == pytest.approx((w * hits[kept]).sum(axis=1) / w.sum(axis=1))
    assert found["removed"] == {"chexpert5x200": 0, "mimic_cxr": 0, "openi": 12}
    measures = {key.name: m for key, m in found["metrics"].items()}
    assert {key.test_set for key in found["metrics"] if key.clean} == {"openi", ""}
    names = ("chexpert5x200", "mimic_cxr", "openi")
    for way in ("r", "t2i_r"):
        keys = [f"{name}_{way}{n}" for name in names for n in (1, 5, 10)]
        total = measures[f"{way}sum"]
        assert total.value == pytest.approx(sum(measures[k].value for k in keys)) and total.n is None
        cleaned = [measures.get(f"{k}_clean", measures[k]).value for k in keys]
        assert measures[f"{way}sum_clean"].value == pytest.approx(sum(cleaned))
        assert total.samples == pytest.approx(sum(measures[k].samples for k in keys))


def test_another_protocols_rule_is_followed(evaluated):
    """Findings, which no study has, find nothing; sets have the protocol's names, and sums are over all of its sets."""
    folder, truth = evaluated
    mine = {"reports": SETS["openi"], "none": replace(SETS["mimic_cxr"], text=("findings",))}
    found = evaluate(folder, sets=mine)
    assert found["notes"] == ["none: no test study with a text"] and RSUM["i2t"] not in found["metrics"]
    assert {key.test_set for key in found["metrics"]} == set(found["pools"]) == {"reports"}
    alone = evaluate(folder, sets={"reports": SETS["openi"]})
    values = {key.name: m.value for key, m in alone["metrics"].items()}
    assert values["rsum"] == pytest.approx(sum(values[f"reports_r{k}"] for k in (1, 5, 10)))
    assert values["reports_r5"] == np.mean(np.array(brute_force(*truth["openi"])[0]) <= 5)
    assert evaluate(folder, sets={})["metrics"] == {}


def test_nothing_to_remove_leaves_no_clean_column(evaluated):
    found = evaluate(evaluated[0], clean=None)
    assert not any(key.clean for key in found["metrics"])
    assert set(found["removed"].values()) == {0}
    nothing = evaluate(evaluated[0], clean=lambda dataset, studies: np.array([dataset == "openi"] * len(studies)))
    assert not any(key.clean for key in nothing["metrics"])  # of two sets nothing is left: no clean sum either
    assert sum("no clean test image" in note for note in nothing["notes"]) == 2
    assert nothing["removed"]["mimic_cxr"] == 60


def test_a_model_without_weights_and_embeddings_of_another_index(evaluated):
    folder, _ = evaluated
    (folder / "absent").mkdir()
    (folder / "absent" / "missing.json").write_text(json.dumps({"missing": "put x.pt into weights/x"}))
    found = evaluate(folder, "absent")
    assert found["notes"] == ["put x.pt into weights/x"]
    assert found["metrics"] == {}
    (folder / "short").mkdir()
    with pytest.raises(ValueError, match="not found; run: dvc repro embed"):
        evaluate(folder, "short")
    np.savez(folder / "short" / "chexpert.npz", images=np.ones((59, 2)), texts=np.ones((40, 2)))
    with pytest.raises(ValueError, match="59 images and 40 texts for 60 test studies and 40 texts; embed again"):
        evaluate(folder, "short", sources=("chexpert",))
