"""Names and notes from data and parameters, as hostile as they come, through every table, the page and the lists."""

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fake_results as fake
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from pipeline.audit import leakage
from pipeline.reporting import charts, experiments_page, figures, formats, page, tables
from pipeline.reporting.experiments import Experiment
from pipeline.reporting.results import load_paper
from pipeline.storage.printed import csv_row, markdown, markdown_code
from pipeline.storage.shards import load_view

EVIL = "@SUM(1)*cmd|' /C calc'!A0\n| x `y` <script>alert(1)</script> [l](http://e) $\\frac$ font: 1px \\1 %#_&{}~^"
PLAIN = "a name"
FORMULA = re.compile(r"[ ]*[=+\-@\t\r\n＝＋－＠]")
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?( [-+]?\d+(\.\d+)?)*")


@pytest.mark.parametrize("begin", ["=", "+", "-", "@", "\t", "\r", "\n", "  =", "＝", "＋", "－", "＠", "-1+", "+1 "])
def test_no_cell_is_a_formula(begin):
    out = io.StringIO()
    csv.writer(out).writerow(csv_row([f"{begin}cmd|' /C calc'!A0", 1]))
    ((cell, one),) = csv.reader(io.StringIO(out.getvalue(), newline=""))
    assert cell == f"'{begin}cmd|' /C calc'!A0" and one == "1"


def test_figures_stay_figures():
    row = [-0.5, -3, "-0.5", "+1.25", "-1e-05", "-0.5 -0.25", "", None, True, "swin_mcc", "a-b", "0-1"]
    assert csv_row(row) == row
    assert csv_row(["+ MVS", "+ MVS x"], {"+ MVS"}) == ["+ MVS", "'+ MVS x"]


@pytest.mark.parametrize(
    "text",
    [
        EVIL,
        "=1+1|`b`",
        "a|b",
        "``",
        "`",
        "a\r\n# b",
        "*a* **b** c*d*e",
        "_a_ __b__ c_d_e _",
        "C* and C*: C*, *",
        "~~a~~",
        "- x",
        "&lt;b&gt;",
        "\\|",
        "![a](b)",
        PLAIN,
    ],
)
def test_markdown_shows_a_text_as_it_is(text):
    """By another program's reading: one row, the cell's text as it was, no tag, link or image."""
    shown = re.sub(r"[\x00-\x1f]+", " ", text)
    read = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = read.parse(f"| {markdown(text)} | {markdown_code(text)} |\n|---|---|\n| 1 | {markdown(text)} |\n")
    cells = [t.children for t in tokens if t.type == "inline"]
    assert len(cells) == 4
    for cell in (cells[0], cells[3]):
        assert {t.type for t in cell} <= {"text", "text_special"} and "".join(t.content for t in cell) == shown
    assert [(t.type, t.content.strip()) for t in cells[1]] == [("code_inline", shown.strip())]


def world(name):
    """Results whose classes, notes and models bear this name: parameters, tables and all that they are of."""
    own = {"image_encoder": "resnet", "datasets": [fake.M, fake.C, fake.C14]}
    other = {"adapter": "gloria", "weights": "w", "model": name, "backbone": name, "data": name}
    runs = {"r": own, "plain": own}
    p = fake.make(Path(), fake.params(runs=runs, main=[*runs], ablations=[], control="", others={"o": other}))
    zero = Path("data/results/zero_shot/r/0.json")
    body = json.loads(zero.read_text())
    curve = body["curves"]["rsna"]["Pneumonia"]
    one = fake.stored("rsna_zs_auc", 0.7)
    two = {name: curve, "Mass": curve}
    body["curves"]["vindr_cxr"], body["classes"] = two, {"vindr_cxr": {name: one, "Mass": one}}
    body["calibration"] = {"siim": {name: {"predicted": [0.1, 0.9], "observed": [0.2, 0.8], "ece": 0.1}}}
    body["notes"] = [f"vindr_cxr: {name}: no AUC", name]
    zero.write_text(json.dumps(body))
    for kind in ("zero_shot", "few_shot"):
        missing = {"run": "o", "metrics": {}, "notes": [name]}
        Path(f"data/results/{kind}/o.json").write_text(json.dumps(missing))
    summaries, _, _ = fake.load(Path(), p)
    summaries = {d: replace(s, notes=(name,), reasons={name: 1}) for d, s in summaries.items()}
    results, missing = tables_results(p)
    return p, tables.build_tables(p, summaries, results), summaries, results, missing


def tables_results(p):
    from pipeline.reporting.results import load_results

    return load_results(Path("data/results"), p.runs, p.main, p.others)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {}
    for kind, name in {"evil": EVIL, "plain": PLAIN}.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path_factory.mktemp(kind))
            p, built, summaries, results, missing = world(name)
            html = page.render_page(p, built, summaries, results, missing, Path("data/index"), load_view)
            charts.write_plots(Path("plots"), p, results)
            plots = {file.name: file.read_text() for file in Path("plots").iterdir()}
            made[kind] = built, html, plots
    return made


def test_every_csv_is_safe_to_open(worlds):
    built, _, plots = worlds["evil"]
    printed = {row["model"] for t in load_paper().values() if "rows" in t for row in t["rows"]}
    texts = [formats.table_csv(t) for t in built] + list(plots.values())
    cells = [c for text in texts for row in csv.reader(io.StringIO(text)) for c in row]
    assert not [c for c in cells if FORMULA.match(c) and not NUMBER.fullmatch(c) and c not in printed]
    assert any(c.startswith(f"'{EVIL}") for c in cells) and any(re.match(r"-\d", c) for c in cells)
    for (_, _, ours), (_, _, theirs) in [(worlds["evil"], worlds["plain"])]:
        assert {k: len(list(csv.reader(io.StringIO(v)))) for k, v in ours.items()} == {
            k: len(list(csv.reader(io.StringIO(v)))) for k, v in theirs.items()
        }


def test_every_table_in_markdown_is_the_table_and_no_more(worlds):
    """As another program reads it: rows, cells and all else as with harmless names."""
    read = MarkdownIt("commonmark", {"html": True}).enable("table")

    def form(table):
        found = []
        for token in read.parse(formats.table_markdown(table, ("phantom",))):
            found.append(token.type)
            found += [t.type for t in token.children or () if not t.type.startswith("text")]
        return found

    for evil, plain in zip(worlds["evil"][0], worlds["plain"][0], strict=True):
        assert form(evil) == form(plain)
        assert "html_inline" not in form(evil) and "link_open" not in form(evil)


def test_every_table_in_latex_has_its_cells_and_no_command_of_a_name(worlds):
    for evil, plain in zip(worlds["evil"][0], worlds["plain"][0], strict=True):
        ours, theirs = (formats.table_latex(t).splitlines() for t in (evil, plain))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert len(re.findall(r"(?<!\\)&", a)) == len(re.findall(r"(?<!\\)&", b))
            bare, other = (re.sub(r"\\[&%$#_{}]", "", line) for line in (a, b))
            assert (
                bare.count("{") - bare.count("}") == other.count("{") - other.count("}")
                and "\\frac" not in a
                and "\\1" not in a
            )
            assert a.startswith("% Needs") or not re.search(r"[#_^~`]|(?<!\\)%", re.sub(r"\$[^$]*\$|%$", "", bare))


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, sorted(name for name, _ in attrs)))


def test_the_page_has_the_tags_that_it_has_with_harmless_names(worlds):
    evil, plain = (Tags(worlds[kind][1]).found for kind in ("evil", "plain"))
    ticks = [("use", ["x", "xlink:href", "y"])]  # of axes, whose numbers make room for names
    assert [t for t in evil if t not in ticks and t[0] in WRITTEN] == [
        t for t in plain if t not in ticks and t[0] in WRITTEN
    ]
    assert "script" not in {tag for tag, _ in evil} and not any(n.startswith("on") for _, names in evil for n in names)
    assert "$\\frac$ font: 1px \\1 %" in worlds["evil"][1]  # drawn, too, as it is


WRITTEN = {
    "table",
    "tr",
    "td",
    "th",
    "p",
    "a",
    "b",
    "i",
    "img",
    "svg",
    "figure",
    "figcaption",
    "code",
    "li",
    "h2",
    "h3",
    "text",
}


@pytest.mark.parametrize("title", [EVIL, "\\g<0>", '" onload="alert(1)', "'><script>"])
def test_a_chart_keeps_its_title_to_itself(title):
    lines = [figures.Line(title, [0.0, 1.0], [0.0, 1.0], figures.INK)]
    for svg in (
        figures.roc_chart(title, lines),
        figures.class_chart(title, [(title, 0.7, 0.6, 0.8), ("b", 0.6, None, None)]),
    ):
        begun = Tags(svg).found[0]
        assert begun == ("svg", ["aria-label", "role", "viewbox"]) and "script" not in {t for t, _ in Tags(svg).found}


def test_lists_of_experiments_and_of_leakage():
    e = [Experiment(name, "0" * 40, {"a": name}, {}, {}, {}, notes=[EVIL]) for name in (EVIL, "=1+1")]
    text = experiments_page.experiments_markdown(e[0], e[1:])
    assert "<script>" not in re.sub(r"\\<", "", text) and sum(line.startswith("|") for line in text.splitlines()) == 3
    assert "<script>" not in experiments_page.experiments_html(e[0], e[1:])
    frame = leakage.leakage_table([], [])
    evil = {**dict.fromkeys(frame.columns, 0), "test_set": EVIL, "training_set": "=1+1", "training_split": "train"}
    one = pd.DataFrame([{**evil, "own": False, "patients_known": "yes", "images": -3}])[list(frame.columns)]
    (row,) = csv.DictReader(io.StringIO(leakage.leakage_csv(one)))
    assert (row["test_set"], row["training_set"], row["images"], row["own"]) == (f"'{EVIL}", "'=1+1", "-3", "False")
    assert leakage.leakage_csv(frame).splitlines() == [",".join(frame.columns)]
