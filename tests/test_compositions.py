"""Tables S5 and S6: what a run learns from in words, decibels beside shares, clean figures and paired differences."""

import csv
import io
from types import MappingProxyType

import fake_results as fake
import numpy as np
import pytest

from pipeline.config.params import Run
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import of_clean, read_key
from pipeline.reporting import formats, tables
from pipeline.reporting.compositions import learns_from
from pipeline.reporting.results import RunResult, Summary

M, NIH, OPENI = "mimic_cxr", "chestxray14_official", "openi"
SOURCES = {
    **fake.PARAMS["sources"],
    NIH: {"reader": "chestxray14", "path": "x", "stamp": "x", "split": "official"},
}
ZERO_SHOT = f"chestxray14/{NIH}_zs_auc"
RUNS = {
    "pairs": {"paired": [M]},
    "apart": {"images": [NIH], "texts": [M]},
    "resnet_m": {"image_encoder": "resnet", "datasets": [M]},
}
DRAWS = np.array([0.0, 1.0, -1.0, 0.5])  # of a made-up bootstrap, around each figure


def result(name, figures, clean=MappingProxyType({}), removed=MappingProxyType({})):
    """A run with these figures, intervals of one tenth to both sides, and four resamples."""
    run = RunResult(name, (0,))
    for key, value in ((read_key(name), value) for name, value in figures.items()):
        draws = value + 0.1 * DRAWS
        run.measures[key] = Measure(value, value - 0.1, value + 0.1, 50, samples=draws, removed=removed.get(key.where))
    for key, value in ((of_clean(read_key(name)), value) for name, value in clean.items()):
        run.measures[key] = Measure(value, value - 0.1, value + 0.1, 20)
    return run


@pytest.fixture
def built():
    p = fake.params(
        sources=SOURCES,
        runs=RUNS,
        main=[],
        ablations=[],
        control="",
        compositions=["pairs", "apart", "resnet_m"],
        evaluate={**fake.PARAMS["evaluate"], "regeneration": {"runs": ["pairs"], "ratios": [0.75, 0.25]}},
    )
    ways = {"matching": 20.5, "none": 20.25, "gain_none": 0.25, "gain_shuffled": -0.004}
    regenerated = {f"{M}_psnr{ratio}_{way}": v for ratio in (25, 75) for way, v in ways.items()}
    ssim = {f"{M}_ssim75_matching": 0.5}
    p100 = f"{NIH}_p100_auc"
    results = {
        "pairs": result("pairs", {p100: 0.7, f"{M}_r10": 0.2, **regenerated, **ssim}, removed={NIH: 0}),
        "apart": result("apart", {p100: 0.725}, {p100: 0.6}, removed={NIH: 30}),
        "resnet_m": result("resnet_m", {f"{M}_r10": 0.25, ZERO_SHOT: 0.8}, removed={f"chestxray14/{NIH}": 160, NIH: 3}),
    }
    results["resnet_m"].notes = [f"chestxray14/{NIH}: no test image is clean", "rsna: not of this table"]
    results["pairs"].pools[M] = {"chance": {"r10": 0.064}}
    results["apart"].notes = ["not aligned: no pair in training"]
    summaries = {d: Summary(d, d == M, False, False, {}, {}, 0, 0, 0, {}, ()) for d in (M, NIH, OPENI)}
    return {t.number: t for t in tables.build_tables(p, summaries, results)}


def test_what_runs_learn_from_in_words():
    said = {
        "pairs M": {"paired": (M,)},
        "pairs M + images C14 + texts O": {"paired": (M,), "images": (NIH,), "texts": ("openi_by_patient",)},
        "25 % of pairs M, the others apart": {"paired": (M,), "paired_fraction": 0.25},
        "pairs M, all taken apart + images C14": {"paired": (M,), "images": (NIH,), "paired_fraction": 0.0},
        "images C14 + texts M": {"images": (NIH,), "texts": (M,)},
        "M,C": {"image_encoder": "resnet", "datasets": (M, "chexpert")},
        "pairs ours": {"paired": ("ours",)},  # a data set of the reader's own
    }
    assert {learns_from(Run(**roles)) for roles in said.values()} == set(said)
    assert [learns_from(Run(**roles)) for roles in said.values()] == list(said)


def test_compositions_in_order_with_decibels_and_clean_figures(built):
    table = built["S5"]
    assert [(r.run, r.model, r.backbone) for r in table.rows] == [
        *(("pairs", "one transformer", ""), ("apart", "one transformer", "")),
        ("resnet_m", "CXR-CLIP", "R50"),
    ]
    at = {c.key: i for i, c in enumerate(table.columns)}
    pairs, apart, resnet = table.rows
    cell = pairs.cells[at[f"{M}_psnr75_matching"]]  # of the largest share, in dB
    assert (cell.ours, cell.low, cell.high) == pytest.approx((20.5, 20.4, 20.6)) and cell.phantom
    assert pairs.cells[at[f"{M}_ssim75_matching"]].ours == pytest.approx(50)
    assert f"{M}_psnr25_matching" not in at and f"{NIH}_ft100_auc" not in at
    probed = apart.cells[at[f"{NIH}_p100_auc"]]
    assert (probed.ours, probed.clean, probed.clean_n, probed.removed) == (
        pytest.approx(72.5),
        pytest.approx(60),
        20,
        30,
    )
    assert not probed.phantom and apart.against == "pairs"
    assert probed.against == pytest.approx((2.5, 2.5, 2.5))  # the same draws, 0.025 apart in each
    assert apart.cells[at[f"{M}_r10"]].ours is None and resnet.cells[at[f"{M}_psnr75_none"]].ours is None
    assert "R@10 by chance: MIMIC-CXR 6.4." in table.notes and "not aligned: no pair in training" in table.notes
    assert resnet.cells[at[ZERO_SHOT]].removed == 160  # by the protocol that the column is of
    assert "ChestX-ray14 official: no test image is clean" in table.notes and "not of this" not in str(table.notes)
    text = formats.table_markdown(table)
    assert " 20.50 |" in text and "−0.10 to 0.10" in text
    assert "−0.00" not in text and "72.5" in text and "60.0 (20)" in text
    lines = list(csv.DictReader(io.StringIO(formats.table_csv(table))))
    assert {x["ours"] for x in lines if x["column"] == f"{M}_psnr75_none"} == {"20.2500", ""}
    assert r"\begin{tabular}" in formats.table_latex(table)


def test_regeneration_has_a_row_for_each_test_set_and_share(built):
    table = built["S6"]
    assert [(r.run, r.backbone, r.data) for r in table.rows] == [
        *(("pairs", "MIMIC-CXR", "25 %"), ("pairs", "MIMIC-CXR", "75 %")),
        *(("pairs", "Open-I", "25 %"), ("pairs", "Open-I", "75 %")),
    ]
    at = {c.key: i for i, c in enumerate(table.columns)}
    one = table.rows[1].cells
    assert (one[at["each_psnr_matching"]].ours, one[at["each_psnr_gain_none"]].ours) == (20.5, 0.25)
    assert one[at["each_ssim_matching"]].ours == pytest.approx(50)
    assert table.rows[0].cells[at["each_ssim_matching"]].ours is None  # only measured at 75 %
    assert all(c.ours is None for c in table.rows[2].cells)


def test_without_a_run_both_say_so():
    p = fake.params(**fake.SMALL)
    found = {t.number: t for t in tables.build_tables(p, {}, {"resnet_mcc": RunResult("resnet_mcc")})}
    assert found["S5"].rows == () == found["S6"].rows
    assert found["S5"].notes == ("compositions in params.yaml names no run.",)
    assert "names no run" in found["S6"].notes[0]
    assert "names no run" in formats.table_markdown(found["S6"])
