"""Tables 1–4: the paper's figures, who fills which row, what is printed and what is refused."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import fake_results as fake
import numpy as np
import pytest

from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import of_clean, read_key
from pipeline.reporting import control, formats, table_form, tables
from pipeline.reporting.results import ResultsError, headline_metrics, load_paper, load_results, load_summaries

SEEDS = Path(__file__).parents[2] / "shared" / "seeds"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path()


def built(root, p, **changes):
    summaries, results, _ = fake.load(root, p)
    return tables.build_tables(p, summaries, results), summaries, results


def lines(table) -> dict:
    """The CSV by (row, column)."""
    return {(r["row"], r["column"]): r for r in csv.DictReader(io.StringIO(formats.table_csv(table)))}


def test_paper_figures_known_by_heart():
    paper = load_paper()
    t2 = {r["key"]: r["paper"] for r in paper["table2"]["rows"]}
    assert t2["swint_mcc"] == [78.9, 88.0, 89.0, 80.1, 89.2, 89.8, 91.4, 92.9, 94.0, 62.8]
    assert paper["table1"]["rows"][1]["paper"] == [1808, 233, 22423, 3000, 4003, 1808, None]
    off = {}
    for number in (3, 4):
        table = paper[f"table{number}"]
        keys = [c["key"] for c in table["columns"]]
        for row in table["rows"]:
            recalls = sum(v for k, v in zip(keys, row["paper"], strict=True) if re.search(r"_r\d+$", k))
            if abs(recalls - row["paper"][-1]) > 0.05:
                off[number, row["key"]] = round(row["paper"][-1] - recalls, 1)
    assert off == {(3, "r50_m"): 1.0}  # the paper's own slip, noted under the table


@pytest.mark.skipif(not list(SEEDS.glob("001*.txt")), reason="the paper's text is not here")
def test_paper_figures_are_those_of_the_paper():
    text = next(SEEDS.glob("001*.txt")).read_text(encoding="utf-8")
    paper = load_paper()
    rows = [
        [c.strip() for c in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    number = re.compile(r"^[\d.,]+$")
    printed = [[float(c.replace(",", "")) for c in row if number.match(c)] for row in rows]
    printed = [row for row in printed if len(row) in (7, 8, 10, 5, 6)]
    ours = [[v for v in r["paper"] if v is not None] for n in range(1, 5) for r in paper[f"table{n}"]["rows"]]
    places = [printed.index(row) for row in ours]
    assert places == sorted(places) and len(set(places)) == len(ours) == 3 + 8 + 8 + 9


def test_each_run_fills_its_own_row_in_the_papers_order(here):
    p = fake.make(here)
    (_, t2, t3, t4, *_), _, _ = built(here, p)
    names = ["gloria", "resnet_m", "swin_m", "medclip", "resnet_mc", "swin_mc", "resnet_mcc", "swin_mcc"]
    assert [r.key for r in t2.rows] == [r.key for r in t3.rows] == names
    assert [(r.backbone, r.data) for r in t2.rows[1:3]] == [("R50", "M"), ("SwinT", "M")]
    assert [r.data for r in t2.rows[3:]] == ["M,C", "M,C", "M,C", "M,C,C14", "M,C,C14"]
    assert [r.key for r in t4.rows[:6]] == list(p.ablations)
    assert all(c.ours is None and c.paper for r in t4.rows[6:] for c in r.cells)
    for run, paper in (("resnet_mc", 83.0), ("swin_mcc", 78.9)):
        row = lines(t2)[run, "vindr_cxr_zs_auc"]
        ours = 100 * fake.value(run, "vindr_cxr_zs_auc")
        assert float(row["ours"]) == pytest.approx(ours, abs=1e-4)
        assert float(row["low"]) == pytest.approx(ours - 3.1, abs=1e-4)
        assert float(row["paper"]) == paper and row["n"] == "240"
        assert float(row["difference"]) == pytest.approx(ours - paper, abs=2e-4)
    assert float(lines(t2)["swin_m", "siim_p100_auc"]["ours"]) == pytest.approx(
        100 * fake.value("swin_m", "siim_p100_auc"), abs=1e-4
    )
    assert float(lines(t4)["clip_icl", "mimic_cxr_r5"]["ours"]) == pytest.approx(
        100 * fake.value("clip_icl", "mimic_cxr_r5"), abs=1e-4
    )
    assert lines(t4)["clip_icl", "mimic_cxr_r5"]["paper"] == "41.6000"


def test_rsum_is_a_sum_or_nothing(here):
    p = fake.make(here)
    (_, _, t3, t4, *_), _, _ = built(here, p)
    nine, six = lines(t3)["resnet_mc", "rsum"], lines(t4)["resnet_mc", "rsum"]
    recalls = fake.recalls("resnet_mc")
    assert float(nine["ours"]) == pytest.approx(100 * sum(recalls), abs=1e-3) and nine["low"]
    assert float(six["ours"]) == pytest.approx(100 * sum(recalls[:6]), abs=1e-3) and not six["low"]
    path = here / "data/results/retrieval/swin_m/0.json"
    raw = json.loads(path.read_text())
    del raw["metrics"]["openi_r10"]  # what evaluation added up is then another sum, and no RSUM of Table 3
    raw["metrics"]["rsum_clean"] = raw["metrics"]["rsum"] | {"clean": True}
    path.write_text(json.dumps(raw))
    (_, _, t3, *_), _, results = built(here, p)
    assert lines(t3)["swin_m", "rsum"]["ours"] == lines(t3)["swin_m", "openi_r10"]["ours"] == ""
    assert not {"rsum", "rsum_clean"} & headline_metrics(results)["swin_m"].keys()


def test_the_interval_of_a_sum_has_the_asked_confidence(here):
    """Table 4 adds up six recalls, of which evaluation has no sum; at 50 % the ends are the quartiles."""
    half = {**fake.PARAMS["evaluate"], "bootstrap": {"samples": 200, "confidence": 0.5}}
    p = fake.make(here, fake.params(evaluate=half))
    rng = np.random.default_rng(0)
    samples = {name: rng.normal(fake.value("clip", name), 0.05, 200) for name in fake.RECALLS}
    np.savez(here / "data/results/retrieval/clip/0.npz", **samples)
    row = lines(built(here, p)[0][3])["clip", "rsum"]
    total = 100 * np.sum([samples[name] for name in fake.RECALLS[:6]], axis=0)
    assert [float(row["low"]), float(row["high"])] == pytest.approx(np.percentile(total, [25, 75]), abs=1e-4)


def test_a_run_the_paper_does_not_have_is_appended(here):
    runs = {**fake.PARAMS["runs"], "vit": {"image_encoder": "resnet", "datasets": ["chexpert"]}}
    nine = [*fake.PARAMS["ablations"], "resnet_m", "swin_mc", "swin_mcc"]  # as many as the paper's rows
    p = fake.make(here, fake.params(runs=runs, main=["vit", "swin_m"], ablations=[*nine, "vit"]))
    (_, t2, _, t4, *_), _, _ = built(here, p)
    assert [r.key for r in t2.rows if r.run] == ["swin_m", "vit"] and t2.rows[-1].key == t4.rows[-1].key == "vit"
    assert t2.rows[-1].data == "C" and all(c.paper is None and c.ours for c in t2.rows[-1].cells)
    assert t2.rows[1].key == "r50_m" and all(c.ours is None for c in t2.rows[1].cells)


@pytest.mark.parametrize(
    ("ours", "paper", "shown"),
    [
        (78.34, 78.8, "−0.5"),
        (78.84, 78.8, "0.0"),
        (90.0, 78.8, "+11.2"),
        (78.25, 78.8, "−0.6"),
        (None, 78.8, "—"),
        (1.0, None, "—"),
    ],
)
def test_printed_difference_is_that_of_the_printed_figures(ours, paper, shown):
    assert formats.show_difference(table_form.Cell(ours, paper), 1) == shown


def test_nothing_computed_prints_dashes_only(here):
    p = fake.params(runs={}, main=[], ablations=[], control="", sources={})
    for table in tables.build_tables(p, {}, {}):
        text = formats.table_markdown(table)
        rows = [line for line in text.splitlines() if line.startswith("| ") and "| ours" in line]
        assert bool(rows) == bool(table.rows) and not any(re.search(r"\d", r.split("| ours")[1]) for r in rows)
        assert "difference" not in text and "nan" not in text.lower()


def test_markdown_has_every_figure(here):
    p = fake.make(here)
    (_, t2, *_), summaries, _ = built(here, p)
    text = formats.table_markdown(t2, tables.phantoms(summaries))
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len({len(r) for r in rows}) == 1
    start = next(i for i, r in enumerate(rows) if r[0] == "CXR-CLIP `swin_mc`")
    v = fake.value("swin_mc", "vindr_cxr_zs_auc") * 100
    assert [r[4] for r in rows[start : start + 4]] == [
        f"{v:.1f}",
        f"{v - 3.1:.1f}–{v + 2.2:.1f}",
        "82.7",
        f"{round(v, 1) - 82.7:+.1f}".replace("-", "−"),
    ]
    assert "say nothing about patients" in text and "0 of 240 test images" in text and text.count("list absent") == 1


def test_table_1_of_real_and_phantom_archives(here):
    p = fake.make(here)
    siim = {"train": {"studies": 8432, "images": 8432}, "valid": {"studies": 1808, "images": 1808}}
    fake.write_dataset(
        here, "siim", False, listed={**siim, "test": {"studies": 1807, "images": 1807}}, labels_only=True
    )
    (t1, *_), _, _ = built(here, p)
    by_data = {(r["row"], r["data"], r["column"]): r for r in csv.DictReader(io.StringIO(formats.table_csv(t1)))}
    assert by_data["train", "siim", "images listed"]["difference"] == "10"
    assert ("train", "siim", "images ingested") not in by_data
    assert by_data["train", "mimic_cxr", "studies listed"]["ours"] == "70"  # studies, not its 91 images
    assert by_data["train", "mimic_cxr", "studies ingested"]["ours"] == "69"
    assert by_data["train", "rsna", "images listed"]["difference"] == ""
    text = formats.table_markdown(t1)
    train = next(line for line in text.splitlines() if "| difference" in line)
    assert train.count("phantom") == 5 and "+10" in train
    assert "8,422 is a misprint" in text and "22,423 is one short" not in text


def test_control_run_against_chance(here):
    p = fake.make(here)
    _, _, results = built(here, p)
    full, rows = control.control_rows(p, results)
    assert full == "resnet_mcc" and len(rows) == 8
    assert {r.at_chance for r in rows} == {True, None}
    recall = read_key("openi_r10")
    results["shuffled"].measures[recall] = results["resnet_mcc"].measures[recall]
    assert [r.name for r in control.control_rows(p, results)[1] if r.at_chance is False] == [
        "Open-I R@10",
    ]
    assert control.control_rows(fake.params(control=""), results) == ("", [])


def test_metrics_are_flat_rounded_and_of_enabled_runs_only(here):
    p = fake.make(here)
    (here / "data/results/zero_shot/stray.json").write_text("not even JSON")
    runs = {n: r for n, r in fake.PARAMS["runs"].items() if n != "swin_m"}
    p = fake.params(runs=runs, main=["resnet_m"])
    _, results, missing = fake.load(here, p)
    metrics = headline_metrics(results)
    assert list(metrics) == list(runs) and not missing
    one = metrics["resnet_m"]
    assert one["rsna_p10_auc"] == round(fake.value("resnet_m", "rsna_p10_auc"), 6)
    aucs = [fake.value("resnet_m", f"{d}_zs_auc") for d in ("vindr_cxr", "rsna", "siim")]
    assert one["macro_zs_auc"] == pytest.approx(sum(aucs) / 3, abs=1e-6)
    assert one["mimic_cxr_r10_over_chance"] == pytest.approx(fake.value("resnet_m", "mimic_cxr_r10") / 0.125, abs=1e-5)
    assert one["rsum"] == pytest.approx(sum(fake.recalls("resnet_m")), abs=1e-5)
    keys = list(one)
    assert keys.index("openi_r1") < keys.index("openi_r5") < keys.index("openi_r10")
    assert all(isinstance(v, float) for v in one.values()) and "rsna_p10_auc" not in metrics["clip"]


def test_runs_without_back_translation_say_so(here):
    p = fake.make(here)
    line = "sentence swap alone in swin_mcc, swin_mc, resnet_mc, resnet_m, swin_m, resnet_mcc, in the paper also by"
    (t1, t2, t3, t4, *_), _, _ = built(here, p)
    assert [sum("sentence swap" in note for note in t.notes) for t in (t1, t2, t3, t4)] == [0, 1, 1, 1]
    assert line in formats.table_markdown(t2) and "in clip, clip_study" in formats.table_markdown(t4)
    runs = {**fake.PARAMS["runs"], "clip": {**fake.PARAMS["runs"]["clip"], "augment": {"text": False}}}
    runs["clip_study"] = {"image_encoder": "resnet", "datasets": ["chexpert"]}  # labels alone
    t4 = built(here, fake.params(runs=runs))[0][3]
    assert "sentence swap alone in clip_aug, clip_mvs, clip_icl, resnet_mc, in" in formats.table_markdown(t4)
    named = fake.params(back_translation={"forward": "a", "back": "b"})
    assert not any("sentence swap" in formats.table_markdown(t) for t in built(here, named)[0])


def test_missing_results_are_named(here):
    p = fake.make(here)
    (here / "data/results/few_shot/swin_m/0.json").unlink()
    summaries, results, missing = fake.load(here, p)
    assert missing == ["data/results/few_shot/swin_m/0.json"]
    t2 = tables.build_tables(p, summaries, results)[1]
    assert lines(t2)["swin_m", "rsna_p10_auc"]["ours"] == "" and lines(t2)["swin_m", "rsna_zs_auc"]["ours"]


def test_bad_input_is_one_line_that_names_it(here):
    p = fake.make(here)
    path = here / "data/results/zero_shot/resnet_m/0.json"
    good = json.loads(path.read_text())

    def holding(**changes):
        return json.dumps({**good, "metrics": {"rsna_zs_auc": fake.stored("rsna_zs_auc", 0.7) | changes}})

    bad = [
        (holding(value=float("nan")), "rsna_zs_auc.value is nan"),
        (holding(value=78.0), "from 0 to 1"),
        (holding(low=None), "rsna_zs_auc.low is None"),
        (holding(test_set="siim"), "metrics.rsna_zs_auc has the fields of siim_zs_auc"),
        (holding(quantity="dice"), "not in the form of docs/results.md; run: dvc repro -f zero_shot"),
        (json.dumps({**good, "metrics": {"rsna.auc": {"value": 0.7, "low": 0, "high": 1, "n": 3}}}), "not in the form"),
        (json.dumps({**good, "run": "swin_m/0"}), "swin_m/0"),
        ("{", "not JSON"),
    ]
    for text, part in bad:
        path.write_text(text)
        with pytest.raises(ResultsError, match=re.escape(part)) as error:
            load_results(here / "data/results", ["resnet_m"], [])
        assert "resnet_m/0.json" in str(error.value) and "\n" not in str(error.value)
    fake.write_dataset(here, "rsna", rejected_images=2)
    with pytest.raises(ResultsError, match="are not the 104 found"):
        load_summaries(here / "data/index", p.sources)
    (here / "data/index/siim.json").unlink()
    with pytest.raises(ResultsError, match="dvc repro ingest@siim"):
        load_summaries(here / "data/index", ["siim"])


def test_same_results_same_bytes(here):
    p = fake.make(here)
    texts = []
    for folder in (Path("one"), Path("two")):
        parts, summaries, results = built(here, p)
        paths = formats.write_tables(folder, parts, headline_metrics(results), tables.phantoms(summaries))
        texts.append({path.name: path.read_bytes() for path in paths})
    assert texts[0] == texts[1] and sorted(texts[0]) == sorted(
        [
            "metrics.json",
            *(
                f"table{n}.{end}"
                for n in (1, 2, 3, 4, "S1", "S2", "S3", "S4", "S5", "S6")
                for end in ("md", "csv", "tex")
            ),
        ]
    )


def numbered(tables_, number):
    return next(t for t in tables_ if t.number == number)


def test_a_clean_figure_stands_beside_the_papers_with_its_count(here):
    p = fake.make(here)
    summaries, results, _ = fake.load(here, p)
    key = read_key("rsna_zs_auc")
    one, other = (results[name].measures for name in ("resnet_mcc", "resnet_m"))
    one[key], other[key] = replace(one[key], removed=150), replace(other[key], removed=0)
    one[of_clean(key)] = Measure(0.612, 0.5, 0.7, 90)
    t2 = numbered(tables.build_tables(p, summaries, results), "2")
    column = [c.key for c in t2.columns].index("rsna_zs_auc")
    cells = {r.run: r.cells[column] for r in t2.rows}
    assert formats.show_clean(cells["resnet_mcc"], 1) == "61.2 (90)"
    assert formats.show_clean(cells["resnet_m"], 1) == "same"
    assert formats.show_clean(cells["swin_m"], 1) == "—"  # nobody looked
    line = lines(t2)["resnet_mcc", "rsna_zs_auc"]
    assert [line[k] for k in ("clean", "clean_n", "removed")] == ["61.2000", "90", "150"]
    assert headline_metrics(results)["resnet_mcc"]["rsna_zs_auc_clean"] == 0.612
    assert formats.CLEAN in formats.all_notes(t2)
    del one[of_clean(key)]  # every test image was seen: there is no clean figure, and it is not "same" either
    t2 = numbered(tables.build_tables(p, summaries, results), "2")
    assert formats.show_clean(next(r for r in t2.rows if r.run == "resnet_mcc").cells[column], 1) == "—"


def test_a_table_says_whether_it_was_audited_and_what_was_found(here):
    p = fake.make(here)
    summaries, results, _ = fake.load(here, p)

    def notes():
        return formats.all_notes(numbered(tables.build_tables(p, summaries, results), "3"))

    sets = ("CheXpert5x200", "MIMIC-CXR", "Open-I")
    unaudited = "Not audited for test images that training has seen: {}; run: dvc repro retrieval"

    def removed(run, count, *test_sets):
        for key, m in results[run].measures.items():
            if key.test_set in test_sets:
                results[run].measures[key] = replace(m, removed=count)

    names = [c.dataset for c in numbered(tables.build_tables(p, summaries, results), "3").columns]
    assert unaudited.format(", ".join(sets)) in notes() and formats.UNSEEN not in notes()
    for run in results:
        removed(run, 0, *names)
    assert formats.UNSEEN in notes() and not any("Not audited" in note for note in notes())
    removed("swin_m", None, "openi")
    assert unaudited.format("Open-I") in notes() and formats.UNSEEN not in notes()
    removed("resnet_m", 3, "mimic_cxr")
    assert formats.CLEAN in notes() and formats.UNSEEN not in notes()


def test_a_line_of_paper_figures_only_where_the_paper_has_some(here):
    p = fake.make(here)
    t2 = numbered(built(here, p)[0], "2")
    own = replace(t2.rows[1], cells=tuple(replace(c, paper=None) for c in t2.rows[1].cells))
    labels = [[label for label, _ in formats.figure_lines(t2, row)] for row in (t2.rows[0], t2.rows[1], own)]
    assert labels == [["ours", "paper"], ["ours", "95 % interval", "paper", "difference"], ["ours", "95 % interval"]]


@pytest.mark.parametrize(
    ("ours", "paper", "phantom", "bold"),
    [(78.86, 78.8, False, True), (78.84, 78.8, False, False), (90.0, 78.8, True, False), (None, 78.8, False, False)],
)
def test_bold_is_above_the_paper_as_printed_on_real_images(ours, paper, phantom, bold):
    table = table_form.Table("2", "T", "", (), (table_form.Column("rsna_zs_auc", "RSNA", "ZS"),), ())
    cell = table_form.Cell(ours, paper, phantom=phantom)
    assert formats.bold(table, table_form.Row("k", "m", (cell,))) == [bold]


def test_rows_are_compared_over_the_same_resamples(here):
    """Table 4: with the row above; Table 2: with the first row of ours. Worked out by hand."""
    p = fake.make(here)
    summaries, results, _ = fake.load(here, p)
    rng = np.random.default_rng(0)
    draws = {name: rng.normal(0.5, 0.1, 200) for name in ("clip", "clip_study", "resnet_m", "swin_mcc")}
    key = read_key("chexpert5x200_zs_accuracy")
    for name, samples in draws.items():
        results[name].measures[key] = replace(results[name].measures[key], samples=samples)
    built_tables = tables.build_tables(p, summaries, results)
    for number, row, above in (("4", "clip_study", "clip"), ("2", "swin_mcc", "resnet_m")):
        table = numbered(built_tables, number)
        found = next(r for r in table.rows if r.run == row)
        assert found.against == above
        cell = found.cells[[c.key for c in table.columns].index("chexpert5x200_zs_accuracy")]
        difference = fake.value(row, "chexpert5x200_zs_accuracy") - fake.value(above, "chexpert5x200_zs_accuracy")
        low, high = np.percentile(draws[row] - draws[above], [2.5, 97.5])
        assert cell.against == pytest.approx((100 * difference, 100 * low, 100 * high))
    assert numbered(built_tables, "4").rows[0].against == ""


def test_latex_escapes_what_its_language_would_read(here):
    p = fake.make(here)
    summaries, results, _ = fake.load(here, p)
    for table in tables.build_tables(p, summaries, results):
        text = formats.table_latex(table, tables.phantoms(summaries))
        assert text.isascii() and text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
        for line in text.splitlines()[1:]:
            assert not re.search(r"(?<!\\)[%#_]", line.replace("{%", "")) or "label" in line, line
        rows = [line for line in text.splitlines() if line.endswith(r"\\")]
        cells = len(table.heads) + 1 + len(table.columns)
        assert {len(re.split(r"(?<!\\)&", r)) for r in rows if "multicolumn" not in r} == {cells}
    assert formats.tex("50 % of a_b & {c}") == r"50 \% of a\_b \& \{c\}"


def test_other_peoples_models_fill_the_papers_rows_or_say_what_is_missing(here):
    others = {
        "gloria": {
            "adapter": "gloria",
            "weights": "weights/gloria",
            "model": "GLoRIA",
            "backbone": "R50",
            "data": "C*",
        },
        "theirs": {
            "adapter": "cxr_clip",
            "weights": "w",
            "model": "CXR-CLIP (released)",
            "backbone": "R50",
            "data": "M",
        },
    }
    p = fake.make(here, fake.params(others=others))
    summaries = fake.load(here, p)[0]
    folder = here / "data/results"
    for kind in ("zero_shot", "few_shot", "retrieval"):
        missing = {"run": "gloria", "metrics": {}, "notes": ["put its checkpoint in weights/gloria"]}
        (folder / kind / "gloria.json").write_text(json.dumps(missing))
        names = {"zero_shot": ["rsna_zs_auc"], "few_shot": ["rsna_p10_auc"]}.get(kind, [])
        found = fake.measured("theirs", *names)
        (folder / kind / "theirs.json").write_text(json.dumps({"run": "theirs", "metrics": found, "notes": []}))
    results, missing = load_results(folder, p.runs, p.main, p.others)
    assert not missing
    t2 = numbered(tables.build_tables(p, summaries, results), "2")
    assert [r.run for r in t2.rows[:3]] == ["gloria", "resnet_m", "theirs"]
    assert t2.rows[2].model == "CXR-CLIP (released)"
    assert all(c.ours is None and c.paper for c in t2.rows[0].cells)
    assert t2.notes.count("GLoRIA: put its checkpoint in weights/gloria") == 1
    for name in ("rsna_zs_auc", "rsna_p10_auc"):
        shown = float(lines(t2)["theirs", name]["ours"])
        assert shown == pytest.approx(100 * fake.value("theirs", name), abs=1e-4)


def test_seeds_are_shown_one_by_one(here):
    p = fake.make(here)
    path = here / "data/results/few_shot/swin_m/0.json"
    raw = json.loads(path.read_text())
    raw["metrics"]["rsna_p10_auc"] |= {"value": 0.8, "low": 0.7, "high": 0.9, "seeds": {"0": 0.78, "1": 0.82}}
    path.write_text(json.dumps(raw))
    table = numbered(built(here, p)[0], "S4")
    row = next(r for r in table.rows if r.run == "swin_m")
    assert dict(formats.figure_lines(table, row))["by seed"].count("78.0, 82.0") == 1
    raw["metrics"]["rsna_p10_auc"]["seeds"]["1"] = 1.2
    path.write_text(json.dumps(raw))
    with pytest.raises(ResultsError, match=r"seeds\.1 is 1\.2"):
        built(here, p)


def test_trainings_with_several_seeds_become_one_row(here):
    """Means, Student's intervals over the seeds (patients add nothing here) and differences seed by seed."""
    p = fake.make(here, fake.params(seeds=[0, 1, 2]))
    folder = here / "data/results"
    shifts = {"clip": (0, 0.01, 0.02), "clip_study": (0.0, 0.03, 0.02)}
    for run in p.runs:
        for seed in (1, 2):
            for kind in ("zero_shot", "few_shot", "retrieval"):
                path = folder / kind / run / "0.json"
                if not path.exists():
                    continue
                raw = json.loads(path.read_text())
                for m in raw["metrics"].values():
                    for part in ("value", "low", "high"):
                        m[part] += 0.25 * shifts.get(run, (0, 0, 0))[seed] if m["value"] < 0.98 else 0
                path.with_stem(str(seed)).write_text(json.dumps({**raw, "run": f"{run}/{seed}"}))
            csv_file = folder / "pretrain" / run / "0.csv"
            csv_file.with_stem(str(seed)).write_text(csv_file.read_text())
    for run in ("clip", "clip_study"):
        for seed in (0, 1, 2):
            path = folder / "zero_shot" / run / f"{seed}.json"
            value = json.loads(path.read_text())["metrics"]["chexpert5x200_zs_accuracy"]["value"]
            np.savez(path.with_suffix(".npz"), **{"chexpert5x200_zs_accuracy": np.full(20, value)})
    results, missing = load_results(folder, p.runs, p.main, (), p.seeds)
    assert not missing
    t4 = numbered(tables.build_tables(p, fake.load(here, p)[0], results), "4")
    one = next(r for r in t4.rows if r.run == "clip").cells[0]
    first = 100 * fake.value("clip", "chexpert5x200_zs_accuracy")
    assert one.seeds == pytest.approx((first, first + 0.25, first + 0.5))
    half = 4.302653 * 0.25 / 3**0.5
    assert (one.ours, one.low, one.high) == pytest.approx(
        (first + 0.25, first + 0.25 - half, first + 0.25 + half), abs=1e-4
    )
    two = next(r for r in t4.rows if r.run == "clip_study").cells[0]
    by_seed = np.subtract(two.seeds, one.seeds)
    assert two.against[0] == pytest.approx(by_seed.mean())
    half = 4.302653 * by_seed.std(ddof=1) / 3**0.5
    assert two.against[1:] == pytest.approx((by_seed.mean() - half, by_seed.mean() + half), abs=1e-4)
    rsum = next(r for r in t4.rows if r.run == "clip").cells[-1]
    assert len(rsum.seeds) == 3 and rsum.low < rsum.ours < rsum.high
    assert any("means over trainings with seeds 0, 1, 2" in note for note in t4.notes)
    assert "by seed" in formats.table_markdown(t4)
    (folder / "zero_shot/clip/1.json").unlink()  # a mean over fewer seeds is another figure
    results, missing = load_results(folder, p.runs, p.main, (), p.seeds)
    assert missing == ["data/results/zero_shot/clip/1.json"] and read_key("rsna_zs_auc") not in results["clip"].measures


def test_what_runs_were_probed_and_what_they_regenerate_is_read(tmp_path):
    """PSNR is no share and SSIM may be negative; both are read for the runs that are named, and only for them."""

    def stored(low, value, high, *names):
        return {name: fake.stored(name, value, low=low, high=high) for name in names}

    m = (0.7, 0.75, 0.8)
    files = {
        "zero_shot": {"metrics": stored(*m, "chestxray14/chestxray14_official_zs_auc")},
        "retrieval": {"metrics": {}},
        "official": {"metrics": stored(*m, "chestxray14_official_p10_auc"), "removed": {"chestxray14_official": 160}},
        "regeneration": {
            "metrics": {
                **stored(20, 21.5, 23, "openi_psnr50_matching", "openi_psnr50_matching_scale1"),
                **stored(-0.2, -0.1, 0, "openi_ssim50_matching"),
                **stored(-0.2, -0.05, 0.1, "openi_psnr50_gain_none"),
            },
        },
    }
    for kind, content in files.items():
        for seed in (0, 1):
            path = tmp_path / kind / f"mixed/{seed}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"run": f"mixed/{seed}", "notes": [], **content}))
    (tmp_path / "pretrain" / "mixed").mkdir(parents=True)
    for seed in (0, 1):
        (tmp_path / "pretrain" / "mixed" / f"{seed}.csv").write_text("epoch\n0\n")
    named = {"official": ["mixed"], "regeneration": ["mixed"]}
    for seeds in ((0,), (0, 1)):
        found, missing = load_results(tmp_path, ["mixed"], [], (), seeds, **named)
        assert missing == []
        mixed = {key.name: m for key, m in found["mixed"].measures.items()}
        assert mixed["chestxray14_official_p10_auc"].value == 0.75
        assert mixed["openi_psnr50_matching"].value == 21.5
        assert mixed["openi_ssim50_matching"].value == pytest.approx(-0.1)
        assert mixed["openi_ssim50_matching"].low < 0 and mixed["openi_psnr50_matching"].high > 1
        assert mixed["chestxray14_official_p10_auc"].removed == 160
        assert mixed["openi_psnr50_gain_none"].value == pytest.approx(-0.05)
        assert mixed["openi_psnr50_gain_none"].low < 0
        assert set(headline_metrics(found)["mixed"]) == {
            *("chestxray14/chestxray14_official_zs_auc", "chestxray14_official_p10_auc"),
            *("openi_psnr50_matching", "openi_ssim50_matching", "openi_psnr50_gain_none"),
        }
    unnamed, _ = load_results(tmp_path, ["mixed"], [])
    assert set(unnamed["mixed"].measures) == {read_key("chestxray14/chestxray14_official_zs_auc")}
    (tmp_path / "regeneration/mixed/0.json").unlink()
    assert load_results(tmp_path, ["mixed"], [], **named)[1] == [str(tmp_path / "regeneration/mixed/0.json")]
    bad = {"run": "mixed/0", "metrics": stored(0.7, 1.5, 0.8, "openi_ssim50_matching")}
    (tmp_path / "regeneration/mixed/0.json").write_text(json.dumps(bad))
    with pytest.raises(ResultsError, match=r"ssim50_matching\.value is 1\.5"):
        load_results(tmp_path, ["mixed"], [], **named)


def test_an_ablation_of_prompts_stands_below_the_run_it_is_like(here):
    """Its own row in S1 alone, compared with the run whose prompts it changes, and in no row of the paper's."""
    runs = {
        **fake.PARAMS["runs"],
        "other": {**fake.PARAMS["runs"]["swin_mc"], "like": "swin_mc", "prompts": "ablation"},
    }
    p = fake.make(here, fake.params(runs=runs, prompt_ablations=["other"]))
    for run in ("other", "swin_mc"):
        samples = {"chexpert5x200_zs_accuracy": np.full(9, fake.value(run, "chexpert5x200_zs_accuracy"))}
        np.savez(here / f"data/results/zero_shot/{run}/0.npz", **samples)
    built = tables.build_tables(p, *fake.load(here, p)[:2])
    s1 = numbered(built, "S1")
    row = next(r for r in s1.rows if r.run == "other")
    assert row.model == "trained with prompts_gloria.yaml" and (row.backbone, row.data) == ("SwinT", "M,C")
    assert row.against == "swin_mc" and row.cells[0].paper is None
    values = [fake.value(run, "chexpert5x200_zs_accuracy") for run in ("other", "swin_mc")]
    assert row.cells[0].against[0] == pytest.approx(100 * (values[0] - values[1]))
    assert not any(r.run == "other" for t in built if t.number != "S1" for r in t.rows)
