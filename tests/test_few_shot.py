import json
import math
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import yaml
from checkpoints import chexzero, chexzero_input
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from pipeline import adapters
from pipeline.config.load import load_params
from pipeline.config.params import Augment, Bootstrap, FewShot, FineTune
from pipeline.config.settings import FewShotSettings, with_shares, write_settings
from pipeline.evaluation import linear_probe as linear_probe_module
from pipeline.evaluation.embed import embedder_of
from pipeline.evaluation.few_shot import evaluate_few_shot
from pipeline.evaluation.fine_tune import classifier_logits, evaluation_pictures, fine_tune
from pipeline.evaluation.labelled import label_loss, read_labelled, subset
from pipeline.evaluation.linear_probe import _room, cache_features, linear_probe, probe
from pipeline.evaluation.metric_key import of_clean, share_key
from pipeline.evaluation.metrics import resamples
from pipeline.evaluation.protocols import PromptRule, Protocol, Task, TestSet
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.encoders import ImageTower
from pipeline.reporting.results import load_results
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.index import write_studies
from pipeline.storage.parquet import write_table
from pipeline.storage.shards import load_view
from pipeline.training.augment import augment_view
from stages import few_shot as few_shot_stage

ROOT = Path(__file__).parents[1]
TUNE = FineTune(("x",), {"ft100": 1.0}, {"ft100": 2}, lr=0.003, batch_size=5)
OPTIONS = FewShot(
    {"p10": 0.5, "p100": 1.0}, {"p10": 6, "p100": 4}, seeds=(0, 2), lr=0.02, batch_size=4, draws=6, fine_tune=TUNE
)
BOOTSTRAP = Bootstrap(50, 0.9)
PROTOCOL = Protocol(
    "mine",
    {
        dataset: Task(
            dataset,
            TestSet(dataset, PromptRule(), "mean", "difference", "auc"),
            {c: [c] for c in classes},
            {c: [f"No {c}"] for c in classes},
        )
        for dataset, classes in {
            "rsna": ["Pneumonia"],
            "vindr_cxr": ["Nodule", "Mass"],
            "siim": ["Pneumothorax"],
        }.items()
    },
)
PLACES = {"rsna": ["Pneumonia"], "vindr_cxr": ["Nodule", "Mass"]}


def overlapping(count, seed):
    """Two labels that a linear rule explains but for noise: features float32 [N, 6], labels bool [N, 2]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 6)) * [1, 2, 0.5, 1, 1, 1]
    logits = x @ np.array([[1.5, 0], [-0.5, 1], [0, 2], [0, 0], [0.5, -1], [0, 0]]) + [-1, 0.5]
    return x.astype(np.float32), rng.random((count, 2)) < 1 / (1 + np.exp(-logits))


def test_the_probe_finds_the_optimum_of_logistic_regression():
    x, y = overlapping(800, 0)
    xt, yt = overlapping(800, 1)
    options = replace(OPTIONS, lr=0.1, weight_decay=0.0, batch_size=80)
    layer = linear_probe(lambda epoch: x, y, x, y, 60, options, 0)
    for k in (0, 1):
        best = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(x, y[:, k])
        np.testing.assert_allclose(layer.weight[k].detach().numpy(), best.coef_[0], atol=0.01)
        assert layer.bias[k].item() == pytest.approx(best.intercept_[0], abs=0.01)
        ours = roc_auc_score(yt[:, k], (xt @ layer.weight[k].detach().numpy()))
        assert ours == pytest.approx(roc_auc_score(yt[:, k], best.decision_function(xt)), abs=0.002)


def test_a_label_that_is_neither_has_no_part_in_the_loss():
    """Of two classes with unknown labels in different images each learns what it would alone, of the images it has."""
    rng = np.random.default_rng(3)
    logits = torch.from_numpy(rng.normal(size=(40, 2))).float()
    labels = torch.from_numpy(rng.integers(-1, 2, (40, 2)).astype(np.int8))
    known = labels >= 0
    wanted = F.binary_cross_entropy_with_logits(logits[known], labels[known].float())
    assert label_loss(logits, labels).item() == pytest.approx(wanted.item(), rel=1e-6)
    whole = labels.clamp_min(0)
    assert label_loss(logits, whole).equal(F.binary_cross_entropy_with_logits(logits, whole.float()))
    assert label_loss(logits, torch.full_like(labels, -1)).item() == 0


def test_the_epoch_of_lowest_validation_loss_is_kept():
    """Validation labels are turned round, so the probe is best before it has learnt much."""
    x, y = overlapping(300, 2)

    weights = {}
    for name, valid_labels in (("turned", ~y), ("straight", y)):
        w, b = recipe(lambda epoch: x, y, x, valid_labels, 8, OPTIONS, 0)
        layer = linear_probe(lambda epoch: x, y, x, valid_labels, 8, OPTIONS, 0)
        np.testing.assert_allclose(layer.weight.detach().numpy(), w.T, atol=1e-4)
        np.testing.assert_allclose(layer.bias.detach().numpy(), b, atol=1e-4)
        weights[name] = w
    assert np.abs(weights["turned"] - weights["straight"]).max() > 0.1


def test_same_seed_same_probe():
    x, y = overlapping(300, 3)
    one, two, other = (linear_probe(lambda epoch: x, y, x, y, 3, OPTIONS, seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    assert not torch.equal(one.weight, other.weight)


def recipe(features, labels, valid, valid_labels, epochs, options, seed):
    """The paper's recipe written out: features of an epoch are computed in that epoch; AdamW by hand, in float64."""
    torch.manual_seed(seed)
    start = torch.nn.Linear(valid.shape[1], labels.shape[1])
    w = [start.weight.detach().double().numpy().T, start.bias.detach().double().numpy()]
    m, v = [np.zeros_like(p) for p in w], [np.zeros_like(p) for p in w]
    order = torch.Generator().manual_seed(seed)
    total = epochs * math.ceil(len(labels) / options.batch_size)
    warm = max(1, round(total / 10))
    step, best, best_loss = 0, None, math.inf
    for epoch in range(epochs):
        x = features(epoch).astype(np.float64)
        shuffled = torch.randperm(len(labels), generator=order).numpy()
        for i in range(0, len(labels), options.batch_size):
            rows = shuffled[i : i + options.batch_size]
            error = (1 / (1 + np.exp(-(x[rows] @ w[0] + w[1]))) - labels[rows]) / (len(rows) * labels.shape[1])
            rate = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
            step += 1
            for k, g in enumerate((x[rows].T @ error, error.sum(axis=0))):
                w[k] = w[k] * (1 - options.lr * rate * options.weight_decay)
                m[k] = 0.9 * m[k] + 0.1 * g
                v[k] = 0.999 * v[k] + 0.001 * g**2
                hat = m[k] / (1 - 0.9**step), v[k] / (1 - 0.999**step)
                w[k] = w[k] - options.lr * rate * hat[0] / (np.sqrt(hat[1]) + 1e-8)
        logits = valid @ w[0] + w[1]
        loss = np.mean(np.logaddexp(0, logits) - valid_labels * logits)
        if loss < best_loss:
            best, best_loss = [p.copy() for p in w], loss
    return best


@pytest.fixture(scope="module")
def labelled(config, studies, tmp_path_factory):
    """RSNA and VinDr-CXR made of the tiny studies, SIIM without validation, and a model."""
    folder = tmp_path_factory.mktemp("few")
    torch.manual_seed(1)
    model = CxrClip(config(), 300).eval()
    mine = [s for s in studies if s.dataset == "mimic_cxr"]
    for dataset, classes in PLACES.items():
        rows = []
        for i, s in enumerate(mine):
            split = ("train", "train", "valid", "test")[i % 4]
            labels = {c: int((i // 4 + k * (i // 8)) % 2) for k, c in enumerate(classes)}
            rows.append(replace(s, dataset=dataset, split=split, findings=None, impression=None, labels=labels))
        write_studies(folder / f"{dataset}.parquet", rows)
    write_studies(folder / "siim.parquet", [replace(s, dataset="siim") for s in rows if s.split != "valid"])
    return folder, model


def run(labelled, seen=None, sources=("rsna", "vindr_cxr", "siim", "openi"), options=OPTIONS, tower=True, work=None):
    folder, model = labelled
    return evaluate_few_shot(
        *(embedder_of(model, None, 32, 5), model.image_tower if tower else None, PROTOCOL),
        *(settings(options, sources), folder, seen or {}, work or folder),
    )


def settings(options, sources, test_sets=("vindr_cxr", "rsna", "siim")):
    return FewShotSettings(3, sources, ("paper",), Augment(), BOOTSTRAP, options, test_sets, ("mimic_cxr",))


@pytest.fixture(scope="module")
def found(labelled):
    _, model = labelled
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = run(labelled)
    for key, value in model.state_dict().items():  # neither the probe nor fine-tuning touches the model it is given
        assert torch.equal(value, before[key])
    return result


def read(labelled, dataset="rsna"):
    return read_labelled(labelled[0], PROTOCOL, dataset)


def reencoded(labelled, data, epoch, positions):
    """Features as the uncached recipe makes them: decoded, augmented and encoded in that epoch."""
    images = [
        augment_view(data.views("train")[i], 32, Augment(), np.random.default_rng([3, epoch, i])) for i in positions
    ]
    with torch.no_grad():
        return labelled[1].image_tower(torch.from_numpy(np.stack(images))).numpy()


@pytest.mark.parametrize("in_memory", [1 << 30, 0])
def test_cached_draws_are_the_recipe_that_encodes_each_epoch(labelled, in_memory, monkeypatch, tmp_path):
    """With as many draws as epochs, in memory and in a file, which leaves nothing behind."""
    monkeypatch.setattr(linear_probe_module, "IN_MEMORY", in_memory)
    data, embedder = read(labelled), embedder_of(labelled[1], None, 32, 5)
    train, valid = data.labels["train"], embedder.over(embedder.features, data.views("valid"))
    some = np.array([1, 4, 5, 9, 11])
    uses = [(some, 6), (np.arange(len(train)), 4)]
    cached = cache_features(embedder, data, uses, Augment(), 6, 3, tmp_path / "work")
    assert isinstance(cached.features, np.memmap) is (in_memory == 0) and not list(tmp_path.glob("work/*"))
    assert len(cached.features) == 4 * len(train) + 2 * len(some)  # what no epoch asks for is not computed
    for positions, epochs in uses:
        one, other = (
            linear_probe(make, train[positions], valid, data.labels["valid"], epochs, OPTIONS, 0)
            for make in (
                lambda e, p=positions: cached.epoch(e, p),
                lambda e, p=positions: reencoded(labelled, data, e, p),
            )
        )
        np.testing.assert_allclose(one.weight.detach(), other.weight.detach(), atol=1e-6)
        np.testing.assert_allclose(one.bias.detach(), other.bias.detach(), atol=1e-6)
    assert np.abs(cached.epoch(0, some) - cached.epoch(1, some)).max() > 1e-3


def test_draws_are_used_in_turn(labelled):
    data, embedder = read(labelled), embedder_of(labelled[1], None, 32, 5)
    all_of_it = np.arange(len(data.labels["train"]))
    cached = cache_features(embedder, data, [(all_of_it, 7)], Augment(), 2, 3, labelled[0])
    assert cached.rows.shape == (2, len(all_of_it))
    for epoch in range(5):
        np.testing.assert_allclose(
            cached.epoch(epoch, all_of_it), reencoded(labelled, data, epoch % 2, all_of_it), atol=1e-5
        )


def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(linear_probe_module, "IN_MEMORY", 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(linear_probe_module.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match="no room for 4"):
        _room((1000, 1_000_000), tmp_path)


def test_every_metric_is_the_mean_of_its_seeds(labelled, found):
    """Against the recipe written out above, scikit-learn and the resamples' definition."""
    wanted = {f"{d}_{s}_auc" for d in ("rsna", "vindr_cxr") for s in ("p10", "p100", "ft100")}
    assert {key.name for key in found["metrics"]} == wanted  # and no clean one
    assert found["notes"][-1] == "siim: a split has no study"
    assert found["removed"] == {"rsna": 0, "vindr_cxr": 0}
    data = read(labelled, "vindr_cxr")
    truth = data.labels["test"]
    inputs = {s: np.stack([evaluation_crop(load_view(v), 32) for v in data.views(s)]) for s in ("valid", "test")}
    with torch.no_grad():
        plain = {s: labelled[1].image_tower(torch.from_numpy(x)).numpy() for s, x in inputs.items()}
    weights = resamples([s.patient for s in data.studies["test"]], BOOTSTRAP, 3)
    for name, share in OPTIONS.shares.items():
        aucs, samples = {}, []
        for s in (0, 2):
            chosen = subset(data.labels["train"], share, 3 + s, "stratified")
            w, b = recipe(
                lambda e, p=chosen: reencoded(labelled, data, e, p),
                *(data.labels["train"][chosen], plain["valid"], data.labels["valid"]),
                *(OPTIONS.epochs[name], OPTIONS, 3 + s),
            )
            logits = plain["test"] @ w + b
            aucs[str(s)] = roc_auc_score(truth, logits, average="macro")
            samples.append([resampled(truth, logits, row) for row in weights])
        metric = found["metrics"][share_key("vindr_cxr", name)]
        assert metric.seeds == pytest.approx(aucs) and metric.n == len(truth)
        assert metric.value == pytest.approx(np.mean(list(aucs.values())))
        assert metric.samples == pytest.approx(np.mean(samples, axis=0), nan_ok=True)
        assert metric.low <= metric.value <= metric.high
        per_class = found["classes"]["vindr_cxr"][name]
        assert np.mean([m.value for m in per_class.values()]) == pytest.approx(metric.value)
        assert [m.positives for m in per_class.values()] == truth.sum(axis=0).tolist()


def test_one_data_set_at_some_shares_is_the_same_alone(labelled, found):
    options = with_shares(OPTIONS, ["p100", "ft100"])
    assert options.shares == {"p100": 1.0} and options.fine_tune == TUNE
    assert not with_shares(OPTIONS, ["p10"]).fine_tune.shares
    folder, model = labelled
    alone = evaluate_few_shot(
        *(embedder_of(model, None, 32, 5), model.image_tower, PROTOCOL),
        *(settings(options, ("rsna", "vindr_cxr"), ("vindr_cxr",)), folder, {}, folder),
    )
    assert {key.name for key in alone["metrics"]} == {"vindr_cxr_p100_auc", "vindr_cxr_ft100_auc"}
    assert alone["metrics"] == {key: found["metrics"][key] for key in alone["metrics"]}


def test_a_share_that_no_metric_can_be_named_after_ends_before_any_work(labelled):
    options = replace(OPTIONS, shares={"tenth": 0.1}, fine_tune=FineTune())
    with pytest.raises(ValueError, match=r"a share is named p and its percent, for fine-tuning ft .*, not 'tenth'"):
        evaluate_few_shot(None, None, PROTOCOL, settings(options, ("rsna",)), labelled[0], {}, labelled[0])


def resampled(truth, logits, row):
    again = np.repeat(np.arange(len(truth)), row)
    aucs = [
        roc_auc_score(truth[again, k], logits[again, k])
        for k in range(truth.shape[1])
        if 0 < truth[again, k].sum() < len(again)
    ]
    return np.mean(aucs) if aucs else np.nan


def test_clean_metrics_leave_out_what_training_has_shown(labelled, found):
    """The run's own data sets and the probed one count, others do not."""
    data = read(labelled)
    tests = data.studies["test"]
    image = [(s.patient, s.study, s.first_frontal.id) for s in tests]
    seen = {("rsna", "mimic_cxr"): {image[0]}, ("rsna", "rsna"): {image[3]}, ("rsna", "chexpert"): {image[5]}}
    options = replace(OPTIONS, seeds=(0,), fine_tune=FineTune())
    result = run(labelled, seen, ["rsna"], options)
    assert result["removed"] == {"rsna": 2}
    keys = [share_key("rsna", name) for name in options.shares]
    assert set(result["metrics"]) == {*keys, *map(of_clean, keys)}
    keep = np.array([i not in (0, 3) for i in range(len(tests))])
    logits = probe(*(embedder_of(labelled[1], None, 32, 5), data, Augment(), options, 3, labelled[0]))
    weights = resamples([s.patient for s in tests], BOOTSTRAP, 3)[:, keep]
    for name in options.shares:
        truth, rows = data.labels["test"][keep], logits[name][0][keep]
        clean = result["metrics"][of_clean(share_key("rsna", name))]
        assert clean.value == pytest.approx(roc_auc_score(truth, rows)) and clean.n == len(tests) - 2
        again = [resampled(truth, rows, row) for row in weights]
        assert clean.samples == pytest.approx(again, nan_ok=True)


@pytest.fixture
def project(labelled, tmp_path, monkeypatch):
    """A folder to run stage few_shot_other in: RSNA, and CheXzero's weights as its project saves them."""
    raw = yaml.safe_load((ROOT / "profiles/micro.yaml").read_text())
    raw["sources"] = {d: raw["sources"][d] for d in ("mimic_cxr", "rsna", "siim")}
    raw |= {"runs": {}, "main": [], "ablations": [], "tracking": {"enabled": False}}
    raw["evaluate"]["few_shot"]["fine_tune"]["runs"] = []
    raw["evaluate"].update(official={"runs": []}, regeneration={"runs": []})
    theirs = {"adapter": "chexzero", "weights": "weights", "model": "CheXzero", "trained_on": ["mimic_cxr"]}
    raw["others"] = {"theirs": theirs}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    write_settings(load_params(tmp_path / "params.yaml"), tmp_path / "data/settings")
    shutil.copytree(labelled[0], tmp_path / "data/index")
    tests = read(labelled).studies["test"]
    shown = [{"dataset": "rsna", "training_set": "mimic_cxr"}, {"dataset": "rsna", "training_set": "chexpert"}]
    images = [{"patient": s.patient, "study": s.study, "view": s.first_frontal.id} for s in tests]
    (tmp_path / "data/audit").mkdir()
    seen = pa.Table.from_pylist([shown[0] | images[1], shown[1] | images[2]])
    write_table(tmp_path / "data/audit/seen.parquet", seen)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_probe_of_somebody_elses_model(labelled, project):
    """Against its own modules, pictures prepared as its project does, and the recipe written out above."""
    (member,) = chexzero(project / "weights", members=1)
    few_shot_stage.main("other", "theirs")
    found = json.loads((project / "data/results/few_shot/theirs.json").read_text())
    names = {f"rsna_{share}_auc{end}" for share in ("p1", "p10", "p100") for end in ("", "_clean")}
    assert found["run"] == "theirs" and set(found["metrics"]) == names
    record = load_params(project / "params.yaml")
    options, data = record.evaluate.few_shot, read(labelled)

    def features(images):
        with torch.no_grad():
            return torch.cat([member.vision_model(chexzero_input(x)).pooler_output for x in images]).numpy()

    def epoch(number, positions):
        rngs = [np.random.default_rng([record.seed, number % options.draws, i]) for i in positions]
        views = [data.views("train")[i] for i in positions]
        return features(augment_view(v, 320, record.augment, rng) for v, rng in zip(views, rngs, strict=True))

    some, embedder = np.array([0, 3, 8]), adapters.load_other(record.others["theirs"])
    cached = cache_features(embedder, data, [(some, 1)], record.augment, 2, record.seed, project)
    np.testing.assert_allclose(cached.epoch(0, some), epoch(0, some), atol=1e-4)
    valid, test = (features(load_view(v) for v in data.views(split)) for split in ("valid", "test"))
    truth = data.labels["test"][:, 0]
    clean = np.arange(len(truth)) != 1  # CheXpert, which has shown another, it was not trained on
    for share in ("p10", "p100"):
        both = []
        for seed in options.seeds:
            chosen = subset(data.labels["train"], options.shares[share], seed, "stratified")
            w, b = recipe(
                *(lambda e, p=chosen: epoch(e, p), data.labels["train"][chosen], valid, data.labels["valid"]),
                *(options.epochs[share], options, seed),
            )
            rows = (test @ w + b)[:, 0]
            both.append((roc_auc_score(truth, rows), roc_auc_score(truth[clean], rows[clean])))
        metric = found["metrics"][f"rsna_{share}_auc"]
        assert [*metric["seeds"].values()] == pytest.approx([whole for whole, _ in both])
        assert found["metrics"][f"rsna_{share}_auc_clean"]["value"] == pytest.approx(
            np.mean([part for _, part in both])
        )
    assert found["removed"] == {"rsna": 1} and "siim: a split has no study" in found["notes"]
    with np.load(project / "data/results/few_shot/theirs.npz") as samples:
        assert samples["rsna_p10_auc_clean"].shape == (50,)


def test_without_its_weights_the_result_says_which_file_goes_where(project, capsys):
    (project / "weights").mkdir()
    for kind in ("zero_shot", "retrieval"):
        line = {
            "run": "theirs",
            "metrics": {},
            "notes": ["weights/*.pt: not there; docs/models.md says which file goes where"],
        }
        (project / "data/results" / kind).mkdir(parents=True)
        (project / "data/results" / kind / "theirs.json").write_text(json.dumps(line))
    few_shot_stage.main("other", "theirs")
    assert "weights/*.pt: not there" in capsys.readouterr().out
    results, missing = load_results(project / "data/results", (), (), ["theirs"])
    assert not missing and not results["theirs"].measures and results["theirs"].notes == line["notes"]
    (project / "data/results/few_shot/theirs.json").unlink()
    assert load_results(project / "data/results", (), (), ["theirs"])[1] == [
        str(project / "data/results/few_shot/theirs.json")
    ]
    with pytest.raises(ValueError, match=r"few_shot/other/them.json: not found; either params.yaml does not name it"):
        few_shot_stage.main("other", "them")


def plain_fine_tuning(tower, data, chosen, valid, epochs, options, seed):
    """Fine-tuning as one would write it in a notebook: torch alone, AdamW and schedule by hand."""
    torch.manual_seed(seed)
    layer = torch.nn.Linear(tower.width, len(data.classes))
    weights = [p for part in (tower, layer) for p in part.parameters()]
    m, v = ([torch.zeros_like(p) for p in weights] for _ in range(2))
    target, truth = (torch.from_numpy(data.labels[s]).double() for s in ("train", "valid"))
    draws = torch.Generator().manual_seed(seed)
    per_epoch = math.ceil(len(chosen) / options.batch_size)
    total, step, losses, states = epochs * per_epoch, 0, [], []
    warm = max(1, round(total / 10))
    for epoch in range(epochs):
        order = torch.randperm(len(chosen), generator=draws).numpy()
        tower.train()
        for part in np.array_split(order, per_epoch):
            views = [(i, data.views("train")[i]) for i in chosen[part]]
            rng = [np.random.default_rng([seed, epoch, i]) for i, _ in views]
            x = np.stack([augment_view(w, 32, Augment(), r) for (_, w), r in zip(views, rng, strict=True)])
            torch.randint(1 << 62, (len(x),), generator=draws)
            p = torch.sigmoid(layer(tower(torch.from_numpy(x)))).double()
            y = target[chosen[part]]
            loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
            gradients = torch.autograd.grad(loss, weights)
            rate = (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
            step += 1
            with torch.no_grad():
                for k, (w, g) in enumerate(zip(weights, gradients, strict=True)):
                    m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.999 * v[k] + 0.001 * g**2
                    w *= 1 - options.lr * rate * options.weight_decay
                    hat = m[k] / (1 - 0.9**step), v[k] / (1 - 0.999**step)
                    w -= options.lr * rate * hat[0] / (hat[1].sqrt() + 1e-8)
        tower.eval()
        with torch.no_grad():
            p = torch.sigmoid(layer(tower(valid))).double()
        losses.append(-(truth * p.log() + (1 - truth) * (1 - p).log()).mean().item())
        states.append({k: w.clone() for part in (tower, layer) for k, w in part.state_dict().items()})
    return states[int(np.argmin(losses))]


@pytest.fixture
def double():
    """Weights in float64: rounding in float32 grows until another epoch has the lowest loss."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("encoder", ["resnet", "swin"])
def test_fine_tuning_is_plain_torch(labelled, double, encoder):
    from conftest import RESNET, SWIN

    data = read(labelled, "vindr_cxr")
    chosen = np.arange(1, len(data.labels["train"]))
    valid = evaluation_pictures(data, "valid", 32)

    def tower():
        torch.manual_seed(4)
        return ImageTower(RESNET if encoder == "resnet" else SWIN, 32, load_weights=False).eval()

    given, before = tower(), tower().state_dict()
    one, two = (fine_tune(given, data, chosen, valid, 32, Augment(), 3, TUNE, 5, 8, 0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert all(torch.equal(w, before[k]) for k, w in given.state_dict().items())
    moved = [k for k, w in one.tower.state_dict().items() if not torch.equal(w, before[k])]
    assert len(moved) == len(before)  # every weight, and BatchNorm's statistics, learn
    torch.manual_seed(8)
    start = torch.nn.Linear(given.width, len(data.classes)).state_dict()
    wanted = plain_fine_tuning(tower(), data, chosen, valid, 3, TUNE, 8)
    for part in (one.tower, one.layer):
        for key, weight in part.state_dict().items():
            # AdamW makes a step of the rate's size out of rounding where a gradient is next to nothing: so the mean
            way = (wanted[key] - (before if part is one.tower else start)[key]).double().abs().mean()
            assert (weight - wanted[key]).double().abs().mean() <= 0.01 * way + 1e-6, key
    assert not one.training
    assert torch.equal(classifier_logits(one, valid, 3).argmax(1), classifier_logits(one, valid, 100).argmax(1))


def test_fine_tuning_builds_one_loader_whatever_its_workers(labelled, monkeypatch):
    from conftest import RESNET

    data = read(labelled, "vindr_cxr")
    chosen, valid = np.arange(12), evaluation_pictures(data, "valid", 32)
    built, real, found = [], torch.utils.data.DataLoader, []
    monkeypatch.setattr("pipeline.evaluation.pictures.DataLoader", lambda *a, **k: built.append(1) or real(*a, **k))
    for workers in (0, 1):
        torch.manual_seed(4)
        tower = ImageTower(RESNET, 32, load_weights=False)
        tuned = fine_tune(tower, data, chosen, valid, 32, Augment(), 2, TUNE, 64, 8, workers)
        found.append(torch.cat([w.flatten().double() for w in tuned.state_dict().values()]))
    assert len(built) == 2 and torch.equal(*found)


def test_pictures_of_a_split_leave_shared_memory(labelled, monkeypatch):
    """A batch is let go before the next ones are ready: 64 MB hold few of them."""
    data = read(labelled, "vindr_cxr")
    alone = evaluation_pictures(data, "train", 32)
    monkeypatch.setattr("pipeline.evaluation.fine_tune.READ", 1)
    held, real = [], torch.utils.data.DataLoader.__iter__

    def watched(loader):
        for images, positions in real(loader):
            held.append(weakref.ref(images))
            yield images, positions
            del images
            assert sum(ref() is not None for ref in held) <= 1

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", watched)
    found = evaluation_pictures(data, "train", 32, workers=1)
    assert len(held) == len(alone) > 5 and torch.equal(found, alone) and not found.is_shared()


def test_stochastic_depth_is_drawn_in_fine_tuning(labelled):
    """An encoder that drops paths can be fine-tuned, and does drop."""
    from conftest import SWIN

    data = read(labelled)
    valid, chosen = evaluation_pictures(data, "valid", 32), np.arange(len(data.labels["train"]))
    weights = []
    for rate in (0.0, 0.5):
        torch.manual_seed(4)
        tower = ImageTower(replace(SWIN, args={**SWIN.args, "drop_path_rate": rate}), 32, load_weights=False)
        weights.append(fine_tune(tower, data, chosen, valid, 32, Augment(), 1, TUNE, 5, 8, 0).layer.weight)
    assert not torch.equal(*weights)


def test_random_subset():
    for count, share, size in ((1000, 0.1, 100), (18678, 0.1, 1868), (1000, 1.0, 1000), (3, 0.1, 1), (105, 0.1, 10)):
        labels = np.zeros((count, 1), dtype=bool)
        chosen = subset(labels, share, 0, "random")
        assert len(chosen) == size == len(set(chosen.tolist()))
        assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < count
        assert np.array_equal(chosen, subset(~labels, share, 0, "random"))  # it looks at no label
    none = np.zeros((1000, 1), dtype=bool)
    assert not np.array_equal(subset(none, 0.1, 0, "random"), subset(none, 0.1, 1, "random"))
    drawn = np.concatenate([subset(none[:100], 0.1, seed, "random") for seed in range(500)])
    assert np.bincount(drawn, minlength=100).min() > 20 and drawn.mean() == pytest.approx(49.5, abs=1.5)


def many(count=3000):
    """14 classes, from 2 to 600 positives, some of which come together."""
    rng = np.random.default_rng(1)
    totals = [2, 3, 5, 9, 14, 20, 35, 60, 90, 140, 200, 300, 450, 600]
    labels = np.zeros((count, len(totals)), dtype=bool)
    for c, n in enumerate(totals):
        labels[rng.choice(count // 2, n, replace=False), c] = True
    return labels


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_stratified_subset_keeps_every_class(share):
    labels = many()
    totals = labels.sum(axis=0)
    for seed in range(20):
        chosen = subset(labels, share, seed, "stratified")
        assert len(chosen) == round(share * len(labels)) and (np.diff(chosen) > 0).all()
        assert np.array_equal(chosen, subset(labels, share, seed, "stratified"))
        kept = labels[chosen].sum(axis=0)
        assert (kept >= [max(1, round(share * n)) for n in totals]).all()
        assert (kept <= 1.6 * share * totals + 4).all()  # what comes along with other classes
    assert not np.array_equal(chosen, subset(labels, share, 0, "stratified"))
    assert np.array_equal(subset(labels, 1.0, 0, "stratified"), np.arange(len(labels)))


def test_stratified_subset_of_one_class_is_exact_and_every_image_has_its_turn():
    labels = np.arange(200)[:, None] % 4 == 0
    draws = [subset(labels, 0.1, seed, "stratified") for seed in range(400)]
    assert {int(labels[d].sum()) for d in draws} == {5} and {len(d) for d in draws} == {20}
    times = np.bincount(np.concatenate(draws), minlength=200)  # each 400 times with chance 0.1: 40, deviation 6
    assert times.min() > 14 and times.max() < 70


def test_too_few_places_go_to_frequent_classes():
    """Three places for five classes without a whole positive of their share: the most frequent three have one."""
    labels = np.zeros((300, 5), dtype=bool)
    for c, n in enumerate((4, 49, 6, 30, 20)):
        labels[60 * c : 60 * c + n, c] = True
    chosen = subset(labels, 0.01, 0, "stratified")
    assert labels[chosen].sum(axis=0).tolist() == [0, 1, 0, 1, 1]
