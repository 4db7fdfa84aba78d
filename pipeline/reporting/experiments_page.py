"""Experiments beside their baseline as a page, as Markdown and as CSV (``pipeline.reporting.experiments`` reads)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evaluation.comparison import Difference
from pipeline.evaluation.measure import Measure
from pipeline.reporting import figures
from pipeline.reporting.experiments import (
    Cost,
    Experiment,
    changes,
    difference,
    headline_label,
    headlines,
    touched,
    verdict,
)
from pipeline.storage.printed import csv_row, markdown

MINUS = "\u2212"
COLUMNS = (
    "experiment",
    "run",
    "metric",
    "value",
    "low",
    "high",
    "n",
    "baseline",
    "difference",
    "diff_low",
    "diff_high",
)


def percent(value: float, signed: bool = False) -> str:
    """A fraction in percent with one decimal and a true minus sign."""
    return (f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}").replace("-", MINUS)


def percent_interval(low: float, high: float, signed: bool = False) -> str:
    """Both ends, as ``[61.2, 70.3]``."""
    return f"[{percent(low, signed)}, {percent(high, signed)}]"


def duration(seconds: float) -> str:
    """Seconds as people say them: ``48 s``, ``3.5 min``, ``7.2 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _cost(cost: Cost | None) -> dict[str, str]:
    if cost is None:
        return dict.fromkeys(("stages", "time", "training", "device", "memory"), "—")
    memory = "—" if cost.memory is None else f"{cost.memory / 2**30:.1f} GiB"
    if cost.gpu_memory is not None:
        memory += f" + {cost.gpu_memory / 2**30:.1f} GiB GPU"
    return {
        "stages": str(cost.stages),
        "time": duration(cost.seconds),
        "training": duration(cost.training),
        "device": cost.device or "—",
        "memory": memory,
    }


def _outcome(baseline: Experiment, other: Experiment) -> str:
    """One line: how many figures are better, worse, or cannot be told from the baseline's."""
    better, worse, same, bare = verdict(baseline, other)
    if not (better or worse or same or bare):
        return "the same figures as the baseline" if other.metrics else "no figures"
    counts = {"better": better, "worse": worse, "not told apart": same, "without interval": bare}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def overview(baseline: Experiment, others: Sequence[Experiment]) -> list[dict[str, Any]]:
    """One row an experiment: what it changed, how it came out, what it cost."""
    return [
        {
            "name": e.name,
            "revision": e.revision[:7],
            "changed": [f"{key}: {old} → {new}" for key, (old, new) in changes(baseline, e).items()],
            "files": list(e.files),
            "outcome": _outcome(baseline, e),
            "runs": touched(baseline, e),
            "notes": e.notes,
            **_cost(e.cost),
        }
        for e in others
    ]


def _cell(metric: Measure | None, found: Difference | None, best: bool) -> dict[str, Any]:
    if metric is None:
        return {"value": "—", "interval": "", "difference": "", "sign": 0, "best": False}
    shown = ""
    if found is not None:
        ends = (
            "no interval" if found.low is None or found.high is None else percent_interval(found.low, found.high, True)
        )
        shown = f"{percent(found.value, True)} {ends}"
    return {
        "value": percent(metric.value),
        "interval": "" if metric.low is None or metric.high is None else percent_interval(metric.low, metric.high),
        "difference": shown,
        "sign": found.sign if found else 0,
        "best": best,
    }


def run_table(baseline: Experiment, others: Sequence[Experiment], run: str) -> dict[str, Any] | None:
    """One run's headline metrics, the baseline first, then the experiments that touched it; None where none did."""
    rows = [e for e in others if run in touched(baseline, e)]
    keys = headlines([baseline, *rows], run)
    if not rows or not keys:
        return None
    everyone = [baseline, *rows]
    highest = {key: max(e.metrics[run][key].value for e in everyone if key in e.metrics.get(run, {})) for key in keys}
    table = []
    for e in everyone:
        cells = []
        for key in keys:
            metric = e.metrics.get(run, {}).get(key)
            found = None if e is baseline else difference(baseline, e, run, key)
            cells.append(_cell(metric, found, metric is not None and metric.value == highest[key]))
        table.append({"name": e.name, "cells": cells})
    same = [e.name for e in others if e not in rows and e.metrics]
    every = [difference(baseline, e, run, key) for e in rows for key in keys]
    whys = sorted({d.why for d in every if d is not None and d.why})
    return {"run": run, "columns": [headline_label(key) for key in keys], "rows": table, "same": same, "whys": whys}


def _styles(everyone: Sequence[Experiment]) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Colour and dashes of each curve: the baseline in the colour of text, nine others apart, then grey."""
    styles: dict[str, tuple[str, tuple[float, ...]]] = {everyone[0].name: (figures.INK, ())}
    count = len(figures.SERIES)  # of colours, and of dashes: neighbours differ in both
    looks = [(figures.SERIES[i % count], figures.DASHES[(i + i // count) % count]) for i in range(count**2)]
    for i, e in enumerate(everyone[1:]):
        styles[e.name] = looks[i] if i < len(looks) else (figures.MUTED, ())
    return styles


def charts(baseline: Experiment, others: Sequence[Experiment]) -> list[tuple[str, str]]:
    """(run, SVG) of the validation losses of each run that an experiment trained otherwise."""
    styles, drawn = _styles([baseline, *others]), []
    for run in dict.fromkeys(run for e in (baseline, *others) for run in e.history):
        old = baseline.history.get(run)
        curves = [e for e in (baseline, *others) if e.history.get(run) and (e is baseline or e.history[run] != old)]
        if any(e is not baseline for e in curves):
            lines = [
                figures.Line(e.name, [x for x, _ in e.history[run]], [y for _, y in e.history[run]], *styles[e.name])
                for e in curves
            ]
            drawn.append((run, figures.line_chart(f"Validation loss, {run}", lines, "Epoch", "Validation loss")))
    return drawn


def _legend(baseline: Experiment, others: Sequence[Experiment]) -> list[tuple[str, str, str]]:
    """(experiment, CSS colour, SVG dash array)."""
    styles = _styles([baseline, *others])
    return [(n, figures.MARKERS[c], " ".join(f"{1.3 * x:g}" for x in dashes)) for n, (c, dashes) in styles.items()]


def tables(baseline: Experiment, others: Sequence[Experiment]) -> list[dict[str, Any]]:
    """The tables of all runs that an experiment touched."""
    runs = dict.fromkeys(run for e in (baseline, *others) for run in e.metrics)
    return [table for run in runs if (table := run_table(baseline, others, run))]


def count_differences(baseline: Experiment, others: Sequence[Experiment]) -> int:
    """How many differences have an interval: of 95 %, one in twenty would be "real" by chance alone."""
    return sum(sum(verdict(baseline, e)[:3]) for e in others)


def experiments_html(baseline: Experiment, others: Sequence[Experiment]) -> str:
    """The page, whole in one file: no script, nothing loaded."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("experiments.html.j2").render(
        baseline=baseline,
        rows=overview(baseline, others),
        tables=tables(baseline, others),
        charts=charts(baseline, others),
        legend=_legend(baseline, others),
        compared=count_differences(baseline, others),
        confidence=_confidence(baseline),
        several=_several(baseline),
        missing=baseline.notes,
    )


def _confidence(baseline: Experiment) -> float:
    return float(baseline.params.get("evaluate.bootstrap.confidence", 0.95))


def _several(baseline: Experiment) -> bool:
    """Whether each figure is a mean over trainings."""
    return len(baseline.params.get("seeds", [0])) > 1


def experiments_markdown(baseline: Experiment, others: Sequence[Experiment]) -> str:
    """Both kinds of tables as Markdown."""
    lines = [f"# Experiments on {baseline.revision[:7]}", ""]
    lines += ["| experiment | changed | figures | stages | time | training | device | peak memory |", "|---" * 8 + "|"]
    for row in overview(baseline, others):
        what = "; ".join([*row["changed"], *(f"file {file}" for file in row["files"])]) or "nothing"
        cost = [row[key] for key in ("stages", "time", "training", "device", "memory")]
        lines.append("| " + " | ".join(markdown(c) for c in (row["name"], what, row["outcome"], *cost)) + " |")
    for table in tables(baseline, others):
        lines += ["", f"## {markdown(table['run'])}", "", "| | " + " | ".join(map(markdown, table["columns"])) + " |"]
        lines.append("|---" * (len(table["columns"]) + 1) + "|")
        for row in table["rows"]:
            cells = [f"{c['value']} {c['difference'] and '(' + c['difference'] + ')'}".strip() for c in row["cells"]]
            lines.append("| " + " | ".join([markdown(row["name"]), *cells]) + " |")
        lines += [""] + [f"- no interval: {markdown(why)}" for why in table["whys"]]
    lines += [
        "",
        f"In brackets: the difference from the baseline and its {100 * _confidence(baseline):g} % interval "
        + ("(over seeds and patients)." if _several(baseline) else "(paired bootstrap over patients)."),
    ]
    lines += [f"- {markdown(f'{e.name}: {note}')}" for e in (baseline, *others) for note in e.notes]
    return "\n".join(lines) + "\n"


def experiments_csv(baseline: Experiment, others: Sequence[Experiment]) -> str:
    """One line an experiment, run and headline metric, in fractions; the baseline's come first, without difference."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for e in (baseline, *others):
        for run, metrics in e.metrics.items():
            for key, m in metrics.items():
                old = baseline.metrics.get(run, {}).get(key)
                found = None if e is baseline else difference(baseline, e, run, key)
                numbers = [m.value, m.low, m.high, m.n, old.value if old else None]
                numbers += [found.value, found.low, found.high] if found else [None, None, None]
                shown = ("" if x is None else round(x, 6) for x in numbers)
                writer.writerow(csv_row([e.name, run, key.name, *shown]))
    return out.getvalue()
