"""Rows of tables from results: figures with intervals, on clean images, and against another row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from pipeline.config.params import Params
from pipeline.datasets import Table as DataSets
from pipeline.datasets import display_names, facts, source_of
from pipeline.evaluation.comparison import paired
from pipeline.evaluation.measure import Measure
from pipeline.evaluation.metric_key import of_clean
from pipeline.reporting.results import RunResult, Summary
from pipeline.reporting.table_form import Cell, Column, Row
from pipeline.reporting.totals import sum_of_recalls


def row_of(
    columns: Sequence[Column],
    results: Mapping[str, RunResult],
    name: str | None,
    model: str,
    backbone: str,
    data: str,
    printed: Sequence[float | None],
    confidence: float,
    key: str = "",
) -> Row:
    """The row of a run or another model (None: of the paper alone), with the paper's figures.

    Args:
        model, backbone, data: what its heads say; ``key``: the row's name where no run fills it.
        printed: the paper's figure of each column; ``confidence``: of intervals.
    """
    cells = cells_of(columns, results.get(name) if name else None, printed, confidence)
    return Row(name or key, model, cells, backbone, data, name or "")


def short_names(datasets: Iterable[str]) -> str:
    """Data sets as the paper's tables name them: ``M,C,C14``."""
    return ",".join(facts(d).short or d for d in datasets)


def marked(summaries: Mapping[str, Summary], columns: Sequence[Column], cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """The cells that rest on drawn images, or on a list of the user's own, marked; a sum rests on all test sets of the
    row."""
    archives = {d: source_of(d) for d in {c.dataset for c in columns}}
    drawn = {d for d, archive in archives.items() if archive in summaries and summaries[archive].phantom}
    own = {d for d, archive in archives.items() if archive in summaries and summaries[archive].own}
    return tuple(
        replace(
            cell,
            phantom=c.dataset in drawn or (not c.dataset and bool(drawn)),
            own=c.dataset in own or (not c.dataset and bool(own)),
        )
        for c, cell in zip(columns, cells, strict=True)
    )


def cells_of(
    columns: Sequence[Column], run: RunResult | None, printed: Sequence[float | None], confidence: float
) -> tuple[Cell, ...]:
    """A run's figures in printed units, beside the paper's; a figure that it lacks is None."""
    cells = []
    for column, figure in zip(columns, printed, strict=True):
        measure = measured(columns, column, run, confidence) if run else None
        if run is None or measure is None:
            cells.append(Cell(paper=figure))
            continue
        seeds = sorted((measure.trainings or measure.seeds).items(), key=lambda s: int(s[0]))
        cell = Cell(measure.value, figure, measure.low, measure.high, measure.n, removed=measure.removed)
        cell = replace(cell, seeds=tuple(value for _, value in seeds))
        if clean := measured(columns, column, run, confidence, clean=True):
            cell = replace(cell, clean=clean.value, clean_low=clean.low, clean_high=clean.high, clean_n=clean.n)
        cells.append(cell)
    return tuple(cells)


def measured(
    columns: Sequence[Column], column: Column, run: RunResult, confidence: float, clean: bool = False
) -> Measure | None:
    """What a run has for a column in printed units, on all test images or on the clean ones; None where it has nothing.
    A sum of recalls is that of its row's: of ``columns``."""
    key = column.metric
    if key.over != "sum":
        found = run.measures.get(of_clean(key) if clean else key)
        return None if found is None else found.times(key.factor)
    shown = [c.metric for c in columns]
    recalls = [k for k in shown if k.quantity == key.quantity and k.direction == key.direction and not k.over]
    if clean and not any(of_clean(k) in run.measures for k in recalls):
        return None
    total = sum_of_recalls(run.measures, recalls, confidence, clean)
    return None if total is None else total.times(key.factor)


def with_differences(
    columns: Sequence[Column], rows: Sequence[Row], results: Mapping[str, RunResult], params: Params, chained: bool
) -> list[Row]:
    """Each row of ours against the first of ours (``chained``: against the one above it; an ablation of prompts against
    the run it is like) over the same resamples."""
    confidence = params.evaluate.bootstrap.confidence
    out: list[Row] = []
    base: Row | None = None
    for row in rows:
        other = base
        if row.run in params.prompt_ablations:
            other = next((r for r in out if r.run == params.runs[row.run].like), base)
        if row.run and other:
            cells = []
            for column, cell in zip(columns, row.cells, strict=True):
                a, b = (measured(columns, column, results[run], confidence) for run in (row.run, other.run))
                cells.append(replace(cell, against=_difference(a, b, confidence)))
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


def notes_of(
    columns: Sequence[Column],
    summaries: Mapping[str, Summary],
    runs: Sequence[RunResult],
    table: DataSets | None = None,
) -> list[str]:
    """What ingest and evaluation noted about the data sets of these columns, each thing once; of those in ``table``."""
    names = display_names(table)
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


def _difference(a: Measure | None, b: Measure | None, confidence: float) -> tuple[float, float, float] | None:
    """The first less the second and both ends of its interval; None where one of them has no figure or no samples."""
    if a is None or b is None or a.samples is None or b.samples is None:
        return None
    found = paired(a, b, confidence)
    assert found.low is not None and found.high is not None
    return found.value, found.low, found.high
