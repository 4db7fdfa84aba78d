"""Where the figures of a table come from: metric, test set, rule, seed, and the command that computes them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from pipeline.config.params import Params
from pipeline.evaluation.metric_key import SHARES, MetricKey
from pipeline.reporting.table_form import Column, Table


@dataclass(frozen=True)
class Origin:
    """Of one group of columns: what is measured, on what (with the number of items), and how."""

    columns: str
    test_set: str
    rule: str


def origins(params: Params, table: Table) -> list[Origin]:
    """One line a data set and kind of metric. Table 1: one line for all."""
    if table.number == "1":
        rule = "listed: the split of the archive's label files; ingested: what is in the shards"
        return [Origin("all", "every archive among sources", rule)]
    found = []
    for (group, _), columns in groupby(table.columns, key=lambda c: (c.group, _kind(c))):
        several = list(columns)
        sizes = [row.cells[table.columns.index(c)].n for c in several for row in table.rows]
        n = max((size for size in sizes if size), default=0)
        test = f"{group}, test split" + (f", n = {n:,}" if n else "") if several[0].dataset else "the row's test sets"
        found.append(Origin(f"{group} {', '.join(c.name for c in several)}", test, _rule(params, several[0].metric)))
    return found


def interval_rule(params: Params) -> str:
    """How every interval and paired difference on the page is made."""
    boot = params.evaluate.bootstrap
    if len(params.seeds) > 1:
        return (
            f"a figure of ours is the mean over {len(params.seeds)} trainings; its interval of "
            f"{100 * boot.confidence:g} % is for other seeds and patients: half widths of Student's interval over the "
            f"trainings and of the percentile interval over {boot.samples:,} resamples of the test set's patients, "
            "added as squares; differences are taken seed by seed and over the same resamples"
        )
    return (
        f"percentile interval of {100 * boot.confidence:g} % over {boot.samples:,} resamples of the test set's "
        f"patients, seed {params.seed}; the same draws for every model, so that two models' figures pair up"
    )


def _kind(column: Column) -> tuple[str, str, str, str]:
    """What the columns have in common that one rule describes."""
    key = column.metric
    return key.task, key.protocol, key.direction, key.over


def _rule(params: Params, key: MetricKey) -> str:
    """How a metric is taken."""
    evaluate = params.evaluate
    if key.task == "zero_shot":
        metric = "accuracy: class of the highest score" if key.quantity == "accuracy" else "AUC, mean over classes"
        protocol = key.protocol or evaluate.protocols[0]
        return f"protocol {protocol} (pipeline/evaluation/protocols): its prompts against the image; {metric}"
    if key.task in SHARES:
        way = (
            "a linear layer on the frozen image encoder"
            if key.task == "linear_probe"
            else "the image encoder trained with a linear layer"
        )
        shares = ", ".join(f"{k}: {100 * v:g} %" for k, v in evaluate.few_shot.shares.items())
        return f"{way}, on a share of the training split drawn with the seed ({shares}); AUC, mean over classes"
    if key.task == "regeneration":
        return (
            "hidden cells of the coarsest scale filled by the model, measured over hidden pixels; with the image's "
            "report, with none or with another patient's (docs/results.md)"
        )
    if key.task != "retrieval":
        return key.label
    if key.over == "sum":
        return "sum of the row's R@K; — where one is missing"
    query, found = ("text", "image") if key.direction == "t2i" else ("image", "text")
    return f"cosine; share of {query}s whose own {found} is among the K nearest of the test set, ties against the model"
