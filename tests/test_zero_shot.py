"""Zero-shot metrics against scikit-learn and formulas written out image by image; what leakage does to them."""

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from pipeline.audit import neighbours
from pipeline.config.archive_params import Ingest, Source
from pipeline.config.params import Bootstrap
from pipeline.config.settings import AuditSettings, ZeroShotSettings
from pipeline.evaluation import protocols, store, zero_shot
from pipeline.evaluation.metric_key import MetricKey, of_clean
from pipeline.evaluation.metrics import resamples
from pipeline.ingest.build import ingest_archive
from pipeline.phantom.archives import write_archive as draw
from pipeline.storage.index import read_studies, write_studies
from pipeline.storage.pictures import encode
from pipeline.storage.shards import EncodedPicture, ShardWriter, load_view
from pipeline.study import Study, View

OPTIONS = Bootstrap(40)
AUC = {"dataset": "rsna", "aggregate": "mean", "score": "difference", "metric": "auc"}
PAIR = {"positive": ["{}", "a {}"], "negative": ["no {}"], "classes": ["A", "B", "C"]}
LISTS = {"A": ["a1", "a2", "a3"], "B": ["b1"], "C": ["c1", "c2"]}
FIVE = {**AUC, "score": "cosine", "metric": "accuracy", "prompts": {"lists": LISTS}}


MINE = MetricKey("mine", "zero_shot", "auc")
FIVE_ACCURACY = MetricKey("five", "zero_shot", "accuracy")


def cleans(found):
    return [key for key in found["metrics"] if key.clean]


class Case:
    """A row's embeddings and an index in a folder, all of them drawn; what ``zero_shot.evaluate`` needs."""

    def __init__(self, folder, test_sets, studies=60, labels=None):
        self.folder, self.rng = folder, np.random.default_rng(3)
        (folder / "own.yaml").write_text(yaml.safe_dump({"test_sets": test_sets}))
        self.protocol = protocols.load_protocol(str(folder / "own.yaml"))
        self.texts = protocols.prompt_texts([str(folder / "own.yaml")])
        self.images, self.prompts = (self.unit(n) for n in (studies, len(self.texts)))
        self.labels = labels or [{c: int(self.rng.random() < 0.4) for c in "ABC"} for _ in range(studies)]
        rows = [
            Study("rsna", f"p{i // 2}", f"s{i}", "test", (View(f"v{i}"),), labels=label)
            for i, label in enumerate(self.labels)
        ]
        write_studies(folder / "rsna.parquet", rows)
        self.write()

    def unit(self, rows):
        x = self.rng.normal(size=(rows, 6)).astype("f4")
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    def write(self, **arrays):
        np.savez(self.folder / "rsna.npz", images=self.images, **arrays)
        np.savez(self.folder / "prompts.npz", texts=np.array(self.texts), embeddings=self.prompts, scale=np.array(9.0))

    def evaluate(self, seen=None, trained_on=("mimic_cxr",), also=()):
        chosen = [self.protocol, *also]
        sources = ["rsna", "mimic_cxr"]
        return zero_shot.evaluate_zero_shot(
            self.folder, self.folder, sources, chosen, OPTIONS, 5, seen or {}, trained_on
        )

    def truth(self, cls):
        return np.array([label.get(cls) == 1 for label in self.labels])

    def cosine(self, i, text):
        return float(self.images[i].astype("f8") @ self.prompts[self.texts.index(text)].astype("f8"))

    def seen(self, numbers):
        """The audit's answer where ``mimic_cxr`` has shown these test images."""
        return {("rsna", "mimic_cxr"): {(f"p{i // 2}", f"s{i}", f"v{i}") for i in numbers}}


def by_hand(case, reduce, combine):
    """Macro AUC of a score written out image by image: reduce cosines of a side, combine both sides."""
    aucs = []
    for cls in "ABC":
        sides = ([cls, f"a {cls}"], [f"no {cls}"])
        values = [combine(*(reduce(case, i, side) for side in sides)) for i in range(len(case.images))]
        aucs.append(roc_auc_score(case.truth(cls), values))
    return np.mean(aucs)


def mean(case, i, texts):
    return sum(case.cosine(i, t) for t in texts) / len(texts)


def largest(case, i, texts):
    return max(case.cosine(i, t) for t in texts)


def of_mean_embedding(case, i, texts):
    total = torch.stack([torch.from_numpy(case.prompts[case.texts.index(t)]).double() for t in texts]).mean(dim=0)
    return float(torch.nn.functional.normalize(total, dim=0) @ torch.from_numpy(case.images[i]).double())


@pytest.mark.parametrize(("aggregate", "reduce"), [("mean", mean), ("max", largest), ("embedding", of_mean_embedding)])
def test_auc_of_pairs_equals_scikit_learn(tmp_path, aggregate, reduce):
    found = {}
    for score in ("difference", "softmax"):
        case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR, "aggregate": aggregate, "score": score}})
        found[score] = case.evaluate()["metrics"][MINE].value
    assert found["difference"] == pytest.approx(by_hand(case, reduce, lambda p, n: p - n), abs=1e-12)
    softmax = by_hand(case, reduce, lambda p, n: torch.tensor([p, n]).double().softmax(0)[0].item())
    assert found["softmax"] == pytest.approx(softmax, abs=1e-12)


def test_a_difference_of_large_and_small_is_not_a_mean_of_all(tmp_path):
    """The three aggregations differ on this data, so that the test above tells them apart."""
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    assert len({round(by_hand(case, f, lambda p, n: p - n), 6) for f in (mean, largest, of_mean_embedding)}) == 3


def one_hot(count):
    return [{"ABC"[i % 3]: 1, "ABC"[(i + 1) % 3]: -1} for i in range(count)]


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("z_score", [False, True])
@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_accuracy_by_hand(tmp_path, local, z_score, aggregate):
    rule = {**FIVE, "aggregate": aggregate, "z_score": z_score, "local": local}
    case = Case(tmp_path, {"five": rule}, labels=one_hot(60))
    extra = case.rng.normal(size=(60, len(case.texts))).astype("f4")
    case.write(local=extra)
    table = np.zeros((60, 3))
    for i in range(60):
        for c, texts in enumerate(LISTS.values()):
            each = [case.cosine(i, t) for t in texts]
            if local:
                each = [(x + float(extra[i, case.texts.index(t)])) / 2 for x, t in zip(each, texts, strict=True)]
            table[i, c] = max(each) if aggregate == "max" else sum(each) / len(each)
    if z_score:
        table = (table - table.mean(axis=0)) / table.std(axis=0)
    right = [table[i].argmax() == i % 3 for i in range(60)]
    metric = case.evaluate()["metrics"][FIVE_ACCURACY]
    assert metric.value == pytest.approx(np.mean(right)) and metric.n == 60
    assert metric.low <= metric.value <= metric.high


def test_a_model_without_local_scores_is_scored_by_its_cosines(tmp_path):
    case = Case(tmp_path, {"five": {**FIVE, "local": True}}, labels=one_hot(60))
    found = case.evaluate()["metrics"]
    assert found == Case(tmp_path, {"five": FIVE}, labels=one_hot(60)).evaluate()["metrics"]


def test_clean_metrics_are_those_of_the_clean_images_alone(tmp_path):
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    shown = list(range(0, 60, 7))
    kept = np.setdiff1d(np.arange(60), shown)
    found = case.evaluate(case.seen(shown))
    weights = resamples([f"p{i // 2}" for i in range(60)], OPTIONS, 5)

    def auc(rows, cls):
        values = np.array([mean(case, i, [cls, f"a {cls}"]) - case.cosine(i, f"no {cls}") for i in range(60)])
        return roc_auc_score(case.truth(cls)[rows], values[rows])

    assert found["removed"] == {"mine": len(shown)}
    clean = found["metrics"][of_clean(MINE)]
    assert clean.n == len(kept) and clean.value == pytest.approx(np.mean([auc(kept, c) for c in "ABC"]))
    assert found["metrics"][MINE].n == 60 and clean.value != found["metrics"][MINE].value
    for b in (0, 17, 39):  # the same resample of patients in both, so that columns and rows subtract
        for key, rows in ((MINE, np.arange(60)), (of_clean(MINE), kept)):
            again = np.repeat(rows, weights[b, rows])
            sample = found["metrics"][key].samples[b]
            assert sample == pytest.approx(np.mean([auc(again, c) for c in "ABC"])), key


def test_clean_accuracy(tmp_path):
    case = Case(tmp_path, {"five": FIVE}, labels=one_hot(60))
    whole, part = case.evaluate(), case.evaluate(case.seen(range(20)))
    hits = [case.evaluate(case.seen(set(range(60)) - {i}))["metrics"][of_clean(FIVE_ACCURACY)].value for i in range(60)]
    assert whole["metrics"][FIVE_ACCURACY].value == pytest.approx(np.mean(hits))
    assert part["metrics"][of_clean(FIVE_ACCURACY)].value == pytest.approx(np.mean(hits[20:]))
    assert whole["metrics"] == {FIVE_ACCURACY: part["metrics"][FIVE_ACCURACY]}


def test_what_cannot_be_known_of_cleanness_is_said(tmp_path):
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    seen = case.seen(range(60))
    assert case.evaluate(seen, ["chexpert"])["notes"] == [
        "clean test images: chexpert not among sources, so what it has shown is not removed"
    ]
    found = case.evaluate(seen)
    assert (
        cleans(found) == [] and found["removed"] == {"mine": 60} and found["notes"] == ["mine: no test image is clean"]
    )
    assert case.evaluate(seen, [])["removed"] == {"mine": 0}


def test_a_class_without_both_labels_has_a_note_and_no_curve(tmp_path):
    labels = [{"A": 1, "B": int(i % 3 == 0), "C": -1} for i in range(60)]
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}}, labels=labels)
    found = case.evaluate(case.seen(range(0, 60, 3)))
    assert set(found["classes"]["mine"]) == set(found["curves"]["mine"]) == {"B"}
    assert set(found["precision_recall"]["mine"]) == set(found["calibration"]["mine"]) == {"B"}
    assert found["classes"]["mine"]["B"].positives == 20
    assert found["metrics"][MINE].value == found["classes"]["mine"]["B"].value
    assert found["notes"][:3] == [
        "mine: A: no AUC, 60 of 60 test images are positive",
        "mine: C: 60 test images, uncertain or without this label, are left out",
        "mine: C: no AUC, 0 of 0 test images are positive",
    ]
    assert "mine: clean test images: B: no AUC, 0 of 40 test images are positive" in found["notes"]
    assert cleans(found) == []  # every positive of B was seen


@pytest.mark.parametrize("blank", [True, False])
def test_images_without_a_label_or_uncertain_of_it_are_left_out(tmp_path, blank):
    """The AUC, the curves and the calibration are those of the data set without these images."""
    labels = [{"A": int(i % 3 == 0), "B": int(i % 2)} for i in range(60)]
    some = [dict(line) for line in labels]
    for i in range(0, 60, 6):  # half of A's positives
        if blank:
            del some[i]["A"]
        else:
            some[i]["A"] = -1
    test_sets = {"mine": {**AUC, "prompts": PAIR}}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found = Case(tmp_path / "a", test_sets, labels=some).evaluate()
    whole = Case(tmp_path / "b", test_sets, labels=labels).evaluate()
    assert found["classes"]["mine"]["B"] == whole["classes"]["mine"]["B"]
    measure = found["classes"]["mine"]["A"]
    assert (measure.n, measure.positives) == (50, 10)
    assert "mine: A: 10 test images, uncertain or without this label, are left out" in found["notes"]
    assert found["curves"]["mine"]["A"] != whole["curves"]["mine"]["A"]
    assert sum(found["calibration"]["mine"]["A"]["count"]) == 50


def test_probabilities_are_those_of_the_models_scale(tmp_path):
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    bins = case.evaluate()["calibration"]["mine"]["A"]
    margin = [mean(case, i, ["A", "a A"]) - case.cosine(i, "no A") for i in range(60)]
    probability = torch.tensor([[9.0 * m, 0.0] for m in margin]).double().softmax(1)[:, 0].numpy()
    total = sum(p * n for p, n in zip(bins["predicted"], bins["count"], strict=True))
    assert sum(bins["count"]) == 60 and total == pytest.approx(probability.sum(), abs=0.01)
    lists = Case(tmp_path, {"mine": {**AUC, "score": "cosine", "prompts": {"lists": LISTS}}})
    assert lists.evaluate()["calibration"] == {}  # no negative prompt, no probability


def test_another_protocol_than_the_first_has_its_name_before_its_test_sets(tmp_path):
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    second = replace(case.protocol, name="second")
    found = case.evaluate(case.seen([0]), also=[second])
    names = [f"{p}mine_zs_auc{c}" for p in ("", "second/") for c in ("", "_clean")]
    assert [key.name for key in found["metrics"]] == names
    for form in ("removed", "classes", "curves", "precision_recall", "calibration"):
        assert list(found[form]) == ["mine", "second/mine"]
    store.write_result(tmp_path / "result.json", "run/0", found)
    stored = json.loads((tmp_path / "result.json").read_text())
    assert stored["metrics"]["second/mine_zs_auc_clean"]["protocol"] == "second"
    with np.load(tmp_path / "result.npz") as samples:
        assert samples.files == list(stored["metrics"]) == names


def test_a_row_without_weights_says_so_and_has_no_metrics(tmp_path):
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    (tmp_path / "missing.json").write_text('{"missing": "weights/x: model.pt goes there"}')
    found = case.evaluate()
    assert found.pop("notes") == ["weights/x: model.pt goes there"] and not any(found.values())


def test_a_test_set_without_a_study_is_a_note(tmp_path):
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    write_studies(
        tmp_path / "rsna.parquet", [replace(s, split="train") for s in read_studies(tmp_path / "rsna.parquet")]
    )
    assert case.evaluate()["notes"] == ["mine: no test study"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.images.__setitem__((3, 2), np.nan), "mine: a score of A is not finite"),
        (lambda c: c.prompts.__setitem__((0, 0), np.inf), "mine: a score of A is not finite"),
        (lambda c: c.texts.__setitem__(0, "else"), "mine: 1 of its prompts are not embedded; run: dvc repro embed"),
        (lambda c: setattr(c, "images", c.images[:-1]), "59 images for 60 test studies; embed again"),
        (lambda c: setattr(c, "images", c.images[:, :5]), "mine: images and prompts have different dimensions"),
    ],
)
def test_broken_embeddings_are_one_clear_line(tmp_path, change, says):
    case = Case(tmp_path, {"mine": {**AUC, "prompts": PAIR}})
    change(case)
    case.write()
    with pytest.raises(ValueError, match=r"^.*$") as error:
        case.evaluate()
    assert says in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_other_broken_input(tmp_path):
    case = Case(tmp_path, {"five": FIVE}, labels=[{"A": 1, "B": int(i == 4)} for i in range(60)])
    with pytest.raises(ValueError, match="five: accuracy: a test image has not exactly one of the classes A, B, C"):
        case.evaluate()
    np.savez(tmp_path / "prompts.npz", **{"rsna/A": case.prompts})
    with pytest.raises(ValueError, match=r"prompts\.npz: of an older form; run: dvc repro embed"):
        case.evaluate()
    (tmp_path / "prompts.npz").unlink()
    with pytest.raises(ValueError, match=r"prompts\.npz: not found; run: dvc repro embed"):
        case.evaluate()


# Leakage. Labels are coin flips, so that nothing can be learnt from the training images and the truth is an AUC of .5.
PLANTED = 30


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """ChestX-ray14 phantoms to train on; an RSNA test set of fresh phantoms and of changed copies of training images
    under new names; the real audit; and as a model the nearest training image by pixels, whose label it recites."""
    folder = tmp_path_factory.mktemp("leaky")
    rng = np.random.default_rng(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(neighbours, "GRID", 16)  # a smaller space, fitted in a fraction of the time
        draw("chestxray14", folder / "phantom", 100, 160, 1)
        source = Source("chestxray14", str(folder / "phantom"), "")
        out = (folder / "data/shards/chestxray14", folder / "data/index/chestxray14.parquet", folder / "work")
        ingest_archive("chestxray14", source, Ingest(short_side=160), *out, 0)
        drawn = [replace(s, labels={"Pneumonia": int(rng.random() < 0.5)}) for s in read_studies(out[1])]
        theirs = {s.patient for s in drawn[: len(drawn) // 2]}
        train = [replace(s, split="train") for s in drawn if s.patient in theirs]
        test = [replace(s, dataset="rsna", split="test") for s in drawn if s.patient not in theirs]
        fresh = len(test)
        with ShardWriter(folder / "planted.tar") as writer:
            for n, seen in enumerate(train[:PLANTED]):
                picture = load_view(seen.first_frontal)
                changed = cv2.convertScaleAbs(picture, alpha=0.8, beta=12)  # less contrast, brighter, encoded again
                copy = Study("rsna", f"new{n}", f"new{n}", "test", (View(f"new{n}"),), labels=seen.labels)
                test.append(writer.write(copy, [EncodedPicture(encode(changed, 95), *changed.shape[::-1])]))
        write_studies(folder / "data/index/chestxray14.parquet", train)
        write_studies(folder / "data/index/rsna.parquet", test)

        def vectors(rows):
            small = [cv2.resize(load_view(s.first_frontal), (32, 32), interpolation=cv2.INTER_AREA) for s in rows]
            x = np.stack(small).reshape(len(rows), -1).astype(float)
            x -= x.mean(axis=1, keepdims=True)
            return x / np.linalg.norm(x, axis=1, keepdims=True)

        alike = vectors(test) @ vectors(train).T
        nearest, sign = alike.argmax(axis=1), np.array([2 * s.labels["Pneumonia"] - 1 for s in train])
        opinion = alike.max(axis=1) * sign[nearest]
        angle = np.pi / 4 * (1 - opinion)  # embeddings between "no" (90 degrees) and "yes" (0)
        sides = protocols.load_protocol("paper").tasks["rsna"]
        texts = [*sides.positive["Pneumonia"], *sides.negative["Pneumonia"]]
        for row in ("memory/0", "elsewhere/0"):
            (folder / "data/embeddings/runs" / row).mkdir(parents=True)
            images = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype("f4")
            np.savez(folder / f"data/embeddings/runs/{row}/rsna.npz", images=images)
            prompts = {"texts": np.array(texts), "embeddings": np.eye(2, dtype="f4"), "scale": np.array(14.0)}
            np.savez(folder / f"data/embeddings/runs/{row}/prompts.npz", **prompts)
        rows = {"memory/0": ("chestxray14",), "elsewhere/0": ()}
        sources = ("chestxray14", "rsna")
        settings = {
            "audit": AuditSettings(sources, 0.8),
            "zero_shot": ZeroShotSettings(0, sources, ("paper",), Bootstrap(200), rows),
        }
        for name in settings:
            stage = importlib.import_module(f"stages.{name}")
            patch.setattr(stage, "read_settings", lambda cls, name: settings[name])
            patch.setattr(stage, "load_machine", lambda: SimpleNamespace(audit_workers=1, tracking=False))
            stage.main()
    truth = np.array([s.labels["Pneumonia"] == 1 for s in test])
    found = {
        row: json.loads((folder / f"data/results/zero_shot/{row}/0.json").read_text())
        for row in ("memory", "elsewhere")
    }
    return folder, fresh, truth, np.cos(angle) - np.sin(angle), found


def test_the_audit_finds_the_planted_images_and_no_other(leaky):
    folder, *_, found = leaky
    rows = pq.read_table(folder / "data/audit/seen.parquet").to_pylist()
    assert {r["patient"] for r in rows} == {f"new{n}" for n in range(PLANTED)}
    assert found["memory"]["removed"] == {"rsna": PLANTED} and found["elsewhere"]["removed"] == {"rsna": 0}


def test_a_model_that_memorises_is_found_out_by_the_clean_column(leaky):
    folder, fresh, truth, score, found = leaky
    paper, clean = (found["memory"]["metrics"][f"rsna_zs_auc{end}"] for end in ("", "_clean"))
    assert paper["value"] == pytest.approx(roc_auc_score(truth, score), abs=1e-6)
    assert clean["value"] == pytest.approx(roc_auc_score(truth[:fresh], score[:fresh]), abs=1e-6)
    assert (paper["n"], clean["n"]) == (PLANTED + fresh, fresh)
    assert paper["value"] > clean["value"] + 0.1
    assert clean["low"] < 0.5 < clean["high"] < paper["value"] and paper["low"] > 0.5
    samples = np.load(folder / "data/results/zero_shot/memory/0.npz")
    assert np.nanpercentile(samples["rsna_zs_auc"] - samples["rsna_zs_auc_clean"], 2.5) > 0  # paired over resamples


def test_a_row_that_was_trained_elsewhere_keeps_every_image(leaky):
    *_, found = leaky
    assert found["elsewhere"]["metrics"] == {"rsna_zs_auc": found["memory"]["metrics"]["rsna_zs_auc"]}
