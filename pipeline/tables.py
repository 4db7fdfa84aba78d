"""Tables 1–4 in the paper's row and column order: our figure, its interval, the paper's figure and the difference.

The paper's figures are data (``paper.yaml``). A figure that was not computed is None here and — in print; nothing
stands in for it.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.params import BINARY_DATASETS, LABEL_DATASETS, Params, run_config
from pipeline.results import RECALL, Measure, RunResult, Summary, load_paper, rsum

DASH = "—"
CSV_COLUMNS = ("table", "row", "model", "data", "column", "ours", "low", "high", "paper", "difference", "n")


@dataclass(frozen=True)
class Column:
    """A column of a table: its metric and its two header lines."""

    key: str
    group: str
    name: str


@dataclass(frozen=True)
class Cell:
    """One figure in printed units (points, i.e. fraction × 100; Table 1: a count). ``written`` is Table 1's number of
    studies or images that passed ingest; ``comparable`` is False for counts of a phantom archive."""

    ours: float | None = None
    paper: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    written: int | None = None
    comparable: bool = True

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, or None where one of them is missing."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclass(frozen=True)
class Row:
    """One model (Table 1: one split). ``key`` is the run's name, or the paper row's where no run fills it."""

    key: str
    model: str
    cells: tuple[Cell, ...]
    backbone: str = ""
    data: str = ""
    run: str = ""


@dataclass(frozen=True)
class ControlRow:
    """One metric of the control run as a fraction, what chance gives, and the same run's with true pairs.

    ``limits``: within which the control counts as at chance (None = no limit is set for this metric)."""

    name: str
    chance: float
    control: Measure
    full: Measure | None
    limits: tuple[float, float] | None

    @property
    def at_chance(self) -> bool | None:
        """Whether the control stayed within the limits."""
        return None if self.limits is None else self.limits[0] <= self.control.value <= self.limits[1]


@dataclass(frozen=True)
class Table:
    """One of the paper's tables. ``heads``: (title, attribute of ``Row``) of the columns left of the figures."""

    number: int
    title: str
    measure: str
    heads: tuple[tuple[str, str], ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    decimals: int = 1
    confidence: float = 0.95


def build(params: Params, summaries: Mapping[str, Summary], results: Mapping[str, RunResult]) -> list[Table]:
    """Tables 1–4 from the counts of ingest and the metrics of evaluation."""
    paper = load_paper()
    return [_counts(paper, summaries), *(_models(n, paper, params, summaries, results) for n in (2, 3, 4))]


def control_rows(params: Params, results: Mapping[str, RunResult]) -> tuple[str, list[ControlRow]]:
    """The control run (shuffled pairs) against chance: R@10 at most twice chance.

    No limit is set for an AUC: that of one shuffled run is the AUC of a random direction (see tests/test_control.py).

    Returns:
        The name of the main run with the same encoder and data sets but true pairs ("" = none), and the rows; no rows
        where there is no control run or nothing of it was computed.
    """
    run = results.get(params.control)
    if run is None:
        return "", []
    own = params.runs[params.control]
    twins = [n for n in params.main if params.runs[n].image_encoder == own.image_encoder and n in results]
    full = next((n for n in twins if set(params.runs[n].datasets) == set(own.datasets)), "")
    names = {key: d["name"] for key, d in load_paper()["datasets"].items()}
    tests: list[tuple[str, str, float, tuple[float, float] | None]] = [
        (f"{d}_zs_auc", f"{names[d]} zero-shot AUC", 0.5, None) for d in BINARY_DATASETS
    ]
    tests.append(("macro_zs_auc", "Mean of the three AUCs", 0.5, None))
    tests.append(("chexpert5x200_zs_accuracy", f"{names['chexpert5x200']} accuracy", 0.2, None))  # five equal classes
    for dataset, pool in run.pools.items():
        if "r10" in pool["chance"]:
            chance = pool["chance"]["r10"]
            tests.append((f"{dataset}_r10", f"{names.get(dataset, dataset)} R@10", chance, (0.0, 2 * chance)))
    other = results[full].measures if full else {}
    rows = [ControlRow(n, c, run.measures[k], other.get(k), limits) for k, n, c, limits in tests if k in run.measures]
    return full, rows


def phantoms(summaries: Mapping[str, Summary]) -> list[str]:
    """The names of the data sets that are phantoms."""
    names = load_paper()["datasets"]
    return [names[d]["name"] if d in names else d for d, s in summaries.items() if s.phantom]


def write(folder: Path, tables: Sequence[Table], metrics: Mapping[str, Any], phantom: Sequence[str]) -> list[Path]:
    """Write table{1..4}.{md,csv} and metrics.json; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"table{t.number}.md": markdown(t, phantom) for t in tables}
    texts |= {f"table{t.number}.csv": tidy_csv(t) for t in tables}
    texts["metrics.json"] = json.dumps(metrics, indent=2) + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return [folder / name for name in texts]


def markdown(table: Table, phantom: Sequence[str] = ()) -> str:
    """The table as padded GitHub Markdown, readable in a terminal too: a few lines a row, one a kind of figure."""
    head = [title for title, _ in table.heads] + [""] + [f"{c.group} {c.name}".strip() for c in table.columns]
    lines = []
    for row in table.rows:
        left = [str(getattr(row, name)) for _, name in table.heads]
        if row.run:
            left[0] += f" `{row.run}`"
        for i, (label, texts) in enumerate(figure_lines(table, row)):
            lines.append([*(left if i == 0 else [""] * len(left)), label, *texts])
    widths = [max(len(line[i]) for line in [head, *lines]) for i in range(len(head))]
    texts_left = len(table.heads) + 1
    rule = ["-" * w if i < texts_left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    padded = [
        "| "
        + " | ".join(
            t.ljust(w) if i < texts_left else t.rjust(w) for i, (t, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in [head, rule, *lines]
    ]
    out = [f"## Table {table.number}. {table.title}", ""]
    if table.measure:
        out += [f"{table.measure[0].upper()}{table.measure[1:]}.", ""]
    if phantom:
        out += [f"**{phantom_line(phantom)}**", ""]
    out += padded
    if table.notes:
        out += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(out) + "\n"


def phantom_line(phantom: Sequence[str]) -> str:
    """What stands over every table that rests on synthetic images."""
    return f"Phantom data ({', '.join(phantom)}): drawn by a program. These figures say nothing about patients."


def figure_lines(table: Table, row: Row) -> list[tuple[str, list[str]]]:
    """A row's figures as text, one line a kind: ours, its interval, the paper's, the difference."""
    d = table.decimals
    if table.number == 1:
        lines = [("ours, listed", [show(c.ours, 0) for c in row.cells])]
        lines.append(("ours, ingested", [show(c.written, 0) for c in row.cells]))
    else:
        lines = [("ours", [show(c.ours, d) for c in row.cells])]
        lines.append((f"{100 * table.confidence:g} % interval", [show_interval(c, d) for c in row.cells]))
    lines.append(("paper", [show(c.paper, d) for c in row.cells]))
    lines.append(("difference", [show_difference(c, d) for c in row.cells]))
    always = {lines[0][0], "paper"}
    return [(k, v) for k, v in lines if k in always or any(t != DASH for t in v)]


def show(value: float | None, decimals: int) -> str:
    """A figure in print, or —."""
    return DASH if value is None else f"{value:,.{decimals}f}"


def show_interval(cell: Cell, decimals: int) -> str:
    """An interval in print, or —."""
    if cell.low is None or cell.high is None:
        return DASH
    return f"{cell.low:.{decimals}f}–{cell.high:.{decimals}f}"


def show_difference(cell: Cell, decimals: int) -> str:
    """The signed difference of the two figures as printed, so that a reader who subtracts finds the same."""
    if cell.ours is None or cell.paper is None:
        return DASH
    if not cell.comparable:
        return "phantom"
    difference = round(round(cell.ours, decimals) - cell.paper, decimals)
    if difference == 0:
        return f"{0:.{decimals}f}"
    return f"{'+' if difference > 0 else '−'}{abs(difference):,.{decimals}f}"


def tidy_csv(table: Table) -> str:
    """One line a figure with the columns ``CSV_COLUMNS``, in printed units with 4 decimals; empty = not computed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in table.rows:
        model = f"{row.model} {row.backbone}".strip()
        for column, c in zip(table.columns, row.cells, strict=True):
            if table.number == 1:
                left = [1, row.key, "", column.key]
                figures = [c.ours, None, None, c.paper, c.difference if c.comparable else None]
                writer.writerow([*left, f"{column.name} listed", *map(_plain, figures), ""])
                if c.written is not None:
                    writer.writerow([*left, f"{column.name} ingested", c.written, "", "", "", "", ""])
            else:
                figures = [c.ours, c.low, c.high, c.paper, c.difference]
                writer.writerow(
                    [table.number, row.key, model, row.data, column.key, *map(_plain, figures), _plain(c.n)]
                )
    return out.getvalue()


def _counts(paper: Mapping[str, Any], summaries: Mapping[str, Summary]) -> Table:
    """Table 1: studies (MIMIC-CXR) or images (the others) a split, as the label files list them."""
    table = paper["table1"]
    names = {c["dataset"]: paper["datasets"][c["dataset"]]["name"] for c in table["columns"]}
    rows = []
    for row in table["rows"]:
        cells = []
        for column, printed in zip(table["columns"], row["paper"], strict=True):
            summary = summaries.get(column["dataset"])
            if summary is None:
                cells.append(Cell(paper=printed))
                continue
            ours = summary.listed.get(row["key"], {}).get(column["unit"], 0)
            written = None if summary.labels_only else summary.written.get(row["key"], {}).get(column["unit"], 0)
            if printed is None and not ours:  # the paper has no such split and neither have we
                cells.append(Cell())
            else:
                cells.append(Cell(ours=ours, paper=printed, written=written, comparable=not summary.phantom))
        rows.append(Row(key=row["key"], model=row["model"], cells=tuple(cells)))
    notes = []
    for dataset, name in names.items():
        summary = summaries.get(dataset)
        if summary is None:
            notes.append(f"{name}: not among sources.")
        elif not summary.phantom:
            notes.append(f"{name}: {table['known'][dataset].strip()}")
        if summary:
            notes += [f"{name}: {note}" for note in summary.notes]
    phantom = [n for d, n in names.items() if d in summaries and summaries[d].phantom]
    if phantom:
        notes.insert(0, f"Phantom counts, not to be compared with the paper's: {', '.join(phantom)}.")
    columns = tuple(Column(c["dataset"], names[c["dataset"]], c["unit"]) for c in table["columns"])
    return Table(1, table["title"], "", (("Split", "model"),), columns, tuple(rows), tuple(notes), decimals=0)


def _models(
    number: int,
    paper: Mapping[str, Any],
    params: Params,
    summaries: Mapping[str, Summary],
    results: Mapping[str, RunResult],
) -> Table:
    """Tables 2–4: the paper's rows in order, each with the run that fills it, then runs no paper row stands for."""
    table = paper[f"table{number}"]
    columns = tuple(Column(c["key"], c["group"], c["name"]) for c in table["columns"])
    waiting = [name for name in (params.ablations if number == 4 else params.main) if name in results]
    ablations = iter(params.ablations)
    rows = []
    for row in table["rows"]:
        if number == 4:
            name = next(ablations, None) if row.get("run") else None
            name = name if name in waiting else None
        else:
            name = next((n for n in waiting if _fills(params, n, row)), None)
        if name:
            waiting.remove(name)
        data = row["data"] if "data" in row else _short(paper, row.get("datasets", ()))
        cells = _cells(columns, results.get(name) if name else None, row["paper"])
        backbone = paper["backbones"].get(row.get("image_encoder"), "")
        rows.append(Row(name or row["key"], row["model"], cells, backbone, data, name or ""))
    for name in waiting:
        run = params.runs[name]
        cells = _cells(columns, results[name], [None] * len(columns))
        backbone = paper["backbones"].get(run.image_encoder, run.image_encoder)
        rows.append(Row(name, "own run", cells, backbone, _short(paper, run.datasets), name))
    heads = (("Method", "model"),) if number == 4 else (("Model", "model"), ("Backbone", "backbone"), ("Data", "data"))
    shown = [name for name in (params.ablations if number == 4 else params.main) if name in results]
    notes = [*table.get("notes", ()), *_notes(paper, columns, summaries, [results[n] for n in shown])]
    notes += _text_augmentation(params, shown)
    confidence = params.evaluate.bootstrap.confidence
    title, measure = table["title"], table["measure"]
    return Table(number, title, measure, heads, columns, tuple(rows), tuple(notes), confidence=confidence)


def _fills(params: Params, name: str, row: Mapping[str, Any]) -> bool:
    run = params.runs[name]
    return run.image_encoder == row.get("image_encoder") and set(run.datasets) == set(row.get("datasets", ()))


def _short(paper: Mapping[str, Any], datasets: Iterable[str]) -> str:
    return ",".join(paper["datasets"].get(d, {}).get("short", d) for d in datasets)


def _cells(columns: Sequence[Column], run: RunResult | None, printed: Sequence[float | None]) -> tuple[Cell, ...]:
    recalls = [c.key for c in columns if RECALL.search(c.key)]
    cells = []
    for column, figure in zip(columns, printed, strict=True):
        measure = None
        if run:
            measure = rsum(run, recalls) if column.key == "rsum" else run.measures.get(column.key)
        if measure is None:
            cells.append(Cell(paper=figure))
            continue
        low, high = (None if v is None else 100 * v for v in (measure.low, measure.high))
        cells.append(Cell(100 * measure.value, figure, low, high, measure.n))
    return tuple(cells)


def _notes(
    paper: Mapping[str, Any], columns: Sequence[Column], summaries: Mapping[str, Summary], runs: Sequence[RunResult]
) -> list[str]:
    """What ingest and evaluation noted about the data sets of these columns, each thing once."""
    names = paper["datasets"]
    used = [d for d in names if any(c.key.startswith(f"{d}_") for c in columns)]
    archives = [names[d].get("archive", d) for d in used]
    notes = [
        f"{names[d]['name']}: {note}" for d in dict.fromkeys(archives) if d in summaries for note in summaries[d].notes
    ]
    for note in dict.fromkeys(n for run in runs for n in run.notes):
        dataset, _, rest = note.partition(":")
        key = dataset.split(" ")[0]
        if key in used:
            notes.append(f"{dataset.replace(key, names[key]['name'])}:{rest}")
        elif key not in names:
            notes.append(note)
    return notes


def _text_augmentation(params: Params, shown: Sequence[str]) -> list[str]:
    """A note where runs that augment reports had no back-translations to draw from, as the paper's had."""
    reports = {name for name in shown if set(params.runs[name].datasets) - set(LABEL_DATASETS)}
    augments = {name: run_config(params, name).augment for name in reports}
    without = [
        name for name in shown if name in reports and augments[name].text and augments[name].text_method == "swap"
    ]
    if not without or params.back_translation.forward:
        return []
    return [
        f"Reports are augmented by sentence swap alone in {', '.join(without)}, in the paper also by back-translation: "
        "back_translation names no models."
    ]


def _plain(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"
