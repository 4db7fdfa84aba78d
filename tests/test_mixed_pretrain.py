"""Trainings of mixed runs: the same bits again and after an interruption, and what evaluation gets of them."""

import csv
import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import stages.embed
from pipeline.config.params import Bootstrap
from pipeline.config.records import ParamsError
from pipeline.config.run_config import Roles, read_run_config
from pipeline.evaluation import embed, protocols, retrieval, zero_shot
from pipeline.evaluation.fine_tune import Classifier
from pipeline.evaluation.metric_key import read_key
from pipeline.models.checkpoint import load_model
from pipeline.models.hidden_cells import hidden_cells
from pipeline.models.mixed import MixedNet
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.index import write_studies
from pipeline.storage.shards import load_view
from pipeline.storage.unchanged import NOTE
from pipeline.text.tokenizer import Tokenizer
from pipeline.training import loop
from pipeline.training.batches import ValidationSet
from pipeline.training.distributed import Process
from pipeline.training.methods.mixed import MixedMethod
from pipeline.training.validation import Validation
from tests.conftest import make_mixed
from tests.test_resume import interrupt, outputs, stop, train

ROOT = Path(__file__).parents[1]
SETS = protocols.load_protocol("paper").retrieval
PROMPTS = ["There is a nodule at the apex.", "The heart is normal."]


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


class Killed(BaseException):
    """Leaves on disk what a kill leaves."""


def kill():
    raise Killed


def test_interrupted_and_whole_trainings_are_bit_identical(corpus, tmp_path, monkeypatch):
    """48 studies in batches of 9: an epoch ends within a batch. Killed in the first epoch and in the second one, with
    the state saved after each step; stopped by a signal in between."""
    folder = corpus(make_mixed(train={"save_minutes": 0.0, "batch_size": 9}))
    best = train(folder, tmp_path / "whole")
    for step in (3, 4):  # counted from where it goes on
        with monkeypatch.context() as patch:
            interrupt(patch, step, kill)
            with pytest.raises(Killed):
                train(folder, tmp_path / "broken")
    assert "in epoch 1 after step 2" in stop(folder, tmp_path / "broken", monkeypatch, step=2)
    assert train(folder, tmp_path / "broken") == best
    assert outputs(tmp_path / "broken") == outputs(tmp_path / "whole")
    rows, files = outputs(tmp_path / "whole")
    assert train(folder, tmp_path / "again") == best and outputs(tmp_path / "again") == (rows, files)
    with (tmp_path / "whole" / "history.csv").open() as handle:
        columns = next(csv.reader(handle))
    assert columns[5:9] == ["mlm", "regeneration", "alignment", "scale"] and all(
        float(row["alignment"]) > 0 for row in rows
    )
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_a_run_of_one_kind_alone(corpus, tmp_path, kind):
    """No pair, no other modality: it trains, and its model is no aligned one."""
    roles = Roles(**{kind: ("mimic_cxr",)})
    off = "mlm_weight" if kind == "images" else "regeneration_weight"
    folder = corpus(make_mixed(roles=roles, loss={"alignment_weight": 0.0, off: 0.0}, train={"epochs": 1}))
    train(folder, tmp_path / "out")
    net, tokenizer, run = load_model(tmp_path / "out" / "model")
    assert isinstance(net, MixedNet) and not run.aligned and run.roles == roles
    assert len(tokenizer) == len(Tokenizer.build(run.text_encoder, [])) if kind == "images" else len(tokenizer) > 100


def test_the_validation_loss_has_all_terms_and_hides_the_same_every_time(corpus):
    folder = corpus(make_mixed())
    config = read_run_config(folder / "run.json")
    t = loop._build(config, folder, folder / "work", Process(torch.device("cpu")), lambda *_: None)
    sets = t.validation.sets
    assert [len(v) for v in sets] == [len(v.studies) for v in sets] and isinstance(sets[0], ValidationSet)
    first, again = (t.validation.loss() for _ in range(2))
    assert first == again and t.method.net.training is False

    def with_weight(mlm):
        run = replace(config, loss=replace(config.loss, mlm_weight=mlm))
        return Validation(MixedMethod(t.method.net, t.tokenizer, run, t.process), sets, run).loss()

    values = [with_weight(0.6), with_weight(0.9)]
    assert values[0] - first == pytest.approx(values[1] - values[0]) and values[0] > first + 0.5


def test_a_loss_that_is_not_finite_names_its_studies(corpus, tmp_path, monkeypatch):
    folder = corpus(make_mixed())
    real = loop.compute_gradients
    monkeypatch.setattr(loop, "compute_gradients", lambda *a: real(*a)._replace(loss=torch.tensor(float("nan"))))
    monkeypatch.setattr(MixedMethod, "finite", lambda self, batch: torch.arange(batch.studies) != 3)
    with pytest.raises(
        FloatingPointError, match=r"in epoch 0 at step 0, from studies (mimic_cxr|chestxray14)/p\d+/s\d+;"
    ):
        train(folder, tmp_path)


def test_a_tokenizer_without_mask_is_refused(corpus, monkeypatch):
    folder = corpus(make_mixed())
    config = read_run_config(folder / "run.json")
    real = Tokenizer.build

    def without(*args):
        made = real(*args)
        made.tokenizer.mask_token = None
        return made

    monkeypatch.setattr(Tokenizer, "build", without)
    with pytest.raises(ParamsError, match=r"model\.text_encoder: its tokenizer has no \[MASK\]"):
        loop._build(config, folder, folder / "work", Process(torch.device("cpu")), lambda *_: None)


@pytest.fixture(scope="module")
def trained(studies, prompts, tmp_path_factory):
    """The model of a run with pairs, and an index whose studies are all tests."""
    from tests.conftest import make_corpus

    folder = tmp_path_factory.mktemp("trained")
    train(make_corpus(folder, make_mixed(train={"epochs": 1}), studies, prompts), folder)
    tests = [replace(s, split="test") for s in studies if s.dataset == "mimic_cxr"]
    write_studies(folder / "tests" / "mimic_cxr.parquet", tests)
    return folder / "model", folder / "tests", tests


def test_evaluation_sees_a_mixed_model_as_any_other(trained, tmp_path):
    model, index, tests = trained
    embedder = embed.from_checkpoint(model, batch_size=7)
    net, tokenizer, _ = load_model(model)
    assert embed.write_embeddings(embedder, PROMPTS, SETS.values(), ["mimic_cxr"], index, tmp_path) == {"mimic_cxr": 30}
    pictures = torch.from_numpy(np.stack([evaluation_crop(load_view(s.first_frontal), 32) for s in tests]))
    with torch.inference_mode():
        stored = np.load(tmp_path / "mimic_cxr.npz")
        assert np.abs(stored["images"] - net.encode_image(pictures).numpy()).max() < 1e-5
        rows = torch.cat([net.encode_text(*tokenizer([text])) for text in PROMPTS]).numpy()
        assert np.abs(np.load(tmp_path / "prompts.npz")["embeddings"] - rows).max() < 1e-5
        features = embedder.over(embedder.features, [s.first_frontal for s in tests])
        assert np.abs(features - net.image_features(pictures).numpy()).max() < 1e-4
        filled = net.regenerate(pictures[:2], hidden_cells(torch.arange(2), net.grid, 0.5), *tokenizer(PROMPTS))
    assert filled.shape == (2, 32, 32) and filled.dtype == torch.float32
    found = retrieval.evaluate_retrieval(tmp_path, index, ["mimic_cxr"], SETS, (1, 5), Bootstrap(samples=2), 0)
    assert found["metrics"][read_key("mimic_cxr_r5")].n == 30 and not found["notes"]
    assert embed.write_maps(net, embedder, 32, {}, ["mimic_cxr"], index, tmp_path) == 0
    assert net.encode_places(pictures) is None


def test_fine_tuning_moves_a_copy_of_the_image_side(trained):
    net, _, _ = load_model(trained[0])
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = Classifier(net.image_tower, 3).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    images = torch.randint(0, 256, (4, 32, 32), dtype=torch.uint8)
    model(images, torch.arange(4)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    own = {k.removeprefix("tower.net."): v for k, v in model.state_dict().items() if k.startswith("tower")}
    moved = {k for k, v in own.items() if not torch.equal(v, before[k])}
    assert {"scale_embeddings", "encoder.layers.0.linear1.weight", "pieces_in.0.weight"} <= moved
    assert not moved & {"word_embeddings.weight", "image_projection.weight", "pieces_out.0.weight"}


def test_a_model_that_saw_no_pair_has_no_zero_shot_and_no_retrieval(corpus, tmp_path, monkeypatch, capsys):
    """The stage leaves one line in the embeddings' place, and evaluation carries it on."""
    roles = Roles(images=("chestxray14",), texts=("mimic_cxr",))
    folder = corpus(make_mixed(roles=roles, loss={"alignment_weight": 0.0}, train={"epochs": 1}))
    train(folder, tmp_path / "data" / "models" / "some")
    model = tmp_path / "data" / "models" / "some" / "0"
    (tmp_path / "data" / "models" / "some" / "model").rename(model)
    raw = (ROOT / "params.yaml").read_text().replace("enabled: true", "enabled: false")
    (tmp_path / "params.yaml").write_text(raw)
    monkeypatch.chdir(tmp_path)
    settings = {"runs": ["some/0"], "map_sets": [], "protocols": ["paper"]}
    settings |= {key: ["mimic_cxr"] for key in ("sources", "test_sets")}
    (tmp_path / "data" / "settings" / "embed").mkdir(parents=True)
    (tmp_path / "data" / "settings" / "embed" / "runs.json").write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "argv", ["embed", "runs"])
    runpy.run_module("stages.embed", run_name="__main__")
    assert "embed some/0: skipped: not aligned: no pair in training" in capsys.readouterr().out
    out = tmp_path / "data" / "embeddings" / "runs" / "some" / "0"
    assert {p.name for p in out.iterdir()} == {"missing.json", NOTE}
    assert json.loads((out / "missing.json").read_text()) == {"missing": "not aligned: no pair in training"}
    # what DVC runs the stage again for, it embeds again for: the code is that of dvc.yaml, the script included
    deps = yaml.safe_load(stages.GRAPH.read_text())["stages"]["embed"]["deps"]
    assert "stages/embed.py" in deps and "pipeline/models" in deps
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "dvc.yaml").write_text("stages: {embed: {deps: [data/models, code.py]}}")
    monkeypatch.setattr(stages, "GRAPH", tmp_path / "dvc.yaml")
    for content, said in (("1", "skipped"), ("1", "as it was"), ("2", "skipped"), ("2", "as it was")):
        (tmp_path / "code.py").write_text(content)
        stages.embed.main("runs")
        assert f"embed some/0: {said}" in capsys.readouterr().out
    few = Bootstrap(samples=2)
    for found in (
        zero_shot.evaluate_zero_shot(out, tmp_path, ["mimic_cxr"], [], few, 0, {}, []),
        retrieval.evaluate_retrieval(out, tmp_path, ["mimic_cxr"], SETS, (1,), few, 0),
    ):
        assert found["notes"] == ["not aligned: no pair in training"] and not found["metrics"]
