"""The tables in print: Markdown for terminals and GitHub, CSV with one figure a line, LaTeX with booktabs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.reporting.results import load_paper
from pipeline.reporting.table_form import Cell, Row, Table
from pipeline.storage.atomic import write_text
from pipeline.storage.printed import CONTROL, csv_row, markdown, markdown_code

DASH = "—"
BOLD = "Bold: our figure, as printed, is above the paper's, on real test images (figures on phantoms are never bold)."
CLEAN = (
    "On clean images: without the test images that training has seen, by the audit of pixels (docs/leakage.md); in "
    "brackets how many are left; same: training has seen none; —: none is left, or it was not audited."
)
UNSEEN = "The audit of pixels (docs/leakage.md) finds none of these test images in what the models were trained on."
ALIKE = "No interval: all resamples have this value, so resampling cannot say how far it is from the truth."
CSV_COLUMNS = (
    *("table", "row", "model", "data", "column", "ours", "low", "high", "paper", "difference", "n"),
    *("clean", "clean_low", "clean_high", "clean_n", "removed"),
    *("against", "against_difference", "against_low", "against_high", "seeds"),
)
TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "[": "{[}", "]": "{]}", "|": r"\textbar{}", "`": r"\textasciigrave{}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "—": "---", "–": "--", "−": "$-$", "×": r"$\times$", "≤": r"$\leq$", "→": r"$\to$",
    "’": "'", "“": "``", "”": "''", "…": r"\dots{}",
}  # fmt: skip


def write_tables(
    folder: Path, tables: Sequence[Table], metrics: Mapping[str, Any], phantom: Sequence[str]
) -> list[Path]:
    """Write table<number>.{md,csv,tex} and metrics.json; the paths written."""
    texts = {f"table{t.number}.md": table_markdown(t, phantom) for t in tables}
    texts |= {f"table{t.number}.csv": table_csv(t) for t in tables}
    texts |= {f"table{t.number}.tex": table_latex(t, phantom) for t in tables}
    texts["metrics.json"] = json.dumps(metrics, indent=2) + "\n"
    return [write_text(folder / name, text) for name, text in texts.items()]


def table_markdown(table: Table, phantom: Sequence[str] = ()) -> str:
    """The table as padded GitHub Markdown, readable in a terminal too: a few lines a row, one a kind of figure."""
    head = [title for title, _ in table.heads] + [""] + [f"{c.group} {c.name}".strip() for c in table.columns]
    head = [markdown(title) for title in head]
    lines = []
    for row in table.rows:
        left = [markdown(str(getattr(row, name))) for _, name in table.heads]
        if row.run:
            left[0] += f" {markdown_code(row.run)}"
        for i, (label, texts) in enumerate(figure_lines(table, row)):
            if i == 0:
                texts = [f"**{t}**" if b else t for t, b in zip(texts, bold(table, row), strict=True)]
            lines.append([*(left if i == 0 else [""] * len(left)), markdown(label), *texts])
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
        out += [f"**{markdown(phantom_line(phantom))}**", ""]
    out += padded
    if notes := all_notes(table):
        out += ["", *(f"- {markdown(note)}" for note in notes)]
    return "\n".join(out) + "\n"


def table_latex(table: Table, phantom: Sequence[str] = ()) -> str:
    """The table as a LaTeX float; needs the packages booktabs and graphicx. Texts are escaped."""
    left = [title for title, _ in table.heads] + [""]
    groups = [(name, len(list(columns))) for name, columns in groupby(c.group for c in table.columns)]
    first = " & ".join([""] * len(left) + [rf"\multicolumn{{{n}}}{{c}}{{{tex(name)}}}" for name, n in groups])
    rules, at = [], len(left) + 1
    for _, n in groups:
        rules.append(rf"\cmidrule(lr){{{at}-{at + n - 1}}}")
        at += n
    body = []
    for row in table.rows:
        body.append(r"\midrule")
        for i, (label, texts) in enumerate(figure_lines(table, row)):
            shown = [tex(t) for t in texts]
            if i == 0:
                shown = [rf"\textbf{{{t}}}" if b else t for t, b in zip(shown, bold(table, row), strict=True)]
            heads = [tex(str(getattr(row, name))) if i == 0 else "" for _, name in table.heads]
            body.append(" & ".join([*heads, tex(label), *shown]) + r" \\")
    caption = f"{table.title}." + (f" {table.measure[0].upper()}{table.measure[1:]}." if table.measure else "")
    if phantom:
        caption += f" {phantom_line(phantom)}"
    lines = [
        "% Needs \\usepackage{booktabs,graphicx}; the text is ASCII.",
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{tex(caption)}}}",
        rf"\label{{tab:cxr-clip-{table.number.lower()}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{{'l' * len(left)}{'r' * len(table.columns)}}}",
        r"\toprule",
        first + r" \\",
        "".join(rules),
        " & ".join([tex(t) for t in left] + [tex(c.name) for c in table.columns]) + r" \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}}",
    ]
    if notes := all_notes(table):
        lines += [
            r"\par\medskip\begin{minipage}{\textwidth}\footnotesize",
            *(tex(n) + r"\par" for n in notes),
            r"\end{minipage}",
        ]
    return "\n".join([*lines, r"\end{table*}"]) + "\n"


def tex(text: str) -> str:
    """Text for LaTeX: its special characters escaped, typographic ones as commands."""
    return "".join(TEX.get(c, c) for c in CONTROL.sub(" ", text))


def bold(table: Table, row: Row) -> list[bool]:
    """Which of the row's figures are bold. Counts (Table 1) never are."""
    return [table.number != "1" and c.beats(table.decimals) for c in row.cells]


def all_notes(table: Table) -> list[str]:
    """The table's notes, what bold and "clean images" say where they occur, and else what the audit found."""
    notes = list(table.notes)
    if any(any(bold(table, row)) for row in table.rows):
        notes.insert(0, BOLD)
    computed = [
        (column, cell)
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
        if table.number != "1" and column.dataset and cell.ours is not None
    ]
    if any(cell.removed or cell.clean is not None for _, cell in computed):
        notes.append(CLEAN)
    elif computed and all(cell.removed == 0 for _, cell in computed):
        notes.append(UNSEEN)
    if any(cell.low is not None and cell.low == cell.high for _, cell in computed):
        notes.append(ALIKE)
    unknown = dict.fromkeys(column.group for column, cell in computed if cell.removed is None)
    if unknown:
        notes.append(f"Not audited for test images that training has seen: {', '.join(unknown)}; run: {table.command}")
    return notes


def phantom_line(phantom: Sequence[str]) -> str:
    """The line above every table that uses synthetic images."""
    return f"Phantom data ({', '.join(phantom)}): drawn by a program. These figures say nothing about patients."


def figure_lines(table: Table, row: Row) -> list[tuple[str, list[str]]]:
    """A row's figures as text, one line a kind: ours, its interval, the paper's, the difference, that to another row
    ("against <run>"), ours on clean images, by seed; what is — in every column is left out."""
    if table.number == "1":
        cells = [(c, 0) for c in row.cells]
        lines = [("ours, listed", [show_figure(c.ours, 0) for c in row.cells])]
        lines.append(("ours, ingested", [show_figure(c.written, 0) for c in row.cells]))
    else:
        decimals = [column.metric.decimals(table.decimals) for column in table.columns]
        cells = list(zip(row.cells, decimals, strict=True))
        lines = [("ours", [show_figure(c.ours, d) for c, d in cells])]
        lines.append((f"{100 * table.confidence:g} % interval", [show_interval(c, d) for c, d in cells]))
    lines.append(("paper", [show_figure(c.paper, d) for c, d in cells]))
    lines.append(("difference", [show_difference(c, d) for c, d in cells]))
    if row.against:
        lines.append((f"against {row.against}", [show_against(c, d) for c, d in cells]))
    if any(c.removed or c.clean is not None for c in row.cells):
        lines.append(("on clean images", [show_clean(c, d) for c, d in cells]))
    lines.append(
        ("by seed", [", ".join(show_figure(v, d) for v in c.seeds) if len(c.seeds) > 1 else DASH for c, d in cells])
    )
    always = {lines[0][0], "paper"} if all(c.ours is None for c in row.cells) else {lines[0][0]}
    return [(k, v) for k, v in lines if k in always or any(t != DASH for t in v)]


def show_figure(value: float | None, decimals: int) -> str:
    """A figure in print, or —."""
    if value is None:
        return DASH
    text = f"{abs(value):,.{decimals}f}"
    return f"−{text}" if value < 0 and float(text.replace(",", "")) else text  # nothing is −0.0


def show_interval(cell: Cell, decimals: int) -> str:
    """An interval in print, or —, as where all resamples are alike and so say nothing."""
    if cell.low is None or cell.high is None or cell.low == cell.high:
        return DASH
    between = "–" if cell.low >= 0 else " to "
    return f"{show_figure(cell.low, decimals)}{between}{show_figure(cell.high, decimals)}"


def show_difference(cell: Cell, decimals: int) -> str:
    """The signed difference of the two figures as printed, so that a reader who subtracts finds the same."""
    if cell.ours is None or cell.paper is None:
        return DASH
    if cell.own or not cell.comparable:
        return "own list" if cell.own else "phantom"
    difference = round(round(cell.ours, decimals) - cell.paper, decimals)
    return _signed(difference, decimals)


def _signed(value: float, decimals: int) -> str:
    if round(value, decimals) == 0:
        return f"{0:.{decimals}f}"
    return f"{'+' if value > 0 else '−'}{abs(value):,.{decimals}f}"


def show_clean(cell: Cell, decimals: int) -> str:
    """The figure on clean test images with their number, or "same" where the audit left none out, or —."""
    if cell.clean is None:
        return "same" if cell.removed == 0 and cell.ours is not None else DASH
    return show_figure(cell.clean, decimals) + (f" ({cell.clean_n:,})" if cell.clean_n else "")


def show_against(cell: Cell, decimals: int) -> str:
    """The paired difference with its interval, "+1.2 (0.3 to 2.1)", or —."""
    if cell.against is None:
        return DASH
    return "{} ({} to {})".format(*(_signed(v, decimals) for v in cell.against))


def table_csv(table: Table) -> str:
    """One line a figure with the columns ``CSV_COLUMNS``, in printed units with 4 decimals; empty = not computed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    lines: list[list[Any]] = []
    for row in table.rows:
        model = f"{row.model} {row.backbone}".strip()
        for column, c in zip(table.columns, row.cells, strict=True):
            if table.number == "1":
                left = [1, row.key, "", column.key]
                figures = [c.ours, None, None, c.paper, c.difference if c.comparable else None]
                lines.append(_padded([*left, f"{column.name} listed", *map(_plain, figures)]))
                if c.written is not None:
                    lines.append(_padded([*left, f"{column.name} ingested", c.written]))
                continue
            figures = [c.ours, c.low, c.high, c.paper, c.difference, c.n, c.clean, c.clean_low, c.clean_high]
            against = [row.against, *map(_plain, c.against)] if c.against else [""] * 4
            line = [table.number, row.key, model, row.data, column.key, *map(_plain, figures), _plain(c.clean_n)]
            lines.append([*line, _plain(c.removed), *against, " ".join(map(_plain, c.seeds))])
    printed = {
        row["model"] for row in load_paper().get(f"table{table.number}", {}).get("rows", ())
    }  # "+ MVS" of the paper
    writer.writerows(csv_row(line, printed) for line in [CSV_COLUMNS, *lines])
    return out.getvalue()


def _padded(cells: list[Any]) -> list[Any]:
    return cells + [""] * (len(CSV_COLUMNS) - len(cells))


def _plain(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.4f}"
