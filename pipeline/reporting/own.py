"""The table of the user's own data sets: zero-shot, probe and retrieval, without any figure of the paper."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pipeline.config.params import Params
from pipeline.datasets import Table as DataSets
from pipeline.datasets import datasets_of, own_datasets, used_for
from pipeline.evaluation.metric_key import Direction, MetricKey, share_key
from pipeline.evaluation.protocols import first_protocol
from pipeline.reporting.results import RunResult, Summary, load_paper
from pipeline.reporting.rows import marked, notes_of, row_of, short_names, used_columns, with_differences
from pipeline.reporting.table_form import Column, Table, table_of

FORM = {"title": "Your own data sets", "measure": "AUC × 100, the mean over classes; R@K in %", "command": "dvc repro"}
DIRECTIONS: dict[Direction, str] = {"i2t": "image → text", "t2i": "text → image"}
HEADS = (("Model", "model"), ("Backbone", "backbone"), ("Data", "data"))


def own_table(params: Params, summaries: Mapping[str, Summary], results: Mapping[str, RunResult]) -> list[Table]:
    """The table, with a row for each run of ``main`` and each other model that has a result; nothing if no data set of
    the user's own is tested."""
    own, confidence = own_datasets(params.sources), params.evaluate.bootstrap.confidence
    columns = tuple(_columns(params, own))
    if not columns:
        return []
    nothing, backbones = [None] * len(columns), load_paper()["backbones"]
    rows = []
    for name in (n for n in params.main if n in results):
        run = params.runs[name]
        backbone = backbones.get(run.image_encoder, run.image_encoder)
        rows.append(row_of(columns, results, name, "own run", backbone, short_names(run.datasets), nothing, confidence))
    for name, other in ((n, o) for n, o in params.others.items() if n in results):
        rows.append(row_of(columns, results, name, other.model, other.backbone, other.data, nothing, confidence))
    rows = [replace(r, cells=marked(summaries, columns, r.cells)) for r in rows]
    rows = with_differences(columns, rows, results, params, chained=False)
    notes = [
        *_taught(params, own, results),
        *notes_of(columns, summaries, [results[r.run] for r in rows], datasets_of(params.sources)),
    ]
    columns, rows = used_columns(columns, rows)
    return [table_of("Own", FORM, HEADS, columns, rows, notes, confidence=confidence)]


def _taught(params: Params, own: DataSets, results: Mapping[str, RunResult]) -> Iterator[str]:
    """A note where a class that is tested zero-shot was named in training by labels."""
    for name in used_for("own_classification", own):
        runs = [n for n in params.main if n in results and name in params.runs[n].datasets]
        if own[name].captioned and runs:
            yield (
                f"{own[name].name}: the captions of {', '.join(runs)} were made from the training images' labels of "
                "these classes: ZS tests without a classifier, not classes that training never named."
            )


def _columns(params: Params, own: DataSets) -> Iterator[Column]:
    first, few_shot = first_protocol(params.evaluate.protocols, own), params.evaluate.few_shot
    shares = [*few_shot.shares, *(few_shot.fine_tune.shares if few_shot.fine_tune.runs else ())]
    for name, about in own.items():
        keys: list[tuple[MetricKey, str]] = []
        for task in (t for t in first.tasks.values() if t.rule.dataset == name):
            keys.append((MetricKey(task.name, "zero_shot", task.rule.metric), "ZS"))
        if keys and keys[0][0].quantity == "auc":
            keys += [(key, key.label) for key in (share_key(name, share) for share in shares)]
        for key in (k for k, rule in first.retrieval.items() if rule.dataset == name):
            for direction in DIRECTIONS:
                for k in params.evaluate.retrieval.k:
                    metric = MetricKey(key, "retrieval", "recall", direction=direction, k=k)
                    keys.append((metric, f"R@{k} {DIRECTIONS[direction]}"))
        yield from (Column(key.name, about.name, label) for key, label in keys)
