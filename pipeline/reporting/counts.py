"""Table 1: studies and images a split."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.datasets import Table as DataSets
from pipeline.datasets import facts
from pipeline.reporting.results import Summary
from pipeline.reporting.table_form import Cell, Column, Row, Table, table_of


def counts(paper: Mapping[str, Any], summaries: Mapping[str, Summary], own: DataSets) -> Table:
    """Table 1: studies (MIMIC-CXR) or images (the others) a split, as the label files list them; then the studies of
    the user's own data sets."""
    table = paper["table1"]
    mine = [name for name in own if name in summaries]
    names = {c["dataset"]: facts(c["dataset"]).name for c in table["columns"]}
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
                comparable = not summary.phantom and not summary.own
                cells.append(Cell(ours, printed, written=written, comparable=comparable, own=summary.own))
        for name in mine:
            listed, written = (
                of.get(row["key"], {}).get("studies", 0) for of in (summaries[name].listed, summaries[name].written)
            )
            cells.append(Cell(listed, written=None if summaries[name].labels_only else written))
        rows.append(Row(key=row["key"], model=row["model"], cells=tuple(cells)))
    notes = []
    for dataset, name in names.items():
        summary = summaries.get(dataset)
        if summary is None:
            notes.append(f"{name}: not among sources.")
        elif not summary.phantom and not summary.own:
            notes.append(f"{name}: {table['known'][dataset].strip()}")
        if summary:
            notes += [f"{name}: {note}" for note in summary.notes]
    phantom = [n for d, n in names.items() if d in summaries and summaries[d].phantom]
    if phantom:
        notes.insert(0, f"Phantom counts, not to be compared with the paper's: {', '.join(phantom)}.")
    notes += [f"{own[name].name}: {note}" for name in mine for note in summaries[name].notes]
    columns = tuple(Column(c["dataset"], names[c["dataset"]], c["unit"]) for c in table["columns"])
    columns += tuple(Column(name, own[name].name, "studies") for name in mine)
    return table_of("1", table, (("Split", "model"),), columns, rows, notes, decimals=0)
