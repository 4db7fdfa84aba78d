"""Names of metrics: the public ones letter for letter, every record read back from its own, and what is refused."""

import itertools
import json
import math

import fake_results as fake
import numpy as np
import pytest

from pipeline.evaluation import metric_key, store
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import (
    MACRO_AUC,
    RSUM,
    TASKS,
    WAYS,
    MetricKey,
    Quantity,
    key_from_record,
    of_clean,
    read_key,
    share_key,
)
from pipeline.reporting import provenance, rows
from pipeline.reporting.results import load_results
from pipeline.reporting.table_form import Column

PUBLIC = {  # of reports/metrics.json, as they have been since they were first published
    "rsna_zs_auc": MetricKey("rsna", "zero_shot", "auc"),
    "chexpert5x200_zs_accuracy": MetricKey("chexpert5x200", "zero_shot", "accuracy"),
    "paper_prompts/chexpert5x200_zs_accuracy": MetricKey("chexpert5x200", "zero_shot", "accuracy", "paper_prompts"),
    "rsna_p10_auc": MetricKey("rsna", "linear_probe", "auc", percent=10),
    "chestxray14_official_ft100_auc": MetricKey("chestxray14_official", "fine_tune", "auc", percent=100),
    "mimic_cxr_t2i_r1": MetricKey("mimic_cxr", "retrieval", "recall", direction="t2i", k=1),
    "openi_r10_over_chance": MetricKey("openi", "retrieval", "recall", direction="i2t", k=10, over_chance=True),
    "openi_psnr75_matching": MetricKey("openi", "regeneration", "psnr", percent=75, way="matching"),
    "openi_ssim25_gain_none_clean": MetricKey("openi", "regeneration", "ssim", percent=25, way="gain_none", clean=True),
    "openi_psnr50_none_scale2": MetricKey("openi", "regeneration", "psnr", percent=50, way="none", scale=2),
    "macro_zs_auc": MACRO_AUC,
    "rsum": RSUM["i2t"],
    "t2i_rsum_clean": of_clean(RSUM["t2i"]),
}
TEST_SETS = (
    *("rsna", "mimic_cxr", "chexpert5x200", "my_p10", "rsna_zs", "x_r10", "x_zs_auc", "a_psnr50_gain", "b_ssim_none"),
    *("x_clean", "rsum", "t2i", "x_over_chance", "zs", "r1", "x_p10_auc", "x_scale1", "macro_zs", "9", "_"),
)


def every_key(test_set):
    """One metric of each form."""
    forms = [{"task": "zero_shot", "quantity": q} for q in ("auc", "accuracy")]
    forms += [{"task": t, "quantity": "auc", "percent": p} for t in ("linear_probe", "fine_tune") for p in (1, 10)]
    forms += [{"task": "retrieval", "quantity": "recall", "direction": d, "k": 10} for d in ("i2t", "t2i")]
    forms += [{"task": "retrieval", "quantity": "recall", "direction": "i2t", "k": 10, "over_chance": True}]
    for quantity, way, scale, percent in itertools.product(("psnr", "ssim"), WAYS, (0, 3), (None, 50)):
        forms.append({"task": "regeneration", "quantity": quantity, "way": way, "scale": scale, "percent": percent})
    for form, protocol, clean in itertools.product(forms, ("", "mine", "clean", "zs_auc"), (False, True)):
        yield MetricKey(test_set, protocol=protocol, clean=clean, **form)


def test_public_names_letter_for_letter():
    assert {name: read_key(name) for name in PUBLIC} == PUBLIC
    assert [key.name for key in PUBLIC.values()] == list(PUBLIC)


def test_every_metric_is_read_back_from_its_name_and_from_its_fields():
    keys = [key for test_set in TEST_SETS for key in every_key(test_set)]
    keys += [*RSUM.values(), *map(of_clean, RSUM.values()), MACRO_AUC]
    names = {key.name for key in keys}
    assert len(names) == len(keys) > 10_000  # no two have one name
    for key in keys:
        assert read_key(key.name) == key
        assert key_from_record({**json.loads(json.dumps(key.record())), "value": 0.5, "n": 3}) == key


def test_test_sets_of_any_name_are_read_back_or_refused():
    """Names of random pieces of names: whatever is not refused is read back, and only what could be misread is."""
    pieces = ["zs", "auc", "p10", "ft1", "r5", "t2i", "psnr50", "none", "gain", "clean", "rsum", "macro", "x", "over"]
    rng = np.random.default_rng(0)
    refused = set()
    for _ in range(50):
        test_set = "_".join(rng.choice(pieces, size=rng.integers(1, 4)))
        try:
            for key in every_key(test_set):
                assert read_key(key.name) == key
        except ValueError as error:
            assert "rename the test set" in str(error) and repr(test_set) in str(error)
            refused.add(test_set)
    assert refused and all(name == "macro" or name.endswith("_t2i") for name in refused)


@pytest.mark.parametrize(
    "name",
    ["", "rsna", "rsna_auc", "rsna_dice", "rsna_zs_dice", "rsna_r05", "x-y_zs_auc", "zs_auc", "rsna_zs_auc_", "/"],
)
def test_what_is_no_name_is_an_error(name):
    with pytest.raises(ValueError, match="is no metric's name"):
        read_key(name)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"task": "zero_shot", "quantity": "recall"}, "zero_shot does not measure 'recall'"),
        ({"task": "zero_shot", "quantity": "dice"}, "zero_shot does not measure 'dice'"),
        ({"task": "zero_shot", "quantity": "auc", "k": 5}, "would be read as another"),  # a field that no name shows
        ({"task": "regeneration", "quantity": "psnr", "way": "guessed"}, "would be read as another"),
        ({"task": "linear_probe", "quantity": "auc"}, "would be read as another"),
    ],
)
def test_records_that_are_no_metric_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        MetricKey("rsna", **fields)


def test_shares_are_named_as_parameters_name_them():
    assert share_key("rsna", "p10") == read_key("rsna_p10_auc") and share_key("rsna", "ft1") == read_key("rsna_ft1_auc")
    for share in ("tenth", "10", "p", "p010", "zs", "ft", "p1_0"):
        with pytest.raises(ValueError, match="a share is named p and its percent"):
            share_key("rsna", share)


def test_kinds_by_hand():
    kinds = {
        "rsna_zs_auc": ("share", (0, 1), 100, 1, True, "AUC"),
        "mine/rsna_zs_auc": ("share", (0, 1), 100, 1, False, "AUC"),
        "rsna_ft10_auc": ("share", (0, 1), 100, 1, True, "tuned 10 %"),
        "rsna_p1_auc": ("share", (0, 1), 100, 1, False, "linear 1 %"),
        "openi_r10": ("share", (0, 1), 100, 1, True, "R@10"),
        "openi_r5": ("share", (0, 1), 100, 1, False, "R@5"),
        "openi_t2i_r10": ("share", (0, 1), 100, 1, False, "R@10 text to image"),
        "openi_r10_over_chance": ("ratio", (0, math.inf), 1, 1, False, "R@10 over chance"),
        "rsum": ("sum", (0, math.inf), 100, 1, True, "RSUM"),
        "rsum_clean": ("sum", (0, math.inf), 100, 1, False, "RSUM on clean images"),
        "macro_zs_auc": ("share", (0, 1), 100, 1, True, "AUC"),
        "openi_psnr50_none": ("decibel", (-math.inf, math.inf), 1, 2, False, "PSNR 50 % none"),
        "openi_ssim50_gain_none": ("share", (-math.inf, 1), 100, 1, False, "SSIM 50 % gain none"),
    }
    for name, kind in kinds.items():
        key = read_key(name)
        assert (key.unit, key.bounds, key.factor, key.decimals(1), key.headline, key.label) == kind, name


@pytest.fixture
def dice(monkeypatch):
    """A quantity added as CONTRIBUTING.md says."""
    monkeypatch.setitem(metric_key.QUANTITIES, "dice", Quantity(("segmentation",), "Dice"))
    return MetricKey("rsna", "segmentation", "dice")


def test_a_new_quantity_is_of_its_own_kind(dice):
    assert dice.name == "rsna_dice" and read_key("rsna_dice") == dice and dice.task not in TASKS
    assert (dice.unit, dice.over, dice.test_set, dice.headline, dice.label) == ("share", "", "rsna", True, "Dice")
    for test_set in TEST_SETS:
        key = MetricKey(test_set, "segmentation", "dice", "mine", clean=True)
        assert read_key(key.name) == key


def test_a_new_quantity_goes_from_evaluation_to_a_table_row(dice, tmp_path, monkeypatch):
    """Written, read, printed in percent with interval, clean figure and removed images; compared; its origin told."""
    monkeypatch.chdir(tmp_path)
    p = fake.make(tmp_path, fake.params(others={"a": OTHER, "b": OTHER}))
    for name, value in (("a", 0.5), ("b", 0.62)):
        drawn = Measure(value, value - 0.1, value + 0.1, 80, samples=np.linspace(-0.1, 0.1, 9) + value)
        found = {"metrics": {dice: drawn, of_clean(dice): Measure(0.4, 0.3, 0.5, 70)}, "removed": {"rsna": 10}}
        store.write_result(tmp_path / f"data/results/zero_shot/{name}.json", name, {**found, "notes": []})
    results, _ = load_results("data/results", (), (), ("a", "b"))
    columns = (
        Column("rsna_dice", "RSNA", "Dice"),
        Column("rsna_zs_auc", "RSNA", "ZS"),
        Column("rsum", "Total", "RSUM"),
    )
    two = [rows.row_of(columns, results, n, "Theirs", "", "", [None] * 3, 0.95) for n in ("a", "b")]
    cell = two[0].cells[0]
    assert (cell.ours, cell.low, cell.high, cell.n) == pytest.approx((50, 40, 60, 80))
    assert (cell.clean, cell.clean_n, cell.removed) == (40, 70, 10) and columns[0].dataset == "rsna"
    assert all(c.ours is None for c in two[0].cells[1:])  # in no other column, and in no sum
    second = rows.with_differences(columns, two, results, p, chained=False)[1].cells[0]
    assert second.against == pytest.approx((12, 12, 12))
    groups = [provenance._kind(column) for column in columns]
    assert len(set(groups)) == 3 and provenance._rule(p, dice) == "Dice"


OTHER = {"adapter": "gloria", "weights": "w", "model": "Theirs"}
