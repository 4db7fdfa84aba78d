"""Tables 1–4 and S1–S4 in the paper's row and column order: our figure, its interval, the paper's, the difference, the
figure on clean test images, and the paired difference between rows. S5 and S6 are of ``compositions``; ``formats``
prints all.

The paper's figures are data (``paper.yaml``). A figure that was not computed is None here and — in print; nothing
replaces it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.config.params import Params
from pipeline.config.run_config import run_config
from pipeline.datasets import captioned, datasets_of, display_names, own_datasets, source_of
from pipeline.reporting.compositions import composition_table, regeneration_table
from pipeline.reporting.counts import counts
from pipeline.reporting.own import own_table
from pipeline.reporting.results import RunResult, Summary, load_paper
from pipeline.reporting.rows import marked, notes_of, row_of, short_names, used_columns, with_differences
from pipeline.reporting.table_form import Column, Row, Table, table_of

TABLES = ("2", "3", "4", "S1", "S2", "S3", "S4")  # those of the paper's models


def build_tables(params: Params, summaries: Mapping[str, Summary], results: Mapping[str, RunResult]) -> list[Table]:
    """Tables 1–4 and S1–S6 from the counts of ingest and the metrics of evaluation; with data sets of the user's own
    that are tested, theirs."""
    paper, own = load_paper(), own_datasets(params.sources)
    found = [counts(paper, summaries, own), *(_models(n, paper, params, summaries, results) for n in TABLES)]
    found += [make(paper, params, summaries, results) for make in (composition_table, regeneration_table)]
    return [*found, *own_table(params, summaries, results)]


def shown(tables: Sequence[Table]) -> list[Table]:
    """What is printed and on the page: all, or, with data sets of the user's own, their table and others with figures
    of ours."""
    own = [t for t in tables if t.number == "Own"]
    return [*own, *(t for t in tables if t not in own and _has_figures(t.rows))] if own else list(tables)


def _has_figures(rows: Iterable[Row]) -> bool:
    return any(cell.ours is not None for row in rows for cell in row.cells)


def phantoms(summaries: Mapping[str, Summary]) -> list[str]:
    """The names of the data sets that are phantoms."""
    names = display_names()
    return [names.get(d, d) for d, s in summaries.items() if s.phantom]


def _models(
    number: str,
    paper: Mapping[str, Any],
    params: Params,
    summaries: Mapping[str, Summary],
    results: Mapping[str, RunResult],
) -> Table:
    """The paper's rows in order, each with what fills it; then our runs and other people's models without one."""
    table, confidence = paper[f"table{number}"], params.evaluate.bootstrap.confidence
    columns = tuple(Column(c["key"], c["group"], c["name"]) for c in table["columns"])
    own = {"4": params.ablations, "S1": (*params.main, *params.prompt_ablations)}.get(number, params.main)
    waiting = [name for name in own if name in results]
    others = {} if number == "4" else {n: o for n, o in params.others.items() if n in results}
    ablations = iter(params.ablations)
    rows = []
    for row in table["rows"]:
        if number == "4":
            name = next(ablations, None) if row.get("run") else None
            name = name if name in waiting else None
        else:
            name = next((n for n in waiting if n in params.main and _fills(params, n, row)), None)
        if name:
            waiting.remove(name)
        else:  # a row of somebody else: his model, if it is among others
            his = (n for n, o in others.items() if (o.adapter, o.backbone) == (row["key"], row.get("backbone")))
            name = next(his, None)
        data = row["data"] if "data" in row else short_names(row.get("datasets", ()))
        backbone = row.get("backbone") or paper["backbones"].get(row.get("image_encoder"), "")
        rows.append(row_of(columns, results, name, row["model"], backbone, data, row["paper"], confidence, row["key"]))
        others = {n: o for n, o in others.items() if n != name}
        if "image_encoder" in row:  # the authors' own weights of the model in this row
            for n in [n for n, o in others.items() if (o.adapter, o.backbone, o.data) == ("cxr_clip", backbone, data)]:
                title = others.pop(n).model
                rows.append(row_of(columns, results, n, title, backbone, data, row["paper"], confidence))
    nothing = [None] * len(columns)
    for name in waiting:
        run = params.runs[name]
        backbone = paper["backbones"].get(run.image_encoder, run.image_encoder)
        title = "own run" if table["rows"] else "CXR-CLIP"
        if run.prompts == "ablation":
            title = f"trained with {Path(params.prompts.ablation).name}"
        data = short_names(run.datasets)
        rows.append(row_of(columns, results, name, title, backbone, data, nothing, confidence))
    for name, other in others.items():
        rows.append(row_of(columns, results, name, other.model, other.backbone, other.data, nothing, confidence))
    rows = [replace(r, cells=marked(summaries, columns, r.cells)) for r in rows]
    rows = with_differences(columns, rows, results, params, chained=number == "4")
    heads = (
        (("Method", "model"),) if number == "4" else (("Model", "model"), ("Backbone", "backbone"), ("Data", "data"))
    )
    ran = [name for name in own if name in results]
    notes = [
        *table.get("notes", ()),
        *notes_of(columns, summaries, [results[n] for n in ran], datasets_of(params.sources)),
    ]
    notes += _text_augmentation(params, ran)
    if ran and len(params.seeds) > 1:
        seeds = ", ".join(map(str, params.seeds))
        notes.insert(
            0, f"Ours: means over trainings with seeds {seeds}; the intervals are for other seeds and patients."
        )
    if number != "4":
        notes += [
            f"{o.model}: {note}"
            for n, o in params.others.items()
            if n in results and not results[n].measures
            for note in results[n].notes
        ]
    if ran and not _has_figures(rows):
        there = {source_of(c.dataset) for c in columns} & set(params.sources)
        notes.append(
            f"Nothing of this table was computed yet; run: {table['command']}"
            if there
            else "Nothing of this table can be computed: none of its test sets is among sources."
        )
    columns, rows = used_columns(columns, rows)
    return table_of(number, table, heads, columns, rows, notes, confidence=confidence)


def _fills(params: Params, name: str, row: Mapping[str, Any]) -> bool:
    run = params.runs[name]
    return run.image_encoder == row.get("image_encoder") and set(run.datasets) == set(row.get("datasets", ()))


def _text_augmentation(params: Params, shown: Sequence[str]) -> list[str]:
    """A note where runs that augment reports had no back-translations to draw from, as the paper's had."""
    made = set(captioned(datasets_of(params.sources)))
    reports = {name for name in shown if set(params.runs[name].datasets) - made}
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
