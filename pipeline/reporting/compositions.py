"""Tables S5 and S6: runs by what they learn from, and how well mixed runs regenerate hidden regions.

S5 has a row for each run that ``compositions`` of params.yaml names, mixed ones and CXR-CLIP's, and the three uses as
columns. S6 has a row for each mixed run of ``evaluate.regeneration``, test set and share of hidden cells.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pipeline.config.params import Params, Run
from pipeline.datasets import datasets_of, display_names, paired_tests
from pipeline.evaluation.metric_key import MetricKey
from pipeline.reporting.results import RunResult, Summary
from pipeline.reporting.rows import cells_of, marked, notes_of, row_of, short_names, used_columns, with_differences
from pipeline.reporting.table_form import Column, Row, Table, table_of

MIXED = "one transformer"


def learns_from(run: Run) -> str:
    """A run's sources by role in a few words, data sets by their short names: ``50 % of pairs M, the others apart``."""

    if not run.mixed:
        return short_names(run.datasets)
    parts, pairs = [], short_names(run.paired)
    if run.paired and run.paired_fraction == 1:
        parts.append(f"pairs {pairs}")
    elif run.paired and run.paired_fraction == 0:
        parts.append(f"pairs {pairs}, all taken apart")
    elif run.paired:
        parts.append(f"{100 * run.paired_fraction:g} % of pairs {pairs}, the others apart")
    lone = (("images", run.images), ("texts", run.texts))
    parts += [f"{kind} {short_names(names)}" for kind, names in lone if names]
    return " + ".join(parts)


def composition_table(
    paper: Mapping[str, Any],
    params: Params,
    summaries: Mapping[str, Summary],
    results: Mapping[str, RunResult],
) -> Table:
    """Table S5, in the order of ``compositions``; regeneration is shown at the largest share of hidden cells."""
    form, confidence = paper["tableS5"], params.evaluate.bootstrap.confidence
    percent = _percents(params)[-1] if params.evaluate.regeneration.ratios else ""
    columns = tuple(Column(c["key"].format(percent), c["group"], c["name"].format(percent)) for c in form["columns"])
    nothing = [None] * len(columns)
    rows = []
    for name in params.compositions:
        run = params.runs[name]
        title = MIXED if run.mixed else "CXR-CLIP"
        backbone = "" if run.mixed else paper["backbones"].get(run.image_encoder, run.image_encoder)
        rows.append(row_of(columns, results, name, title, backbone, learns_from(run), nothing, confidence))
    rows = [replace(r, cells=marked(summaries, columns, r.cells)) for r in rows]
    rows = with_differences(columns, rows, results, params, chained=False)
    shown = [results[n] for n in params.compositions if n in results]
    notes = [
        *form["notes"],
        *_chances(columns, shown),
        *notes_of(columns, summaries, shown, datasets_of(params.sources)),
    ]
    if not rows:
        notes = ["compositions in params.yaml names no run."]
    columns, rows = used_columns(columns, rows)
    heads = (("Model", "model"), ("Backbone", "backbone"), ("Learns from", "data"))
    return table_of("S5", form, heads, columns, rows, notes, confidence=confidence)


def regeneration_table(
    paper: Mapping[str, Any],
    params: Params,
    summaries: Mapping[str, Summary],
    results: Mapping[str, RunResult],
) -> Table:
    """Table S6; its columns' metrics are a row's without test set (``each`` replaces it) and share."""
    form, confidence = paper["tableS6"], params.evaluate.bootstrap.confidence
    columns = [Column(c["key"], c["group"], c["name"]) for c in form["columns"]]
    for k in range(1, params.model.mixed.scales):
        ways = {"matching": "its report", "none": "no report"}
        keys = {MetricKey("each", "regeneration", "psnr", way=way, scale=k).name: name for way, name in ways.items()}
        columns += [Column(key, f"PSNR, {2**k}× coarser", name) for key, name in keys.items()]
    rows = []
    for name in params.evaluate.regeneration.runs:
        for dataset in (d for d in paired_tests() if d in params.sources):
            for percent in _percents(params):
                own = [replace(c, key=replace(c.metric, test_set=dataset, percent=percent).name) for c in columns]
                cells = cells_of(own, results.get(name), [None] * len(own), confidence)
                cells = marked(summaries, own, cells)
                title = display_names()[dataset]
                rows.append(Row(f"{name} {dataset} {percent}", MIXED, cells, title, f"{percent} %", name))
    notes = form["notes"] if rows else ["evaluate.regeneration.runs in params.yaml names no run."]
    kept, rows = used_columns(tuple(columns), rows)
    heads = (("Run", "model"), ("Test set", "backbone"), ("Hidden", "data"))
    return table_of("S6", form, heads, kept, rows, notes, confidence=confidence)


def _percents(params: Params) -> list[int]:
    return [round(100 * ratio) for ratio in sorted(params.evaluate.regeneration.ratios)]


def _chances(columns: Iterable[Column], runs: Iterable[RunResult]) -> list[str]:
    """What R@10 of each test set would be by chance."""
    pools = {d: pool for run in runs for d, pool in run.pools.items()}
    found = []
    for dataset in dict.fromkeys(c.dataset for c in columns if c.metric.k == 10):
        chance = pools.get(dataset, {}).get("chance", {}).get("r10")
        if chance:
            found.append(f"{display_names()[dataset]} {100 * chance:.1f}")
    return [f"R@10 by chance: {', '.join(found)}."] if found else []
