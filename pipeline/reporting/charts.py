"""The page's charts of zero-shot classification and training, as SVG, and the small CSV files of `dvc plots`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.params import Params
from pipeline.datasets import own_datasets, used_for
from pipeline.reporting import figures
from pipeline.reporting.results import RunResult
from pipeline.storage.atomic import write_text
from pipeline.storage.printed import csv_row

Chart = tuple[str, str, str]  # data set, what is drawn, SVG
Names = Mapping[str, str]


def headline(params: Params, results: Mapping[str, RunResult]) -> str:
    """The main run that charts of one run show: the last in the paper's order that has results; "" = none."""
    return next((n for n in reversed(params.main) if n in results and results[n].measures), "")


def tests(params: Params) -> tuple[str, ...]:
    """The test sets that have curves: the paper's, then the user's own."""
    return (*used_for("binary_classification"), *used_for("own_classification", own_datasets(params.sources)))


def colours(params: Params, results: Mapping[str, RunResult]) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Colour by data sets, dashes by image encoder, for the main runs; the control is grey."""
    runs = [n for n in params.main if n in results]
    mixes = list(dict.fromkeys(frozenset(params.runs[n].datasets) for n in runs))
    encoders = list(dict.fromkeys(params.runs[n].image_encoder for n in runs))
    styles: dict[str, tuple[str, tuple[float, ...]]] = {
        n: (
            figures.SERIES[mixes.index(frozenset(params.runs[n].datasets)) % len(figures.SERIES)],
            figures.DASHES[encoders.index(params.runs[n].image_encoder) % len(figures.DASHES)],
        )
        for n in runs
    }
    if params.control in results:
        styles[params.control] = (figures.MUTED, ())
    return styles


def rocs(params: Params, results: Mapping[str, RunResult], names: Names) -> Iterator[Chart]:
    """ROC curves of all main runs, one chart a data set."""
    for dataset, what, lines in _lines(params, results, "curves"):
        yield names[dataset], what, figures.roc_chart(f"ROC curves, {names[dataset]}", lines)


def precision_recalls(params: Params, results: Mapping[str, RunResult], names: Names) -> Iterator[Chart]:
    """Precision-recall curves of all main runs, one chart a data set."""
    for dataset, what, lines in _lines(params, results, "precision_recall"):
        yield names[dataset], what, figures.pr_chart(f"Precision and recall, {names[dataset]}", lines)


def _lines(
    params: Params, results: Mapping[str, RunResult], part: str
) -> Iterator[tuple[str, str, list[figures.Line]]]:
    mean = figures.mean_roc if part == "curves" else figures.mean_pr
    for dataset in tests(params):
        lines: list[figures.Line] = []
        drawn: dict[str, Any] = {}
        for name, (colour, dashes) in colours(params, results).items():
            classes = getattr(results[name], part).get(dataset)
            if classes:
                drawn |= classes
                x, y = mean(classes)
                lines.append(figures.Line(name, x.tolist(), y.tolist(), colour, dashes))
        if lines:
            yield dataset, f"mean of {len(drawn)} classes" if len(drawn) > 1 else next(iter(drawn)), lines


def legend(params: Params, results: Mapping[str, RunResult]) -> list[tuple[str, str, str]]:
    """(run, CSS colour, SVG dash array) of each curve."""
    drawn = [
        (n, s) for n, s in colours(params, results).items() if any(results[n].curves.get(d) for d in tests(params))
    ]
    return [(n, figures.MARKERS[colour], " ".join(f"{1.3 * d:g}" for d in dashes)) for n, (colour, dashes) in drawn]


def classes(params: Params, run: RunResult | None, names: Names) -> Iterator[Chart]:
    """AUC by class with intervals, of data sets with several classes."""
    for dataset in tests(params):
        found = run.classes.get(dataset, {}) if run else {}
        if len(found) > 1:
            rows = [(c, m.value, m.low, m.high) for c, m in found.items()]
            yield names[dataset], f"{len(rows)} classes", figures.class_chart(f"AUC by class, {names[dataset]}", rows)


def calibrations(params: Params, run: RunResult | None, names: Names) -> Iterator[Chart]:
    """Calibration curves, with the expected calibration error."""
    for dataset in tests(params):
        found = run.calibration.get(dataset, {}) if run else {}
        if found:
            error = float(np.mean([c["ece"] for c in found.values()]))
            what = f"mean of {len(found)} classes" if len(found) > 1 else next(iter(found))
            chart = figures.calibration_chart(f"Calibration, {names[dataset]}", found)
            yield names[dataset], f"{what}: expected calibration error {100 * error:.1f} points", chart


def write_plots(folder: Path, params: Params, results: Mapping[str, RunResult]) -> list[Path]:
    """roc.csv, precision_recall.csv, losses.csv and classes.csv for `dvc plots`, one line a point; the paths written.

    A file without a figure holds its header alone.
    """
    roc: list[Sequence[Any]] = []
    pr: list[Sequence[Any]] = []
    for part, points in (("curves", roc), ("precision_recall", pr)):
        for dataset, _, lines in _lines(params, results, part):
            points += [(f"{ln.name} {dataset}", _r(x), _r(y)) for ln in lines for x, y in zip(ln.x, ln.y, strict=True)]
    losses = [
        (f"{name} {kind}", int(row["epoch"]) + 1, _r(row[f"{kind}_loss"]))
        for name, run in results.items()
        for kind in ("train", "valid")
        for row in run.history
    ]
    auc = [
        (f"{name} {dataset}", cls, _r(m.value))
        for name in params.main
        if name in results
        for dataset, found in results[name].classes.items()
        for cls, m in found.items()
    ]
    files: dict[str, tuple[tuple[str, ...], list[Any]]] = {
        "roc.csv": (("series", "fpr", "tpr"), roc),
        "precision_recall.csv": (("series", "recall", "precision"), pr),
        "losses.csv": (("series", "epoch", "loss"), losses),
        "classes.csv": (("series", "class", "auc"), auc),
    }
    for name, (head, rows) in files.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(map(csv_row, [head, *rows]))
        write_text(folder / name, text.getvalue())
    return [folder / name for name in files]


def _r(value: float) -> float:
    return round(float(value), 5)
