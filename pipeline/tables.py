"""Tables 1–4 and S1–S4 in the paper's row and column order: our figure, its interval, the paper's, the difference, the
figure on clean test images, and the paired difference between rows. ``formats`` prints them.

The paper's figures are data (``paper.yaml``). A figure that was not computed is None here and — in print; nothing
stands in for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.comparison import paired
from pipeline.params import BINARY_DATASETS, LABEL_DATASETS, Params
from pipeline.results import RECALL, Measure, RunResult, Summary, load_paper, rsum, sample_sum
from pipeline.run_config import run_config

TABLES = ("2", "3", "4", "S1", "S2", "S3", "S4")  # those of models; Table 1 is counts
TEST_SET = re.compile(r"(?:.+/)?(\w+?)_(?:zs|p|ft|t2i|r)\d*(?:_|$)")


@dataclass(frozen=True)
class Column:
    """A column of a table: its metric and its two header lines."""

    key: str
    group: str
    name: str

    @property
    def dataset(self) -> str:
        """The test set it is measured on; "" for a sum over several."""
        found = TEST_SET.match(self.key)
        return found[1] if found else ""


@dataclass(frozen=True)
class Cell:
    """One figure in printed units (points, i.e. fraction × 100; Table 1: a count). ``written`` is Table 1's number of
    studies or images that passed ingest; ``comparable`` is False for counts of a phantom archive.

    ``clean``: the same figure on the ``clean_n`` test images that training has not seen; None where nothing is known to
    be seen, or no audit was made. ``removed``: how many images that leaves out (None = not audited). ``seeds``: the
    figure by seed. ``against``: (difference, low, high) to the row that ``Row.against`` names, over the same resamples.
    ``phantom``: measured on drawn images.
    """

    ours: float | None = None
    paper: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    written: int | None = None
    comparable: bool = True
    clean: float | None = None
    clean_low: float | None = None
    clean_high: float | None = None
    clean_n: int | None = None
    removed: int | None = None
    seeds: tuple[float, ...] = ()
    against: tuple[float, float, float] | None = None
    phantom: bool = False

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, or None where one of them is missing."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper

    def beats(self, decimals: int) -> bool:
        """Whether our figure as printed is above the paper's, on a real test set: what bold says."""
        if self.ours is None or self.paper is None or self.phantom:
            return False
        return round(self.ours, decimals) > self.paper


@dataclass(frozen=True)
class Row:
    """One model (Table 1: one split). ``key`` is the run's name, or the paper row's where no run fills it; ``against``
    the run whose figures ``Cell.against`` is taken from."""

    key: str
    model: str
    cells: tuple[Cell, ...]
    backbone: str = ""
    data: str = ""
    run: str = ""
    against: str = ""


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
    """One table: "1" … "4" of the paper, "S1" … "S4" beside it.

    ``heads``: (title, attribute of ``Row``) of the columns left of the figures; ``command`` computes the figures.
    """

    number: str
    title: str
    measure: str
    heads: tuple[tuple[str, str], ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    decimals: int = 1
    confidence: float = 0.95
    command: str = ""


def build(params: Params, summaries: Mapping[str, Summary], results: Mapping[str, RunResult]) -> list[Table]:
    """Tables 1–4 and S1–S4 from the counts of ingest and the metrics of evaluation."""
    paper = load_paper()
    return [_counts(paper, summaries), *(_models(n, paper, params, summaries, results) for n in TABLES)]


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
    return Table(
        "1",
        table["title"],
        "",
        (("Split", "model"),),
        columns,
        tuple(rows),
        tuple(notes),
        decimals=0,
        command=table["command"],
    )


def _models(
    number: str,
    paper: Mapping[str, Any],
    params: Params,
    summaries: Mapping[str, Summary],
    results: Mapping[str, RunResult],
) -> Table:
    """The paper's rows in order, each with what fills it; then our runs and other people's models without one."""
    table = paper[f"table{number}"]
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
        data = row["data"] if "data" in row else _short(paper, row.get("datasets", ()))
        backbone = row.get("backbone") or paper["backbones"].get(row.get("image_encoder"), "")
        rows.append(_row(columns, results, name, row["model"], backbone, data, row["paper"], row["key"]))
        others = {n: o for n, o in others.items() if n != name}
        if "image_encoder" in row:  # the authors' own weights of the model in this row
            for n in [n for n, o in others.items() if (o.adapter, o.backbone, o.data) == ("cxr_clip", backbone, data)]:
                title = others.pop(n).model
                rows.append(_row(columns, results, n, title, backbone, data, row["paper"]))
    nothing = [None] * len(columns)
    for name in waiting:
        run = params.runs[name]
        backbone = paper["backbones"].get(run.image_encoder, run.image_encoder)
        title = "own run" if table["rows"] else "CXR-CLIP"
        if run.prompts == "ablation":
            title = f"trained with {Path(params.prompts.ablation).name}"
        rows.append(_row(columns, results, name, title, backbone, _short(paper, run.datasets), nothing))
    for name, other in others.items():
        rows.append(_row(columns, results, name, other.model, other.backbone, other.data, nothing))
    drawn = {d for d in {c.dataset for c in columns} if _is_phantom(paper, summaries, d)}
    rows = [replace(r, cells=_marked(columns, r.cells, drawn)) for r in rows]
    rows = _compared(columns, rows, results, params, chained=number == "4")
    heads = (
        (("Method", "model"),) if number == "4" else (("Model", "model"), ("Backbone", "backbone"), ("Data", "data"))
    )
    shown = [name for name in own if name in results]
    notes = [*table.get("notes", ()), *_notes(paper, columns, summaries, [results[n] for n in shown])]
    notes += _text_augmentation(params, shown)
    if shown and len(params.seeds) > 1:
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
    if shown and not any(c.ours is not None for r in rows for c in r.cells):
        notes.append(f"Nothing of this table was computed yet; run: {table['command']}")
    columns, rows = _used(columns, rows)
    confidence = params.evaluate.bootstrap.confidence
    return Table(
        number,
        table["title"],
        table["measure"],
        heads,
        columns,
        tuple(rows),
        tuple(notes),
        confidence=confidence,
        command=table["command"],
    )


def _row(
    columns: Sequence[Column],
    results: Mapping[str, RunResult],
    name: str | None,
    model: str,
    backbone: str,
    data: str,
    printed: Sequence[float | None],
    key: str = "",
) -> Row:
    cells = _cells(columns, results.get(name) if name else None, printed)
    return Row(name or key, model, cells, backbone, data, name or "")


def _fills(params: Params, name: str, row: Mapping[str, Any]) -> bool:
    run = params.runs[name]
    return run.image_encoder == row.get("image_encoder") and set(run.datasets) == set(row.get("datasets", ()))


def _short(paper: Mapping[str, Any], datasets: Iterable[str]) -> str:
    return ",".join(paper["datasets"].get(d, {}).get("short", d) for d in datasets)


def _is_phantom(paper: Mapping[str, Any], summaries: Mapping[str, Summary], dataset: str) -> bool:
    archive = paper["datasets"].get(dataset, {}).get("archive", dataset)
    return archive in summaries and summaries[archive].phantom


def _marked(columns: Sequence[Column], cells: Sequence[Cell], drawn: set[str]) -> tuple[Cell, ...]:
    """The cells that rest on drawn images marked; a sum rests on all test sets of the row."""
    return tuple(
        replace(cell, phantom=c.dataset in drawn or (not c.dataset and bool(drawn)))
        for c, cell in zip(columns, cells, strict=True)
    )


def _cells(columns: Sequence[Column], run: RunResult | None, printed: Sequence[float | None]) -> tuple[Cell, ...]:
    cells = []
    for column, figure in zip(columns, printed, strict=True):
        keys = _summands(columns, column)
        measure = _measured(run, column, keys, clean=False) if run else None
        if run is None or measure is None:
            cells.append(Cell(paper=figure))
            continue
        low, high = (None if v is None else 100 * v for v in (measure.low, measure.high))
        cell = Cell(100 * measure.value, figure, low, high, measure.n, removed=_removed(run, column))
        cell = replace(cell, seeds=tuple(100 * v for _, v in sorted(measure.seeds.items(), key=lambda s: int(s[0]))))
        clean = _measured(run, column, keys, clean=True) if any(k in run.clean for k in keys) else None
        if clean:
            low, high = (None if v is None else 100 * v for v in (clean.low, clean.high))
            cell = replace(cell, clean=100 * clean.value, clean_low=low, clean_high=high, clean_n=clean.n)
        cells.append(cell)
    return tuple(cells)


def _summands(columns: Sequence[Column], column: Column) -> list[str]:
    """The metrics a column adds up: the recalls of its row, or itself."""
    return [c.key for c in columns if RECALL.search(c.key)] if column.key.endswith("rsum") else [column.key]


def _measured(run: RunResult, column: Column, keys: Sequence[str], clean: bool) -> Measure | None:
    if column.key.endswith("rsum"):
        return rsum(run, keys, clean=clean)
    return (run.clean if clean else run.measures).get(column.key)


def _compared(
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
                cells.append(replace(a, against=_difference(values, samples, params)))
            row = replace(row, cells=tuple(cells), against=other.run)
        if row.run and (chained or base is None) and any(c.ours is not None for c in row.cells):
            base = row
        out.append(row)
    return out


def _difference(
    values: Sequence[Mapping[str, Any]], samples: Sequence[np.ndarray | None], params: Params
) -> tuple[float, float, float] | None:
    """The first less the second and both ends of its interval in points, or None where one of them has no figure or no
    samples."""
    (a, b), (a_samples, b_samples) = values, samples
    if a["value"] is None or b["value"] is None or a_samples is None or b_samples is None:
        return None
    found = paired(a, 100 * a_samples, b, 100 * b_samples, params.evaluate.bootstrap.confidence)
    return found["difference"], found["low"], found["high"]


def _removed(run: RunResult, column: Column) -> int | None:
    """How many test images are not clean for a figure; None where its evaluation did not look."""
    kind = "zero_shot" if "_zs_" in column.key else "few_shot" if column.key.endswith("_auc") else "retrieval"
    return run.removed.get(kind, {}).get(column.dataset)


def _used(columns: tuple[Column, ...], rows: Sequence[Row]) -> tuple[tuple[Column, ...], list[Row]]:
    """Without the columns that have no figure in any row, neither ours nor the paper's; all of them where none has."""
    kept = [
        i for i in range(len(columns)) if any(r.cells[i].ours is not None or r.cells[i].paper is not None for r in rows)
    ]
    kept = kept or list(range(len(columns)))
    return tuple(columns[i] for i in kept), [replace(r, cells=tuple(r.cells[i] for i in kept)) for r in rows]


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
