"""reports/index.html: self-contained, free of patients unless allowed, the same for the same results."""

import base64
import io
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fake_results as fake
import numpy as np
import pytest
from PIL import Image

from pipeline.config.params import Regeneration, Report
from pipeline.evaluation.candidates import text_digest
from pipeline.reporting import figures, page, tables
from pipeline.storage.shards import load_view


class Tags(HTMLParser):
    """All start tags with their attributes, the text, and whether every tag that needs it is closed."""

    VOID = frozenset({"meta", "link", "img", "br", "line"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working directory with results of seven phantoms, and its page."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        p = fake.make(Path())
        yield p, render(p)


def render(p, summaries=None) -> str:
    loaded, results, missing = fake.load(Path(), p)
    summaries = summaries or loaded
    built = tables.build_tables(p, summaries, results)
    return page.render_page(p, built, summaries, results, missing, Path("data/index"), load_view)


def test_page_loads_nothing_from_anywhere(world):
    tags = Tags(world[1]).tags
    assert not {t for t, _ in tags} & {"script", "iframe", "object", "embed", "base", "video"}
    for tag, attrs in tags:
        if tag in ("img", "link"):
            assert (attrs.get("src") or attrs.get("href")).startswith("data:")
        assert "srcset" not in attrs and not any(name.startswith("on") for name in attrs)
    assert not re.search(r"@import|url\((?!#)", world[1])
    assert len(world[1].encode()) < 900_000
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {a["href"][1:] for t, a in tags if t == "a" and a["href"].startswith("#")}
    assert len(anchors) == 12 and anchors <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", world[1])) <= set(ids)


def test_page_has_the_tables_and_the_figures(world):
    p, html = world
    tags = Tags(html)
    for run in p.main:
        assert f"{100 * fake.value(run, 'rsna_zs_auc'):.1f}" in tags.text and run in tags.text
    svgs = [a.get("aria-label", "") for t, a in tags.tags if t == "svg"]
    assert sum(a.startswith("Loss of") for a in svgs) == len(p.runs)
    assert [a for a in svgs if a.startswith("ROC")] == [f"ROC curves, {n}" for n in ("VinDr-CXR", "RSNA", "SIIM")]
    assert "mean of 2 classes" in tags.text
    images = [a["src"] for t, a in tags.tags if t == "img"]
    assert len(images) == 1 + 7 * page.PER_DATASET
    for uri in images:
        Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).load()
    assert "Own text, rank 3 of 80" in tags.text and f"own text {fake.TEXTS['mimic_cxr']}" in tags.text
    assert html.count('<li class="correct">') == 1
    assert "jane" not in html and "/somewhere" not in html


def test_phantoms_are_announced_and_real_archives_are_not(world):
    p, html = fake.params(**fake.SMALL), world[1]
    said = "The figures on this page say nothing about patients."
    assert said in Tags(html).text and html.index(said) < html.index("<main>")
    summaries, _, _ = fake.load(Path(), p)
    real = {d: replace(s, phantom=False) for d, s in summaries.items()}
    assert said not in render(p, real)
    mixed = {**real, "rsna": summaries["rsna"]}
    assert said in render(p, mixed) and "replace RSNA;" in render(p, mixed)


def test_an_archive_that_is_read_twice_counts_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    p = fake.make(Path())
    summaries, _, _ = fake.load(Path(), p)
    Path("data/index/openi_by_patient.parquet").write_bytes(Path("data/index/openi.parquet").read_bytes())
    html = render(p, {**summaries, "openi_by_patient": summaries["openi"]})
    assert "721 7 rejected, 7 archives" in " ".join(Tags(html).text.split())


def test_patients_appear_only_where_allowed(world):
    p = fake.params(**fake.SMALL)
    summaries, _, _ = fake.load(Path(), p)
    real = {d: replace(s, phantom=False) for d, s in summaries.items()}
    html = render(p, real)
    assert "<img" not in html and all(text not in html for text in fake.TEXTS.values())
    assert "report.show_patient_data" in html
    one = render(p, {**real, "openi": summaries["openi"]})  # the phantom among them may be seen
    assert (
        one.count("<img") == 1 + page.PER_DATASET
        and f"0 {fake.TEXTS['openi']}" in one
        and fake.TEXTS["mimic_cxr"] not in one
    )
    allowed = fake.params(**fake.SMALL, report={"show_patient_data": True})
    assert render(allowed, real).count("<img") == 1 + 7 * page.PER_DATASET


def test_similarity_maps_lie_on_what_the_encoder_saw_and_hide_patients(world, tmp_path):
    p = fake.params(**fake.SMALL)
    summaries, _, _ = fake.load(Path(), p)
    heat = np.zeros((1, 4, 4), np.float32)
    heat[:, :, :2] = 0.5  # the left half of the centre square
    np.savez(tmp_path / "maps.npz", maps=heat, dataset=["rsna"], position=np.array([2]), text=["a <b> & c"])
    names = {d: d for d in summaries}
    wide = np.full((40, 80), 100, np.uint8)

    def found(summaries):
        path = tmp_path / "maps.npz"
        return list(page._maps(p, summaries, names, Path("data/index"), path, lambda view: wide))

    (one,) = found(summaries)
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(one[k].split(",")[1]))), int) for k in ("image", "map")
    ]
    assert pictures[0].shape == (40, 40) and pictures[1].shape == (40, 40, 3)
    warm = pictures[1][..., 0] - pictures[1][..., 2]
    assert warm[:, :14].min() > 50 and abs(warm[:, 26:]).max() < 15
    assert one["range"] == "0.00 to 0.50" and one["text"] == "a <b> & c"
    assert found({d: replace(s, phantom=False) for d, s in summaries.items()}) == []


def test_regenerated_pictures_are_in_order_of_ratio_and_hide_patients(world, tmp_path):
    p = fake.params(**fake.SMALL)
    p = replace(p, evaluate=replace(p.evaluate, regeneration=Regeneration(runs=("mixed", "absent"))))
    summaries, _, _ = fake.load(Path(), p)
    (tmp_path / "mixed").mkdir()
    grey = np.full((3, 16, 16), 90, np.uint8)
    difference = np.zeros((3, 16, 16), np.int16)
    difference[:, :8], difference[:, 8:12] = 80, -80  # brighter above, darker in the middle, alike below
    np.savez(
        tmp_path / "mixed" / "0.pictures.npz",
        **dict.fromkeys(("input", "masked", "without", "with"), grey),
        **{"difference": difference, "dataset": ["openi", "mimic_cxr", "openi"], "position": [0, 1, 2]},
        **{"ratio": [0.5, 0.25, 0.25], "text": ["one", "two", "three & more"]},
    )
    names = {d: d for d in summaries}
    ((name, rows),) = page._regenerated(p, summaries, names, tmp_path)
    assert name == "mixed" and [r["text"] for r in rows] == ["two", "three & more", "one"]
    assert [r["percent"] for r in rows] == ["25", "25", "50"]
    encoded = rows[0]["difference"].split(",")[1]
    colours = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), int)
    warm = colours[..., 0] - colours[..., 2]
    assert warm[:6].min() > 60 and warm[9:11].max() < -40 and abs(warm[14:]).max() < 12
    real = {d: replace(s, phantom=d == "openi") for d, s in summaries.items()}
    ((_, rows),) = page._regenerated(p, real, names, tmp_path)
    assert [r["text"] for r in rows] == ["three & more", "one"]
    allowed = replace(p, report=Report(show_patient_data=True))
    assert len(next(page._regenerated(allowed, real, names, tmp_path))[1]) == 3


def test_centre_square_by_hand():
    image = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert page.centre_square(image).tolist() == image[:, 1:5].tolist()
    assert page.centre_square(image.T).tolist() == image.T[1:5].tolist()


def test_caption_is_the_first_sentence_or_the_positive_labels():
    report, labelled = fake.studies("mimic_cxr")[0], fake.studies("rsna")[3]
    assert page._caption(report) == "Small left pleural effusion."
    numbered = replace(report, impression="1. Large heart. 2. No effusion.")
    assert page._caption(numbered) == "Large heart."
    assert page._caption(labelled) == "Pneumonia, Cardiomegaly"


def test_texts_are_escaped(world, monkeypatch):
    p = fake.params(**fake.SMALL)
    summaries, results, _ = fake.load(Path(), p)
    hostile = {**fake.TEXTS, "mimic_cxr": "<script>alert(1)</script> & more"}
    monkeypatch.setattr(page, "text_digest", lambda t: text_digest(fake.TEXTS["mimic_cxr"] if "<script" in t else t))
    real = page.read_studies
    monkeypatch.setattr(
        page, "read_studies", lambda *a: [replace(s, impression=hostile.get(s.dataset)) for s in real(*a)]
    )
    html = page.render_page(
        p, tables.build_tables(p, summaries, results), summaries, results, [], Path("data/index"), load_view
    )
    assert "<script" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in html


def test_same_results_same_page(world):
    p, html = world
    assert render(p) == html
    assert "#0102" not in html  # every marker colour became a variable of the page
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", html))
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", html))


def test_mean_roc_has_the_mean_area():
    rng = np.random.default_rng(0)
    classes = {}
    for name in "abc":
        fpr, tpr = np.sort(rng.random((2, 30)), axis=1)
        classes[name] = {"fpr": [0, *fpr, 1], "tpr": [0, *tpr, 1]}
    areas = [np.trapezoid(c["tpr"], c["fpr"]) for c in classes.values()]
    fpr, tpr = figures.mean_roc(classes, points=2001)
    assert np.trapezoid(tpr, fpr) == pytest.approx(np.mean(areas), abs=1e-3)
    alone = figures.mean_roc({"a": classes["a"]})
    assert np.trapezoid(alone[1], alone[0]) == pytest.approx(areas[0])


def test_loss_chart_marks_the_epoch_of_lowest_validation_loss():
    history = [{"epoch": e, "train_loss": 3.0 - e, "valid_loss": v} for e, v in enumerate((3.0, 1.5, 2.5))]
    svg = figures.loss_chart("Loss", history)
    marker = re.search(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', svg)
    dashed = re.search(r'd="([^"]*)"[^>]*stroke-dasharray', svg)
    points = [tuple(map(float, m)) for m in re.findall(r"[ML] ([\d.]+) ([\d.]+)", dashed.group(1))]
    assert len(points) == 3 and tuple(map(float, marker.groups())) == pytest.approx(points[1], abs=1e-4)


def test_stage_writes_everything_and_prints_the_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fake.make(Path(), fake.params(**fake.SMALL))
    fake.save_params(Path(), **fake.SMALL)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    monkeypatch.delitem(sys.modules, "stages.tables", raising=False)
    from stages import tables as stage

    stage.main()
    out = capsys.readouterr()
    assert [out.out.count(f"## Table {n}.") for n in range(1, 5)] == [1, 1, 1, 1] and not out.err
    written = sorted(path.name for path in Path("reports").iterdir())
    assert len(written) == 35 and "index.html" in written and "metrics.json" in written


def test_a_page_with_patients_lies_where_git_does_not_look(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    changes = {**fake.SMALL, "report": {"show_patient_data": True}}
    fake.make(Path(), fake.params(**changes), real=tuple(fake.PARAMS["sources"]))
    fake.save_params(Path(), **changes)
    monkeypatch.delitem(sys.modules, "stages.tables", raising=False)
    from stages import tables as stage

    stage.main()
    public, private = (Path(p).read_text() for p in ("reports/index.html", "data/page_with_patients.html"))
    assert "<img" not in public and "Small left pleural effusion" not in public
    assert private.count("<img") == 1 + 7 * page.PER_DATASET
    assert "not for git" in capsys.readouterr().err
    ignored = subprocess.run(["git", "check-ignore", "-q", stage.WITH_PATIENTS], cwd=Path(__file__).parents[1])
    assert ignored.returncode == 0
