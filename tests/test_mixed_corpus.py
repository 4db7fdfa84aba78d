"""What mixed runs are made of: parameters and their errors, roles, broken pairs, batches."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import yaml

from pipeline.config.load import load_params
from pipeline.config.records import ParamsError
from pipeline.config.run_config import Roles, read_run_config, run_config, write_run_config
from pipeline.storage.index import read_studies, write_studies
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.batches import TrainingSet, ValidationSet, epoch_draws, training_batches, validation_parts
from pipeline.training.corpus import whole, write_corpus
from pipeline.training.methods.mixed import collate_mixed
from tests.conftest import make_mixed, make_study
from tests.test_params import RAW

ROLES = Roles(("mimic_cxr",), ("chestxray14",), (), 0.5)


def raw(**run):
    """params.yaml with a mixed run; a key "model.mixed" or "train" changes a section."""
    made = json.loads(json.dumps(RAW))
    for name in ("chestxray14", "openi"):
        made["sources"][name] = {"reader": name, "path": "a", "stamp": "b"}
    made["sources"]["openi_by_patient"] = {**made["sources"]["openi"], "split": "patient"}
    made["sources"]["openi"].update(run.pop("openi", {}))
    made["model"].update(mixed={"patch": 28, "scales": 2, "width": 16, "heads": 2, **run.pop("shape", {})})
    made["train"].update(run.pop("section", {}))
    some = {"paired": ["mimic_cxr"], "images": ["chestxray14"], "loss": {"regeneration_weight": 1.0}}
    run = {key: value for key, value in {**some, **run}.items() if value is not None}
    made["runs"]["some"] = run
    return made


def load(tmp_path, made):
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(made))
    return load_params(path)


def test_a_mixed_run_has_roles_and_no_image_encoder(tmp_path):
    record = load(tmp_path, raw(texts=["openi_by_patient"], paired_fraction=0.25))
    config = run_config(record, "some")
    assert config.roles == Roles(("mimic_cxr",), ("chestxray14",), ("openi_by_patient",), 0.25)
    assert config.datasets == record.runs["some"].datasets == ("mimic_cxr", "chestxray14", "openi_by_patient")
    assert config.image_encoder is None and config.mixed.patch == 28
    assert (config.loss.mvs, config.loss.mvs_weight, config.loss.tcl_weight) == (False, 0.0, 0.0)
    write_run_config(tmp_path / "run.json", config)
    assert read_run_config(tmp_path / "run.json") == config
    plain = run_config(record, "plain")
    assert plain.roles is None and plain.mixed is None and plain.aligned
    write_run_config(tmp_path / "run.json", plain)
    assert read_run_config(tmp_path / "run.json") == plain


@pytest.mark.parametrize(
    ("run", "aligned"),
    [
        ({}, False),
        ({"loss": {"alignment_weight": 1.0}}, True),
        ({"loss": {"alignment_weight": 1.0}, "paired_fraction": 0.1}, True),
    ],
)
def test_which_runs_are_aligned(tmp_path, run, aligned):
    assert run_config(load(tmp_path, raw(**run)), "some").aligned is aligned


ON = {"regeneration_weight": 1.0}
BAD = [
    ({"image_encoder": "resnet"}, r"runs\.some: a mixed run \(paired, images, texts\) has no image_encoder and no"),
    ({"datasets": ["mimic_cxr"]}, r"runs\.some: a mixed run \(paired, images, texts\) has no image_encoder and no"),
    ({"paired": None, "images": None}, r"runs\.some: no source in any role; name paired, images or texts, or datasets"),
    ({"texts": ["mimic_cxr"]}, r"runs\.some: mimic_cxr is in two roles"),
    (
        {"paired": ["chexpert"]},
        r"runs\.some\.paired\.chexpert: unknown data set; known are mimic_cxr, openi, openi_by_patient",
    ),
    ({"texts": ["chexpert"]}, r"runs\.some\.texts\.chexpert: unknown data set; known are mimic_cxr, openi"),
    ({"images": ["padchest"]}, r"runs\.some\.images\.padchest: unknown data set"),
    ({"images": ["siim"]}, r"runs\.some\.images: siim is not among sources"),
    ({"paired_fraction": 1.5}, r"runs\.some\.paired_fraction: 1\.5 is outside \[0, 1\]"),
    ({"shape": {"mask_ratio": 0.0}}, r"model\.mixed\.mask_ratio: 0\.0 is outside \(0, 1\)"),
    ({"shape": {"mask_ratio": 1}}, r"model\.mixed\.mask_ratio: 1 is outside \(0, 1\)"),
    (
        {"shape": {"patch": 16, "scales": 3}},
        r"model\.mixed: model\.image_size 224 is not two or more cells .* 64 pixels",
    ),
    (
        {"shape": {"patch": 28, "scales": 4}},
        r"model\.mixed: model\.image_size 224 is not two or more cells .* 224 pixels",
    ),
    ({"shape": {"heads": 3}}, r"model\.mixed\.width: 16 does not divide by heads \(3\) and by 4"),
    ({"loss": {}}, r"runs\.some\.loss: regeneration_weight, mlm_weight and alignment_weight are all 0"),
    ({"loss": {**ON, "mvs_weight": 1.0}}, r"runs\.some\.loss\.mvs_weight: no term of mixed runs; leave it out"),
    ({"loss": {"alignment_weight": 1.0}, "paired": None}, r"runs\.some\.loss\.alignment_weight: no pair is left"),
    ({"loss": {"alignment_weight": 1.0}, "paired_fraction": 0}, r"runs\.some\.loss\.alignment_weight: no pair is left"),
    ({"loss": {"mlm_weight": 1.0}, "paired": None}, r"runs\.some\.loss\.mlm_weight: no source has texts; set 0"),
    (
        {"images": None, "paired": None, "texts": ["openi_by_patient"]},
        r"runs\.some\.loss\.regeneration_weight: no source has images",
    ),
    ({"train": {"micro_batch": 4}}, r"runs\.some\.train\.micro_batch: 4; a mixed run is trained in one pass, set 0"),
    ({"section": {"micro_batch": 4}}, r"runs\.some\.train\.micro_batch: 4; a mixed run is trained in one pass, set 0"),
    ({"train": {"shuffle_pairs": True}}, r"runs\.some\.train\.shuffle_pairs: not for mixed runs; set false"),
]


@pytest.mark.parametrize("role", ["paired", "images", "texts"])
def test_open_i_trains_where_it_has_a_training_split(tmp_path, role):
    says = rf"runs\.some\.{role}: openi is a test set, it has no training split; take openi_by_patient or set "
    with pytest.raises(ParamsError, match=says + r"sources\.openi\.split: patient") as error:
        load(tmp_path, raw(**{role: ["openi"]}))
    assert "\n" not in str(error.value)
    for own in ({"split": "patient"}, {"reader": "manifest", "manifest": "images.csv"}):
        assert "openi" in load(tmp_path, raw(**{role: ["openi"]}, openi=own)).runs["some"].datasets
    assert "openi_by_patient" in load(tmp_path, raw(**{role: ["openi_by_patient"]})).runs["some"].datasets


def test_a_run_that_never_saw_a_pair_is_no_row_of_retrieval(tmp_path):
    apart = {"paired": None, "loss": {"regeneration_weight": 1.0}}
    for key, names in (("main", ["some"]), ("ablations", ["some"]), ("control", "some")):
        says = rf"{key}: some never aligns a pair \(paired, loss\.alignment_weight\), so it has no zero-shot and no"
        with pytest.raises(ParamsError, match=says):
            load(tmp_path, raw(**apart) | {key: names})
    assert load(tmp_path, raw(**apart) | {"compositions": ["some"]}).compositions == ("some",)


@pytest.mark.parametrize(("run", "says"), BAD)
def test_what_does_not_go_together_is_one_line(tmp_path, run, says):
    with pytest.raises(ParamsError, match=says) as error:
        load(tmp_path, raw(**run))
    assert "\n" not in str(error.value)


def test_terms_of_mixed_runs_are_not_for_others(tmp_path):
    made = raw()
    made["runs"]["plain"]["loss"] = {"alignment_weight": 1.0}
    with pytest.raises(ParamsError, match=r"runs\.plain\.loss\.alignment_weight: a term of mixed runs alone; set 0"):
        load(tmp_path, made)


def gathered(tmp_path, config, studies):
    """What gather writes of a run, and its counts."""
    for dataset in {s.dataset for s in studies}:
        write_studies(tmp_path / "index" / f"{dataset}.parquet", [s for s in studies if s.dataset == dataset])
    counts = write_corpus(config, tmp_path / "index", tmp_path / "prompts", tmp_path / "corpus")
    return list(read_studies(tmp_path / "corpus" / "studies.parquet")), counts


def test_roles_decide_what_a_study_gives(tmp_path, studies):
    found, counts = gathered(tmp_path, make_mixed(roles=ROLES), studies)
    reports = [s for s in studies if s.dataset == "mimic_cxr"]
    pairs = [s for s in reports if whole(s, ROLES, 7)]
    assert 5 < len(pairs) < 25
    expected = []
    for s in reports:
        lone = [replace(s, findings=None, impression=None), replace(s, views=())]
        expected += [s] if s in pairs else lone
    expected += [replace(s, labels={}) for s in studies if s.dataset == "chestxray14"]
    assert found == expected
    assert counts["mimic_cxr.pairs.train"] + counts["mimic_cxr.pairs.valid"] == len(pairs)
    assert counts["mimic_cxr.images.train"] == counts["mimic_cxr.texts.train"] == 24 - counts["mimic_cxr.pairs.train"]
    assert (counts["chestxray14.images.train"], counts["chestxray14.images.valid"]) == (8, 4)
    assert not list((tmp_path / "corpus" / "prompts").iterdir())


def test_what_has_not_what_its_role_needs_is_silent(tmp_path):
    full = [make_study(n) for n in range(4)]
    mute, blind = replace(full[0], findings=None, impression=None), replace(full[1], views=())
    everything = [mute, blind, *full[2:]]
    for roles, silent, kinds in (
        (Roles(("mimic_cxr",)), 2, ["11", "11"]),
        (Roles(images=("mimic_cxr",)), 1, ["10", "10", "10"]),
        (Roles(texts=("mimic_cxr",)), 1, ["01", "01", "01"]),
    ):
        config = make_mixed(roles=roles, loss={"alignment_weight": 0.0})
        found, counts = gathered(tmp_path, config, everything)
        assert counts["mimic_cxr.silent"] == silent
        assert [f"{bool(s.views):d}{bool(s.findings):d}" for s in found] == kinds


def test_fractions_are_nested_and_as_large_as_they_say():
    studies = [make_study(n) for n in range(4000)]
    kept = {
        f: {s.study for s in studies if whole(s, Roles(("mimic_cxr",), paired_fraction=f), 0)}
        for f in (0, 0.1, 0.25, 0.5, 1)
    }
    assert not kept[0] and len(kept[1]) == 4000
    assert kept[0.1] < kept[0.25] < kept[0.5] < kept[1]
    for f, names in kept.items():
        assert abs(len(names) - 4000 * f) <= 4.5 * (4000 * f * (1 - f)) ** 0.5
    other = {s.study for s in studies if whole(s, Roles(("mimic_cxr",), paired_fraction=0.5), 1)}
    assert 800 < len(other & kept[0.5]) < 1200


def test_a_source_without_training_studies_is_one_line(tmp_path):
    tests_alone = [make_study(n, split="test") for n in range(4)]
    with pytest.raises(
        ValueError, match=r"mimic_cxr\.parquet: no training study with texts; see the summary beside it"
    ):
        gathered(tmp_path, make_mixed(roles=Roles(texts=("mimic_cxr",)), loss={"alignment_weight": 0.0}), tests_alone)
    rare = Roles(("mimic_cxr",), paired_fraction=1e-9)
    with pytest.raises(ValueError, match=r"runs\.tiny\.loss\.alignment_weight: no training pair is left; set 0"):
        gathered(tmp_path, make_mixed(roles=rare), [make_study(n) for n in range(4)])


def collator(tokenizer):
    return partial(collate_mixed, tokenizer=tokenizer, size=32)


@pytest.fixture
def parts(tmp_path, studies):
    config = make_mixed(roles=ROLES)
    found, _ = gathered(tmp_path, config, studies)
    tokenizer = Tokenizer.build(config.text_encoder, [t for s in found for t in (s.findings, s.impression) if t])
    return config, [s for s in found if s.split == "train"], [s for s in found if s.split == "valid"], tokenizer


def test_a_batch_holds_what_its_studies_have(parts):
    config, training, _, tokenizer = parts
    data = TrainingSet(training, {}, config)
    draws = epoch_draws(len(data), 8, config.seed, 1)
    batches = list(training_batches(data, collator(tokenizer), 1, 0, 1, 0))
    for batch, step in zip(batches, draws, strict=True):
        studies, samples = [training[i] for _, i in step], [data[draw] for draw in step]
        assert batch.places.tolist() == [i for _, i in step] and batch.keys.tolist() == [s.key for s in samples]
        assert batch.image_of.tolist() == [i for i, s in enumerate(studies) if s.views]
        assert batch.text_of.tolist() == [i for i, s in enumerate(studies) if s.findings]
        assert batch.images.dtype == torch.uint8 and batch.tokens.shape == batch.mask.shape
        for image, i in zip(batch.images.numpy(), batch.image_of.tolist(), strict=True):
            assert len(samples[i].images) == 1 and np.array_equal(image, samples[i].images[0])
        for ids, mask, i in zip(batch.tokens, batch.mask.bool(), batch.text_of.tolist(), strict=True):
            assert len(samples[i].texts) == 1
            assert ids[mask].tolist() == tokenizer.encode(samples[i].texts)[0].tolist() and not ids[~mask].any()
        assert batch.studies == 8


def test_batches_do_not_depend_on_rank_and_worker(parts):
    config, training, _, tokenizer = parts
    data, collate = TrainingSet(training, {}, config), collator(tokenizer)
    whole_batches = list(training_batches(data, collate, 1, 0, 1, 0))
    halves = [list(training_batches(data, collate, 1, rank, 2, workers)) for rank, workers in ((0, 0), (1, 1))]
    for number, batch in enumerate(whole_batches):
        for rank in range(2):
            half = halves[rank][number]
            assert half.keys.equal(batch.keys[rank::2])
            for mine, at in zip(half.images, half.image_of.tolist(), strict=True):
                assert mine.equal(batch.images[batch.image_of.tolist().index(2 * at + rank)])
    assert [b.keys.tolist() for b in training_batches(data, collate, 1, 0, 1, 0, 2)] == [
        b.keys.tolist() for b in whole_batches[2:]
    ]


def test_validation_is_fixed_and_its_keys_tell_studies_apart(parts):
    config, _, valid, tokenizer = parts
    data = ValidationSet(valid, {}, config)
    parts = validation_parts(len(data), config.train.batch_size)
    first, again = ([collator(tokenizer)([data[int(i)] for i in part]) for part in parts] for _ in range(2))
    assert all(
        a.images.equal(b.images) and a.tokens.equal(b.tokens) and a.keys.equal(b.keys)
        for a, b in zip(first, again, strict=True)
    )
    keys = torch.cat([b.keys for b in first])
    assert len(set(keys.tolist())) == len({s.study for s in valid}) > 5  # the halves of a broken pair share theirs


def test_a_batch_of_one_kind_alone(parts):
    config, training, _, tokenizer = parts
    data = TrainingSet(training, {}, config)
    lone = [i for i, s in enumerate(training) if not (s.views and s.findings)]
    images, texts = (
        collate_mixed([data[0, i] for i in lone if bool(training[i].views) == seen], tokenizer, 32)
        for seen in (True, False)
    )
    assert images.tokens.shape == (0, 1) and len(images.images) == images.studies
    assert texts.images.shape == (0, 32, 32) and len(texts.tokens) == texts.studies
    assert texts.mask.sum(dim=1).min() > 2
