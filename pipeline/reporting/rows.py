"""Rows of tables from results: figures with intervals, on clean images, and against another row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.config.params import Params
from pipeline.datasets import display_names, facts, source_of, used_for
from pipeline.evaluation.comparison import paired
from pipeline.reporting.results import RECALL, Measure, RunResult, Summary, rsum, sample_sum
from pipeline.reporting.table_form import Cell, Column, Row


def row_of(
    columns: Sequence[Column],
    results: Mapping[str, RunResult],
    name: str | None,
    model: str,
    backbone: str,
    data: str,
    printed: Sequence[float | None],
    key: str = "",
) -> Row:
    """The row of a run or another model (None: of the paper alone), with the paper's figures.

    Args:
        model, backbone, data: what its heads say; ``key``: the row's name where no run fills it.
        printed: the paper's figure of each column.
    """
    cells = cells_of(columns, results.get(name) if name else None, printed)
    return Row(name or key, model, cells, backbone, data, name or "")


def short_names(datasets: Iterable[str]) -> str:
    """Data sets as the paper's tables name them: ``M,C,C14``."""
    return ",".join(facts(d).short or d for d in datasets)


def marked(summaries: Mapping[str, Summary], columns: Sequence[Column], cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells that rest on drawn images marked; a sum rests on all test sets of the row."""
    archives = {d: source_of(d) for d in {c.dataset for c in columns}}
    drawn = {d for d, archive in archives.items() if archive in summaries and summaries[archive].phantom}
    return tuple(
        replace(cell, phantom=c.dataset in drawn or (not c.dataset and bool(drawn)))
        for c, cell in zip(columns, cells, strict=True)
    )


def cells_of(columns: Sequence[Column], run: RunResult | None, printed: Sequence[float | None]) -> tuple[Cell, ...]:
    """A run's figures in printed units, beside the paper's; a figure that it lacks is None."""
    cells = []
    for column, figure in zip(columns, printed, strict=True):
        keys = _summands(columns, column)
        measure = _measured(run, column, keys, clean=False) if run else None
        if run is None or measure is None:
            cells.append(Cell(paper=figure))
            continue
        by = column.factor
        low, high = (None if v is None else by * v for v in (measure.low, measure.high))
        cell = Cell(by * measure.value, figure, low, high, measure.n, removed=_removed(run, column))
        cell = replace(cell, seeds=tuple(by * v for _, v in sorted(measure.seeds.items(), key=lambda s: int(s[0]))))
        clean = _measured(run, column, keys, clean=True) if any(k in run.clean for k in keys) else None
        if clean:
            low, high = (None if v is None else by * v for v in (clean.low, clean.high))
            cell = replace(cell, clean=by * clean.value, clean_low=low, clean_high=high, clean_n=clean.n)
        cells.append(cell)
    return tuple(cells)


def with_differences(
    columns: Sequence[Column], rows: Sequence[Row], results: Mapping[str, RunResult], params: Params, chained: bool
) -> list[Row]:
    """Each row of ours against the first of ours (``chained``: against the one above it; an ablation of prompts against
    the run it is like) over the same resamples."""
    out: list[Row] = []
    base: Row | None = None
    for row in rows:
        other = base
        if row.run in params.prompt_ablations:
            other = next((r for r in out if r.run == params.runs[row.run].like), base)
        if row.run and other:
            one, two = results[row.run], results[other.run]
            cells = []
            for column, a, b in zip(columns, row.cells, other.cells, strict=True):
                keys = _summands(columns, column)
                samples = sample_sum(one, keys), sample_sum(two, keys)
                seeds = [c.seeds if len(r.trained) > 1 else () for c, r in ((a, one), (b, two))]
                values = [{"value": c.ours, "n": c.n, "trained": s} for c, s in zip((a, b), seeds, strict=True)]
                cells.append(replace(a, against=_difference(values, samples, column.factor, params)))
            row = replace(row, cells=tuple(cells), against=other.run)
        if row.run and (chained or base is None) and any(c.ours is not None for c in row.cells):
            base = row
        out.append(row)
    return out


def used_columns(columns: tuple[Column, ...], rows: Sequence[Row]) -> tuple[tuple[Column, ...], list[Row]]:
    """Without the columns that have no figure in any row, neither ours nor the paper's; all of them where none has."""
    kept = [
        i for i in range(len(columns)) if any(r.cells[i].ours is not None or r.cells[i].paper is not None for r in rows)
    ]
    kept = kept or list(range(len(columns)))
    return tuple(columns[i] for i in kept), [replace(r, cells=tuple(r.cells[i] for i in kept)) for r in rows]


def notes_of(columns: Sequence[Column], summaries: Mapping[str, Summary], runs: Sequence[RunResult]) -> list[str]:
    """What ingest and evaluation noted about the data sets of these columns, each thing once."""
    names = display_names()
    used = [d for d in names if d in {c.dataset for c in columns}]
    archives = dict.fromkeys(source_of(d) for d in used)
    notes = [f"{names[d]}: {note}" for d in archives if d in summaries for note in summaries[d].notes]
    for note in dict.fromkeys(n for run in runs for n in run.notes):
        dataset, _, rest = note.partition(":")
        dataset = dataset.rpartition("/")[2]  # without the protocol
        key = dataset.split(" ")[0]
        if key in used:
            notes.append(f"{dataset.replace(key, names[key])}:{rest}")
        elif key not in names:
            notes.append(note)
    return list(dict.fromkeys(notes))


def _summands(columns: Sequence[Column], column: Column) -> list[str]:
    """The metrics a column adds up: the recalls of its row, or itself."""
    return [c.key for c in columns if RECALL.search(c.key)] if column.key.endswith("rsum") else [column.key]


def _measured(run: RunResult, column: Column, keys: Sequence[str], clean: bool) -> Measure | None:
    if column.key.endswith("rsum"):
        return rsum(run, keys, clean=clean)
    return (run.clean if clean else run.measures).get(column.key)


def _difference(
    values: Sequence[Mapping[str, Any]], samples: Sequence[np.ndarray | None], factor: float, params: Params
) -> tuple[float, float, float] | None:
    """The first less the second and both ends of its interval in printed units, or None where one of them has no figure
    or no samples."""
    (a, b), (a_samples, b_samples) = values, samples
    if a["value"] is None or b["value"] is None or a_samples is None or b_samples is None:
        return None
    found = paired(a, factor * a_samples, b, factor * b_samples, params.evaluate.bootstrap.confidence)
    return found["difference"], found["low"], found["high"]


def _removed(run: RunResult, column: Column) -> int | None:
    """How many test images are not clean for a figure; None where its evaluation did not look."""
    kind = "retrieval"
    if "_zs_" in column.key:
        kind = "zero_shot"
    elif column.key.endswith("_auc"):
        kind = "official" if column.dataset in used_for("official_classification") else "few_shot"
    elif re.search(r"_(psnr|ssim)\d", column.key):
        kind = "regeneration"
    protocol = "".join(column.key.rpartition("/")[:2]) if kind == "zero_shot" else ""
    return run.removed.get(kind, {}).get(protocol + column.dataset)
