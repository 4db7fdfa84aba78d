"""Made-up experiments in plain folders, whose paired differences are worked out here by hand."""

import csv
import io
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from pipeline.evaluation import metric_key
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import MACRO_AUC, RSUM, MetricKey, Quantity, read_key
from pipeline.reporting import experiments, experiments_page
from pipeline.reporting.totals import means_over_trainings

PARAMS = {
    "seed": 1,
    "sources": {d: {"path": "/home/jane/archives/siim"} for d in ("vindr_cxr", "rsna", "siim", "chexpert")},
    "loss": {"tcl_weight": 0.5, "mvs": True},
    "runs": {"one": {}, "two": {}},
    "main": ["one"],
    "evaluate": {"bootstrap": {"samples": 200, "confidence": 0.95}},
}
SETS = ("vindr_cxr", "rsna", "siim")
AUCS = {"vindr_cxr_zs_auc": 0.6, "rsna_zs_auc": 0.7, "siim_zs_auc": 0.8, "gloria/rsna_zs_auc": 0.75}
SETS_AUC = [f"{name}_zs_auc" for name in SETS]
RSNA = read_key("rsna_zs_auc")
NOISE = np.random.default_rng(0).normal(0, 0.05, (3, 200))  # of the resamples of each test set, which all runs share
OWN = np.random.default_rng(1).normal(0, 0.002, (3, 200))  # what a run adds to it


RECALLS = [f"{d}_r{k}" for d in ("chexpert5x200", "mimic_cxr", "openi") for k in (1, 5, 10)]


def measured(name, value, samples):
    low, high = np.percentile(samples, [2.5, 97.5])
    return {**read_key(name).record(), "value": value, "low": low, "high": high, "n": 50}


def read(folder):
    return experiments.read_experiment(
        DirFileSystem(str(folder), LocalFileSystem()), folder.name, f"{folder.name:0<40}"
    )


def result(folder, kind, place, **metrics):
    """A result file of values and their resamples, and the latter's array file."""
    path = folder / "data/results" / kind / f"{place}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = {name: measured(name, value, samples) for name, (value, samples) in metrics.items()}
    path.write_text(json.dumps({"run": place, "metrics": listed, "notes": []}))
    np.savez(path.with_suffix(".npz"), **{name: samples for name, (_, samples) in metrics.items()})
    return path


def write(folder, params=None, shift=0.0, own=0.0, keep=True, loss=2.0, test=("a", "b"), **values):
    """An experiment's files: every AUC shifted, its samples those of all runs plus something of its own."""
    (folder / "data/index").mkdir(parents=True)
    folder.joinpath("params.yaml").write_text(yaml.safe_dump(params or PARAMS))
    for dataset in PARAMS["sources"]:
        rows = {"patient": [*test, "z"], "study": [*test, "z"], "split": ["test"] * len(test) + ["train"]}
        labels = pa.array([[("Pneumonia", 1)]] * (len(test) + 1), pa.map_(pa.string(), pa.int8()))
        pq.write_table(pa.table({**rows, "labels": labels}), folder / f"data/index/{dataset}.parquet")
    for run in ("one", "two"):
        change = (shift, own) if run == "one" else (0.0, 0.0)  # run two is never touched
        metrics = {}
        for number, (name, value) in enumerate({**AUCS, **values}.items()):
            samples = value + change[0] + NOISE[number % 3] + change[1] * OWN[number % 3]
            metrics[name] = (value + change[0], samples)
        written = [result(folder, "zero_shot", f"{run}/0", **metrics)]
        recalls = dict.fromkeys(RECALLS, (0.15, 0.15 + NOISE[0]))
        written.append(result(folder, "retrieval", f"{run}/0", **recalls))
        for path in written if not keep else ():
            path.with_suffix(".npz").unlink()
        (folder / "data/results/pretrain" / run).mkdir(parents=True)
        last = loss if run == "one" else 2.0
        rows = f"epoch,train_loss,valid_loss\n0,3.5,3.0\n1,2.5,{last}\n"
        (folder / f"data/results/pretrain/{run}/0.csv").write_text(rows)
    probed = {"rsna_p10_auc": (0.65, 0.65 + NOISE[1]), "rsna_p1_auc": (0.6, 0.6 + NOISE[1])}
    result(folder, "few_shot", "one/0", **probed).with_suffix(".npz").unlink()
    return read(folder)


def names(experiment, run="one"):
    return [key.name for key in experiment.metrics[run]]


@pytest.fixture
def baseline(tmp_path):
    return write(tmp_path / "baseline")


def test_read_takes_the_headlines_of_each_kind_and_their_mean(baseline):
    assert list(baseline.metrics) == ["one", "two"]
    assert names(baseline) == ["macro_zs_auc", *SETS_AUC, "rsna_p10_auc", "rsum"]
    macro = baseline.metrics["one"][MACRO_AUC]
    assert macro.value == pytest.approx(0.7)
    assert macro.low == pytest.approx(np.percentile(0.7 + NOISE.mean(axis=0), 2.5))
    assert baseline.history["one"] == [(1, 3.0), (2, 2.0)]
    rsum = baseline.metrics["one"][read_key("rsum")]
    assert rsum.value == pytest.approx(9 * 0.15)
    assert rsum.low == pytest.approx(np.percentile(9 * (0.15 + NOISE[0]), 2.5))
    labels = {
        "rsna_p10_auc": "RSNA linear 10 %",
        "macro_zs_auc": "Mean AUC",
        "rsum": "RSUM",
        "openi_r10": "Open-I R@10",
    }
    assert {name: experiments.headline_label(read_key(name)) for name in labels} == labels


def test_single_recalls_are_compared_where_there_is_no_sum(tmp_path):
    write(tmp_path / "few")
    result(tmp_path / "few", "retrieval", "one/0", openi_r10=(0.5, 0.5 + NOISE[0]), openi_t2i_r10=(0.4, 0.4 + NOISE[0]))
    assert names(read(tmp_path / "few"))[-1:] == ["openi_r10"]


def test_a_file_that_is_not_there_is_counted(tmp_path, baseline):
    more = write(tmp_path / "more", {**PARAMS, "others": {"theirs": {"adapter": "chexzero"}}})
    assert not baseline.notes and "theirs" not in more.metrics
    assert len(more.notes) == 1 and more.notes[0].startswith("3 result files are neither")  # three kinds of evaluation


def test_the_mean_has_an_interval_of_the_asked_confidence(tmp_path):
    asked = {**PARAMS, "evaluate": {"bootstrap": {"samples": 200, "confidence": 0.5}}}
    macro = write(tmp_path / "half", asked).metrics["one"][MACRO_AUC]
    assert [macro.low, macro.high] == pytest.approx(np.percentile(0.7 + NOISE.mean(axis=0), [25, 75]))


def test_a_small_difference_is_real_where_the_resamples_pair_up(baseline, tmp_path):
    """Each interval is 20 points wide; what the two have in common cancels, and half a point is told from none."""
    better = write(tmp_path / "better", shift=0.01, own=1.0)
    found = experiments.difference(baseline, better, "one", RSNA)
    assert found.value == pytest.approx(0.01)
    assert [found.low, found.high] == pytest.approx(np.percentile(0.01 + OWN[1], [2.5, 97.5]))
    assert found.sign == 1
    assert experiments.difference(better, baseline, "one", RSNA).sign == -1
    small = write(tmp_path / "small", shift=0.001, own=1.0)
    assert experiments.difference(baseline, small, "one", RSNA).sign == 0
    assert experiments.touched(baseline, better) == ["one"]
    # three sets and their mean are better; RSUM is the same to the last bit; the probe has no samples
    assert experiments.verdict(baseline, better) == (4, 0, 1, 1)


def test_what_does_not_pair_up_has_no_interval_and_says_why(baseline, tmp_path):
    def why(other, key=RSNA):
        found = experiments.difference(baseline, other, "one", key)
        assert found.value == pytest.approx(0.01) and found.low is None and found.sign == 0
        return found.why

    assert why(write(tmp_path / "bare", shift=0.01, keep=False)) == "no resamples stored for bare"
    assert "seed" in why(write(tmp_path / "seed", {**PARAMS, "seed": 2}, shift=0.01))
    assert why(write(tmp_path / "people", shift=0.01, test=("a", "c"))) == "other test studies of rsna"
    assert "vindr_cxr" in why(write(tmp_path / "more", shift=0.01, test=("a", "b", "c")), MACRO_AUC)


def test_changes_name_each_parameter_and_no_place_of_the_machine(baseline, tmp_path):
    changed = {
        **PARAMS,
        "loss": {"mvs": False, "tcl_weight": 0.5, "new": [1, 2]},
        "sources": {**PARAMS["sources"], "siim": {"path": "/mnt/bob/siim2"}},
        "main": [],
    }
    other = write(tmp_path / "other", changed)
    assert experiments.changes(baseline, other) == {
        "loss.mvs": ("true", "false"),
        "loss.new": ("—", "[1, 2]"),
        "sources.siim.path": ("siim", "siim2"),
        "main": ("[one]", "[]"),
    }


def test_results_that_are_gone_are_counted_and_the_rest_is_shown(baseline, tmp_path):
    other = write(tmp_path / "other")
    (tmp_path / "other/data/results/retrieval/two/0.json").unlink()
    (tmp_path / "other/data/results/few_shot/one/0.json").unlink()
    again = read(tmp_path / "other")
    assert again.notes and again.notes[0].startswith("2 result files are neither in the cache")
    assert "rsna_p10_auc" not in names(again) and "rsna_zs_auc" in names(again, "two")
    broken = tmp_path / "other/data/results/zero_shot/two/0.json"
    broken.write_text('{"run": "two/0", "metrics": {"rsna.auc": {"value": 0.5}}}')
    with pytest.raises(ValueError, match=r"^data/results/zero_shot/two/0.json: not in the form"):
        read(tmp_path / "other")
    assert other.notes == []


def test_the_page_says_who_won_and_whether_it_is_real(baseline, tmp_path):
    params = {**PARAMS, "loss": {"tcl_weight": "<b>", "mvs": True}}
    better = write(tmp_path / "better", params, shift=0.01, own=1.0, loss=1.5)
    worse = write(tmp_path / "worse", shift=-0.02, own=1.0, loss=2.5)
    idle = write(tmp_path / "idle")
    better.cost = experiments.Cost(6, 5400.0, 42.0, "NVIDIA H100", 3 * 2**30, 20 * 2**30)
    others = [better, worse, idle]
    page = experiments_page.experiments_html(baseline, others)
    text = re.sub(r"<[^>]+>", " ", page)
    assert "Run one" in " ".join(text.split()) and "Run two" not in " ".join(text.split())
    assert page.count('class="better"') == 4 and page.count('class="worse"') == 4
    assert page.count('class="best"') == 4 + 3 + 3  # of the columns that all share, every row is the best
    assert "loss.tcl_weight: 0.5 → &lt;b&gt;" in page and "<b>" not in page
    assert "90.0 min" in page and "42 s" in page and "3.0 GiB + 20.0 GiB GPU" in page and "NVIDIA H100" in page
    assert "the same figures as the baseline" in page
    assert page.count("<figure>") == 1 and "http" not in page.replace("http-equiv", "")
    assert "Of the 10 differences" in page  # 4 and RSUM, of two experiments; the probe's have no interval
    low, high = 100 * np.percentile(0.01 + OWN[1], [2.5, 97.5])
    assert f"+1.0 [{low:+.1f}, {high:+.1f}]" in page
    assert page == experiments_page.experiments_html(baseline, others)

    notes = experiments_page.experiments_markdown(baseline, others)
    assert f"71.0 (+1.0 [{low:+.1f}, {high:+.1f}])" in notes and "| idle | nothing | the same figures" in notes
    rows = list(csv.DictReader(io.StringIO(experiments_page.experiments_csv(baseline, others))))
    (row,) = [r for r in rows if (r["experiment"], r["run"], r["metric"]) == ("better", "one", "rsna_zs_auc")]
    assert (row["value"], row["baseline"], row["difference"]) == ("0.71", "0.7", "0.01")
    assert float(row["diff_low"]) == pytest.approx(low / 100, abs=1e-6)
    assert len(rows) == 4 * (6 + 5)


def test_trainings_with_several_seeds_are_one_figure(tmp_path):
    """A second training of run one, .02 better in both; the experiment is .01 better in each: no doubt is left."""
    params = {**PARAMS, "seeds": [0, 3]}
    for name, shift in (("baseline", 0.0), ("other", 0.01)):
        write(tmp_path / name, params=params, shift=shift)
        for kind in ("zero_shot", "few_shot", "retrieval"):
            for path in (tmp_path / name / "data/results" / kind).glob("*/0.*"):
                body = path.read_bytes()
                if path.suffix == ".json" and kind == "zero_shot":
                    raw = json.loads(body)
                    for m in raw["metrics"].values():
                        m["value"] = min(m["value"] + 0.02, 1.0)
                    body = json.dumps(raw).encode()
                if path.suffix == ".json":
                    body = json.dumps({**json.loads(body), "run": f"{path.parent.name}/3"}).encode()
                path.with_stem("3").write_bytes(body)
    baseline, other = (read(tmp_path / n) for n in ("baseline", "other"))
    one = baseline.metrics["one"][RSNA]
    assert one.trainings == pytest.approx({"0": 0.70, "3": 0.72}) and one.value == pytest.approx(0.71)
    assert one.low < 0.71 - 12.7 * 0.01 < 0.71 + 12.7 * 0.01 < one.high  # t of one degree of freedom, s / sqrt(2) = .01
    far = [{key: Measure(v, v, v, 9) for key in (RSNA, RSUM["i2t"])} for v in (0.6, 0.99)]
    ends = means_over_trainings(far, (0, 3), 0.95)
    assert (ends[RSNA].low, ends[RSNA].high) == (0, 1) and ends[RSUM["i2t"]].high > 1  # where a share ends
    found = experiments.difference(baseline, other, "one", RSNA)
    assert (found.value, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01)) and found.sign == 1
    assert "over seeds, trainings paired by theirs" in experiments_page.experiments_html(baseline, [other])
    again = write(tmp_path / "again")
    assert experiments.difference(baseline, again, "one", RSNA).why == "trained with other seeds"


def test_a_metric_of_a_new_quantity_is_compared_on_its_own_test_set(tmp_path, monkeypatch):
    """``rsna_dice``: no sum over test sets, so what happens to another set's studies does not matter."""
    monkeypatch.setitem(metric_key.QUANTITIES, "dice", Quantity(("segmentation",), "Dice"))
    dice = MetricKey("rsna", "segmentation", "dice")
    for name, shift in (("baseline", 0.0), ("better", 0.01)):
        write(tmp_path / name, shift=shift, own=1.0, rsna_dice=0.4)
    siim = pq.read_table(tmp_path / "better/data/index/siim.parquet").to_pylist()
    rows = pa.Table.from_pylist([{**row, "labels": []} for row in siim])
    pq.write_table(rows, tmp_path / "better/data/index/siim.parquet")
    baseline, better = read(tmp_path / "baseline"), read(tmp_path / "better")
    assert "rsna_dice" in names(baseline) and experiments.headline_label(dice) == "RSNA Dice"
    found = experiments.difference(baseline, better, "one", dice)
    assert found.value == pytest.approx(0.01) and found.low is not None and found.low > 0
    assert experiments.difference(baseline, better, "one", RSUM["i2t"]).why == "other test studies of siim"
    assert "RSNA Dice" in experiments_page.experiments_html(baseline, [better])
