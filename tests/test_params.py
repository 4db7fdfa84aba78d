import copy
import json
import math
import re
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from pipeline.config import params
from pipeline.config.load import load_params
from pipeline.config.params import Train
from pipeline.config.records import ParamsError
from pipeline.config.run_config import read_run_config, run_config, speed, without_speed, write_run_config

ROOT = Path(__file__).parents[1]

RAW = {
    "seed": 3,
    "sources": {d: {"reader": d, "path": f"a/{d}", "stamp": f"a/{d}/list.csv"} for d in ("mimic_cxr", "chexpert")},
    "phantom": {"archives": {"mimic_cxr": 40}},
    "ingest": {},
    "prompts": {"file": "prompts.yaml"},
    "sampling": {},
    "augment": {"crop_scale": [0.7, 1.0]},
    "model": {
        "image_encoders": {"resnet": {"name": "resnet50", "args": {"layers": [1, 1]}}, "swin": {"name": "swin_t"}},
        "text_encoder": {"args": {"hidden_size": 8}},
    },
    "loss": {"tcl_weight": 0.25},
    "train": {"lr": 0.001, "epochs": 4},
    "runs": {
        "plain": {"image_encoder": "resnet", "datasets": ["mimic_cxr"]},
        "other": {
            "image_encoder": "swin",
            "datasets": ["mimic_cxr", "chexpert"],
            "sampling": {"unit": "image"},
            "augment": {"text": False},
            "loss": {"mvs": False, "icl_weight": 0},
            "train": {"lr": "2e-4"},
        },
    },
    "main": ["plain"],
    "ablations": ["other", "plain"],
    "control": "",
    "evaluate": {"protocols": ["paper"], "few_shot": {"shares": {"p10": 0.1}, "epochs": {"p10": 3}}},
}
MISSING = object()


def changed(dotted, value):
    raw = copy.deepcopy(RAW)
    *path, last = dotted.split(".")
    at = raw
    for key in path:
        at = at.setdefault(key, {})
    if value is MISSING:
        del at[last]
    else:
        at[last] = value
    return raw


def load(tmp_path, raw):
    path = tmp_path / "params.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw, sort_keys=False))
    return load_params(path)


def test_values_and_defaults(tmp_path):
    record = load(tmp_path, RAW)
    assert (record.seed, record.train.lr, record.train.epochs, record.loss.tcl_weight) == (3, 0.001, 4, 0.25)
    assert record.sources["chexpert"].stamp == "a/chexpert/list.csv"
    assert record.augment.crop_scale == (0.7, 1.0)
    assert record.ablations == ("other", "plain")
    # what the paper sets, where the file is silent
    assert (record.train.batch_size, record.train.weight_decay, record.loss.icl_weight) == (128, 1e-4, 1.0)
    assert (record.model.dim, record.model.image_size, record.model.text_encoder.max_tokens) == (512, 224, 256)
    assert record.model.temperature == 0.07


@pytest.mark.parametrize("text", ["1e-4", "'1e-4'", "1.0e-4", "0.0001", ".0001"])
def test_a_number_may_be_written_as_people_write_it(tmp_path, text):
    """YAML 1.1 reads 1e-4 as text."""
    raw = yaml.safe_dump(changed("train.lr", 987654321)).replace("987654321", text)
    assert load(tmp_path, raw).train.lr == pytest.approx(1e-4)


def test_a_whole_number_is_a_number(tmp_path):
    value = load(tmp_path, changed("loss.icl_weight", 2)).loss.icl_weight
    assert value == 2.0 and isinstance(value, float)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        # unknown
        ("los", {}, "los: unknown key (did you mean loss?)"),
        ("train.batchsize", 8, "train.batchsize: unknown key (did you mean batch_size?)"),
        ("model.text_encoder.max_token", 8, "model.text_encoder.max_token: unknown key (did you mean max_tokens?)"),
        ("evaluate.few_shot.zzz", 8, "evaluate.few_shot.zzz: unknown key"),
        ("sources.mimic_cxr.stmp", "x", "sources.mimic_cxr.stmp: unknown key (did you mean stamp?)"),
        ("model.image_encoders.swin.checkpoint", "x", "model.image_encoders.swin.checkpoint: unknown key"),
        ("sources.mimic", {"reader": "mimic", "path": "a", "stamp": "b"}, "sources.mimic: unknown data set"),
        ("sources.mimic_cxr.reader", "siim", "sources.mimic_cxr.reader: 'siim' is neither mimic_cxr nor manifest"),
        (
            "sources.mimic_cxr.split",
            "patient",
            "sources.mimic_cxr.split: 'patient' is none of paper; chestxray14, rsna, openi can",
        ),
        (
            "sources.rsna",
            {"reader": "rsna", "path": "a", "stamp": "b", "split": "official"},
            "sources.rsna.split: 'official' is none of paper, patient; chestxray14 can be split so",
        ),
        (
            "sources.chestxray14_official",
            {"reader": "chestxray14", "path": "a", "stamp": "b"},
            "sources.chestxray14_official.split: paper, but it is the data set of split: official",
        ),
        (
            "sources.openi_by_patient",
            {"reader": "openi", "path": "a", "stamp": "b"},
            "sources.openi_by_patient.split: paper, but it is the data set of split: patient",
        ),
        (
            "sources.openi_by_patient",
            {"reader": "openi", "path": "a", "stamp": "b", "split": "official"},
            "sources.openi_by_patient.split: official, but it is the data set of split: patient",
        ),
        (
            "sources.chestxray14_official",
            {"reader": "chestxray14_official", "path": "a", "stamp": "b"},
            "sources.chestxray14_official.reader: 'chestxray14_official' is neither chestxray14 nor manifest",
        ),
        ("sources.mine", {"reader": "manifest", "path": "a", "stamp": "b"}, "sources.mine.manifest: missing"),
        ("phantom.archives.open_i", 30, "phantom.archives.open_i: unknown data set"),
        # missing
        ("seed", MISSING, "seed: missing"),
        ("prompts.file", MISSING, "prompts.file: missing"),
        ("sources.mimic_cxr.stamp", MISSING, "sources.mimic_cxr.stamp: missing"),
        ("runs.plain.datasets", MISSING, "runs.plain.datasets: missing"),
        # ill-typed
        ("train.epochs", "four", "train.epochs: expected a whole number, got 'four'"),
        ("train.epochs", 4.5, "train.epochs: expected a whole number, got 4.5"),
        ("train.epochs", True, "train.epochs: expected a whole number, got True"),
        ("train.lr", True, "train.lr: expected a number, got True"),
        ("train.lr", "fast", "train.lr: expected a number, got 'fast'"),
        ("train.lr", None, "train.lr: expected a number, got None"),
        ("loss.mvs", 1, "loss.mvs: expected true or false, got 1"),
        ("loss.mvs", "yes", "loss.mvs: expected true or false, got 'yes'"),
        ("prompts.file", 5, "prompts.file: expected text, got 5"),
        ("train", [1, 2], "train: expected a mapping"),
        ("runs", ["plain"], "runs: expected a mapping"),
        ("main", "plain", "main: expected a list, got 'plain'"),
        ("augment.crop_scale", [0.8], "augment.crop_scale: expected 2 values, got 1"),
        ("augment.crop_scale", [0.8, "x"], "augment.crop_scale[1]: expected a number"),
        ("evaluate.retrieval", {"k": [1, 2.5]}, "evaluate.retrieval.k[1]: expected a whole number"),
        ("train.precision", "fp8", "train.precision: 'fp8' is none of fp32, bf16, fp16"),
        ("sampling.unit", "patient", "sampling.unit: 'patient' is none of study, image"),
        ("phantom.archives", {"siim": "many"}, "phantom.archives.siim: expected a whole number"),
        # outside
        ("ingest.max_rejected", 1.5, "ingest.max_rejected: 1.5 is outside [0, 1]"),
        ("train.batch_size", 1, "train.batch_size: 1 is outside"),
        ("back_translation", {"forward": "a"}, "back_translation.back: missing; name the models of both directions"),
        ("back_translation", {"back": "a"}, "back_translation.forward: missing; name the models of both directions"),
        ("back_translation", {"temperature": 0}, "back_translation.temperature: 0 is outside (0, 100]"),
        ("back_translation", {"beams": 1}, "back_translation.beams: 1 is outside"),
        ("back_translation", {"max_tokens": 7}, "back_translation.max_tokens: 7 is outside"),
        ("back_translation", {"batch_size": 0}, "back_translation.batch_size: 0 is outside"),
        ("back_translation", {"workers": 0}, "back_translation.workers: 0 is outside"),
        ("back_translation", {"device": "tpu"}, "back_translation.device: 'tpu' is none of auto, cpu, cuda"),
        ("train.patience", -1, "train.patience: -1 is outside"),
        ("train.save_minutes", -0.5, "train.save_minutes: -0.5 is outside"),
        ("train.timeout_minutes", 0, "train.timeout_minutes: 0 is outside"),
        ("runs.plain.train", {"epochs": 0}, "runs.plain.train.epochs: 0 is outside"),
        ("evaluate.protocols", [], "evaluate.protocols: an empty list; name at least one protocol"),
        ("evaluate.zero_shot", "x.yaml", "evaluate.zero_shot: unknown key"),
        ("evaluate.few_shot.draws", 0, "evaluate.few_shot.draws: 0 is outside"),
        ("evaluate.few_shot.shares.p10", 10, "evaluate.few_shot.shares.p10: 10 is outside (0, 1]"),
        ("evaluate.few_shot.shares", {"p1": 0.01}, "evaluate.few_shot: shares and epochs"),
        ("evaluate.few_shot.subset", "all", "evaluate.few_shot.subset: 'all' is none of stratified, random"),
        ("evaluate.few_shot.seeds", [0, 0], "evaluate.few_shot.seeds: expected at least one, each once"),
        ("evaluate.few_shot.fine_tune", {"runs": ["zz"]}, "evaluate.few_shot.fine_tune.runs: 'zz' is not in main"),
        ("evaluate.few_shot.fine_tune", {"shares": {"a": 1.0}}, "evaluate.few_shot.fine_tune: shares and epochs"),
        (
            "evaluate.few_shot.fine_tune",
            {"shares": {"p10": 1.0}, "epochs": {"p10": 1}},
            "evaluate.few_shot.fine_tune.shares.p10: the linear probe has a share of this name",
        ),
        # runs
        ("runs.plain.datasets", ["siim"], "runs.plain.datasets.siim: unknown data set"),
        ("runs.plain.datasets", ["chestxray14"], "runs.plain.datasets: chestxray14 is not among sources"),
        ("runs.plain.image_encoder", "vit", "runs.plain.image_encoder: 'vit' is none of model.image_encoders (resnet,"),
        ("runs.plain.train", {"epoch": 3}, "runs.plain.train.epoch: unknown key (did you mean epochs?)"),
        ("runs.plain.loss", {"mvs": "no"}, "runs.plain.loss.mvs: expected true or false"),
        ("runs.plain.model", {"dim": 3}, "runs.plain.model: unknown key"),
        (
            "runs.a-b",
            {"image_encoder": "resnet", "datasets": ["mimic_cxr"]},
            "runs.a-b: a name is letters, digits and _",
        ),
        ("runs.plain.like", "othr", "runs.plain.like: 'othr' is not among runs (did you mean other?)"),
        ("runs.plain.like", ["other"], "runs.plain.like: expected text, got ['other']"),
        ("runs.plain.like", "plain", "runs.plain.like: plain -> plain goes round in a circle"),
        ("runs.some", {"like": "plain", "datasets": ["siim"]}, "runs.some.datasets.siim: unknown data set"),
        ("runs.some", {"like": "plain", "loss": {"mvz": 1}}, "runs.some.loss.mvz: unknown key (did you mean mvs?)"),
        ("runs.other.loss", {"icl_weight": 0, "mvs_weight": 0, "tcl_weight": 0}, "runs.other.loss: mvs_weight, icl_we"),
        ("loss.scale_limits", [4, 3], "loss.scale_limits: [4.0, 3.0] is no lower and upper bound"),
        ("loss.scale_limits", [-1, 3], "loss.scale_limits[0]: -1 is outside"),
        ("loss.mlm_rate", 0, "loss.mlm_rate: 0 is outside [0.01, 0.99]"),
        ("loss.queue", 0, "loss.queue: 0 is outside"),
        ("augment.text_method", "sWap", "augment.text_method: 'sWap' is none of swap, eda"),
        ("loss.label_positives", True, "runs.plain.loss.label_positives: none of the run's data sets has labels"),
        ("main", ["plan"], "main: 'plan' is not among runs"),
        (
            "others",
            {"plain": {"adapter": "gloria", "weights": "w", "model": "GLoRIA"}},
            "others.plain: a run has this name, too",
        ),
        (
            "others",
            {"a-b": {"adapter": "gloria", "weights": "w", "model": "GLoRIA"}},
            "others.a-b: a name is letters, digits and _",
        ),
        (
            "others",
            {"x": {**{"adapter": "gloria", "weights": "w", "model": "GLoRIA"}, "adapter": "glory"}},
            "others.x.adapter: 'glory' is none of cxr_clip,",
        ),
        (
            "others",
            {"x": {**{"adapter": "gloria", "weights": "w", "model": "GLoRIA"}, "trained_on": ["mimic"]}},
            "others.x.trained_on.mimic: unknown data set",
        ),
        ("others", {"x": {"adapter": "gloria", "model": "GLoRIA"}}, "others.x.weights: missing"),
        ("evaluate.official", {"runs": ["plan"]}, "evaluate.official.runs: 'plan' is not among runs"),
        ("evaluate.official", {"runs": ["plain"]}, "evaluate.official.runs: chestxray14_official is not among sources"),
        (
            "evaluate.official",
            {"shares": ["p9"]},
            "evaluate.official.shares: 'p9' is none of evaluate.few_shot's (p10)",
        ),
        ("evaluate.regeneration", {"runs": ["plan"]}, "evaluate.regeneration.runs: 'plan' is not among runs"),
        ("evaluate.regeneration", {"runs": ["plain"]}, "evaluate.regeneration.runs: plain is no mixed run"),
        ("evaluate.regeneration", {"ratios": [0.5, 1.0]}, "evaluate.regeneration.ratios[1]: 1.0 is outside (0, 1)"),
        ("evaluate.regeneration", {"ratios": [0.0]}, "evaluate.regeneration.ratios[0]: 0.0 is outside (0, 1)"),
        ("evaluate.regeneration", {"ratios": [0.125]}, "evaluate.regeneration.ratios: 0.125 is no whole percentage"),
        ("evaluate.regeneration", {"ratios": [0.5, 0.5]}, "evaluate.regeneration.ratios: 0.5 is there twice"),
        ("ablations", ["plan"], "ablations: 'plan' is not among runs"),
        ("control", "plan", "control: 'plan' is not among runs"),
    ],
)
def test_one_line_names_the_key(tmp_path, key, value, says):
    with pytest.raises(ParamsError) as error:
        load(tmp_path, changed(key, value))
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'params.yaml'}: {says}")
    assert "\n" not in text


def test_a_file_that_is_no_params(tmp_path):
    with pytest.raises(ParamsError, match=r"nothere\.yaml: not found"):
        load_params(tmp_path / "nothere.yaml")
    with pytest.raises(ParamsError, match=r"params\.yaml: line 3: not valid YAML"):
        load(tmp_path, "seed: 1\ntrain: 2\nloss: {a: [}\n")
    with pytest.raises(ParamsError, match="the file: expected a mapping"):
        load(tmp_path, "")


def test_a_run_overlays_single_keys(tmp_path):
    record = load(tmp_path, RAW)
    plain, other = run_config(record, "plain"), run_config(record, "other")
    assert (plain.name, plain.seed, plain.datasets) == ("plain", 3, ("mimic_cxr",))
    assert plain.image_encoder.name == "resnet50" and other.image_encoder.name == "swin_t"
    assert (plain.loss, plain.train, plain.augment) == (record.loss, record.train, record.augment)
    assert (other.train.lr, other.train.epochs) == (2e-4, 4)
    assert (other.loss.mvs, other.loss.icl_weight, other.loss.tcl_weight) == (False, 0.0, 0.25)
    assert (other.sampling.unit, other.augment.text, other.augment.crop_scale) == ("image", False, (0.7, 1.0))
    with pytest.raises(ParamsError, match=r"runs\.third: no such run; runs are plain, other"):
        run_config(record, "third")


def test_a_run_like_another_names_its_differences_alone(tmp_path):
    raw = copy.deepcopy(RAW)
    raw["runs"] = {
        "third": {"like": "second", "datasets": ["chexpert"], "loss": {"tcl_weight": 9}, "augment": {"text": True}},
        "second": {"like": "other", "image_encoder": "resnet", "loss": {"mvs": True}},
        **raw["runs"],
    }
    record = load(tmp_path, raw)
    other, second, third = (run_config(record, name) for name in ("other", "second", "third"))
    assert second == replace(
        other, name="second", image_encoder=record.model.image_encoders["resnet"], loss=replace(other.loss, mvs=True)
    )
    assert (third.datasets, third.image_encoder, third.sampling) == (
        ("chexpert",),
        second.image_encoder,
        other.sampling,
    )
    assert third.loss == replace(second.loss, tcl_weight=9.0) and third.augment == replace(other.augment, text=True)
    assert record.runs["third"].train == {"lr": "2e-4"}
    raw["runs"]["other"]["like"] = "third"
    with pytest.raises(ParamsError, match=r"runs\.\w+\.like: .*third -> second -> other -> third goes round") as error:
        load(tmp_path, raw)
    assert "\n" not in str(error.value)


def test_the_profile_of_one_gpu_is_the_papers():
    """But for how it is computed: the batch, and so the training, is the same."""
    root = Path(__file__).parents[1]
    paper, one = (load_params(root / "profiles" / f"{profile}.yaml") for profile in ("paper", "h100"))
    assert one == replace(paper, train=replace(paper.train, launcher="python", precision="bf16", workers=16))


def test_the_rows_of_table_4_differ_in_what_they_are_named_for():
    root = Path(__file__).parents[1]
    for profile in ("demo", "paper"):
        record = load_params(root / "profiles" / f"{profile}.yaml")
        run = {name: replace(run_config(record, name), name="") for name in record.ablations}
        assert len(run) == 9
        off = {"icl_weight": 0.0, "tcl_weight": 0.0}
        clip, study, augment, mvs, icl, full, eda, swap, declip = run.values()
        assert clip.sampling.unit == "image" and clip.loss == replace(full.loss, mvs=False, **off)
        assert study == replace(clip, sampling=replace(clip.sampling, unit="study"))
        assert augment == replace(study, augment=replace(study.augment, image=True, text=True))
        assert mvs == replace(augment, loss=replace(augment.loss, mvs=True))
        assert icl == replace(mvs, loss=replace(mvs.loss, icl_weight=1.0))
        assert full == replace(icl, loss=replace(icl.loss, tcl_weight=0.5))
        assert [math.log(limit) for limit in swap.loss.scale_limits] == pytest.approx([3, 6], abs=1e-7)
        assert swap == replace(mvs, sampling=clip.sampling, loss=replace(mvs.loss, scale_limits=swap.loss.scale_limits))
        assert eda == replace(swap, augment=replace(swap.augment, text_method="eda"))
        parts = {"mvs_weight": 0.4, "nn_weight": 0.2, "simsiam_weight": 0.2, "mlm_weight": 0.2}
        assert declip == replace(swap, loss=replace(swap.loss, **parts))


def test_an_override_equal_to_the_section_changes_nothing(tmp_path):
    """Training depends on the effective values alone, so two ways to write them must be one configuration."""
    same = changed("runs.plain.train", {"lr": 0.001, "epochs": 4})
    expected = run_config(load(tmp_path, RAW), "plain")
    assert run_config(load(tmp_path, same), "plain") == expected


def test_run_config_survives_json(tmp_path):
    for name in ("plain", "other"):
        run = run_config(load(tmp_path, RAW), name)
        write_run_config(tmp_path / "run.json", run)
        first = (tmp_path / "run.json").read_bytes()
        assert read_run_config(tmp_path / "run.json") == run
        write_run_config(tmp_path / "run.json", read_run_config(tmp_path / "run.json"))
        assert (tmp_path / "run.json").read_bytes() == first
    assert json.loads(first)["train"]["lr"] == 2e-4


def test_how_fast_a_run_trains_is_no_part_of_what_it_trains(tmp_path):
    """What the corpus writes, and so what makes a run train again, is the same for all values of these keys."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    values["train"].update(workers=3, save_minutes=1.5)
    values["runs"]["swin_m"]["train"]["workers"] = 5
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(values))
    a, b = load_params(tmp_path / "a.yaml"), load_params(tmp_path / "b.yaml")
    for name in ("swin_m", "resnet_m"):
        runs = [run_config(p, name) for p in (a, b)]
        assert runs[0] != runs[1] and without_speed(runs[0]) == without_speed(runs[1])
    assert speed(b, "swin_m") == {"launcher": "python", "workers": 5, "save_minutes": 1.5, "timeout_minutes": 10}
    assert speed(b, "resnet_m")["workers"] == 3
    values["train"]["lr"] = 0.5
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(values))
    changed = run_config(load_params(tmp_path / "b.yaml"), "resnet_m")
    assert without_speed(changed) != without_speed(run_config(a, "resnet_m"))


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    """One line a key: first what the keys' own types say, then what the keys say of one another."""
    raw = changed("train.lr", "fast")
    raw["train"]["epoch"] = 3
    raw["loss"]["mvs"] = 1
    raw["runs"]["plain"]["like"] = "othr"
    del raw["sources"]["chexpert"]["stamp"]
    at = f"{tmp_path / 'params.yaml'}: "
    with pytest.raises(ParamsError) as error:
        load(tmp_path, raw)
    assert set(str(error.value).splitlines()) == {
        f"{at}train.lr: expected a number, got 'fast'",
        f"{at}train.epoch: unknown key (did you mean epochs?)",
        f"{at}loss.mvs: expected true or false, got 1",
        f"{at}runs.plain.like: 'othr' is not among runs (did you mean other?)",
        f"{at}sources.chexpert.stamp: missing",
    }
    raw = changed("main", ["plan"])
    raw["runs"]["plain"]["train"] = {"epoch": 3, "lr": "fast"}
    raw["evaluate"]["protocols"] = []
    raw["sources"]["rsna"] = {"reader": "siim", "path": "a", "stamp": "b"}
    with pytest.raises(ParamsError) as error:
        load(tmp_path, raw)
    assert str(error.value).splitlines() == [
        f"{at}sources.rsna.reader: 'siim' is neither rsna nor manifest",
        f"{at}runs.plain.train.lr: expected a number, got 'fast'",
        f"{at}runs.plain.train.epoch: unknown key (did you mean epochs?)",
        f"{at}main: 'plan' is not among runs (did you mean plain?)",
        f"{at}evaluate.protocols: an empty list; name at least one protocol, such as paper",
    ]


def test_sources_of_ones_own_in_the_demo_are_one_message(tmp_path):
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["sources"] = {"mine": {"reader": "manifest", "path": "a", "manifest": "list.csv", "stamp": "b"}}
    with pytest.raises(ParamsError) as error:
        load(tmp_path, raw)
    lines = str(error.value).splitlines()
    told = [line.split(": ")[1] for line in lines]
    assert len(told) == len(set(told)) and set(told) == {
        *(f"runs.{name}.datasets" for name, run in raw["runs"].items() if "paired" not in run),
        *(f"runs.mixed.{role}" for role in ("paired", "images", "texts")),
        "evaluate.official.runs",
    }
    said = "runs.clip.datasets: mimic_cxr, chexpert are not among sources; add them there or leave out the run"
    assert any(line.endswith(said) for line in lines)


def test_of_very_many_errors_twenty_are_shown():
    assert str(ParamsError(*map(str, range(20)))).splitlines() == [*map(str, range(20))]
    assert str(ParamsError(*map(str, range(33)))).splitlines() == [*map(str, range(20)), "and 13 more"]


def test_a_bound_of_a_section_is_said_once_and_not_for_each_run(tmp_path):
    with pytest.raises(ParamsError) as error:
        load(tmp_path, changed("train", {"epochs": 2, "warmup_epochs": 3}))
    assert str(error.value) == f"{tmp_path / 'params.yaml'}: train.warmup_epochs: 3.0 is outside [0, 2]"
    with pytest.raises(ParamsError, match=r"runs\.plain\.train\.warmup_epochs: 9\.0 is outside \[0, 4\]"):
        load(tmp_path, changed("runs.plain.train", {"warmup_epochs": 9}))


def test_records_are_strict_however_they_are_made():
    for wrong in ({"epochs": True}, {"epochs": "4"}, {"epochs": 4.0}, {"lr": True}, {"compile": 1}, {"epoch": 4}):
        with pytest.raises(ValueError):
            Train(**wrong)
    made = replace(Train(epochs=4), lr=1)
    assert made.lr == 1.0 and isinstance(made.lr, float) and asdict(made)["epochs"] == 4
    with pytest.raises(ValueError):
        replace(made, epochs=0)


def test_no_field_of_a_record_takes_what_only_looks_like_its_type():
    """A bare int, float or bool would take "4", true and 1 for one another."""
    strict = 0
    for record in vars(params).values():
        if isinstance(record, type) and is_dataclass(record):
            for name in get_type_hints(record):
                text = str(get_type_hints(record, include_extras=True)[name])
                bare = re.sub(r"Annotated\[(int|float|bool), Strict", "", text)
                assert not re.search(r"\b(int|float|bool)\b", bare), f"{record.__name__}.{name}"
                strict += text != bare
    assert strict > 50
