"""reports/index.html: the tables with pictures on one page that loads nothing from anywhere.

Images and texts of real patients are left out unless ``report.show_patient_data`` says otherwise; those of phantoms
belong to nobody. No time and no revision goes in, so the same results give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from pipeline.config.params import Params
from pipeline.config.places import without_places
from pipeline.datasets import datasets_of, display_names, facts, known_datasets, paired_tests, source_of, used_for
from pipeline.evaluation.candidates import text_digest
from pipeline.evaluation.metric_key import MACRO_AUC, MetricKey
from pipeline.evaluation.store import load_arrays
from pipeline.reporting import charts, figures
from pipeline.reporting.control import ControlRow, control_rows
from pipeline.reporting.formats import all_notes, bold, figure_lines, phantom_line
from pipeline.reporting.provenance import interval_rule, origins
from pipeline.reporting.results import RunResult, Summary
from pipeline.reporting.table_form import Row, Table
from pipeline.reporting.tables import phantoms
from pipeline.storage.index import read_studies
from pipeline.study import Study, View

TEMPLATE = Path(__file__).with_name("page.html.j2")
PER_DATASET = 3  # pictures of a data set on the contact sheet
EXAMPLES = 3
SIDE = 224  # pixels of a contact-sheet picture
CAPTION = 90  # characters
Loader = Callable[[View], np.ndarray]


def render_page(
    params: Params,
    tables: Sequence[Table],
    summaries: Mapping[str, Summary],
    results: Mapping[str, RunResult],
    missing: Sequence[str],
    index: Path,
    load: Loader,
    embeddings: Path = Path("data/embeddings/runs"),
    regeneration: Path = Path("data/results/regeneration"),
) -> str:
    """The whole page as HTML.

    Args:
        params: params.yaml.
        tables: those that are shown (``tables.shown``).
        summaries: of every data set in use; whether it is a phantom decides what may be shown.
        results: of the runs and the other models.
        missing: files that were not there, named on the page.
        index: folder of the Parquet indexes (data/index).
        load: gives the picture of a view, uint8 [H, W].
        embeddings: folder of the runs' embeddings, which may hold similarity maps.
        regeneration: folder of the mixed runs' results, which may hold pictures.
    """
    names = display_names(datasets_of(params.sources))
    hidden = [d for d, s in summaries.items() if not shown(params, s)]
    twin, control = control_rows(params, results)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    phantom = phantoms(summaries)
    name = charts.headline(params, results)
    return template.render(
        phantom=phantom,
        phantom_line=phantom_line(phantom) if phantom else "",
        real=[names[d] for d, s in summaries.items() if not s.phantom],
        tiles=list(_tiles(params, summaries, results)),
        tables=[_table(params, t) for t in tables if not t.number.startswith("S")],
        supplement=[_table(params, t) for t in tables if t.number.startswith("S")],
        interval=interval_rule(params),
        headline=name,
        accounts=[(names[d], s) for d, s in summaries.items()],
        control=[_control_line(row) for row in control],
        control_name=params.control,
        control_twin=twin,
        losses=[(name, figures.loss_chart(f"Loss of {name}", r.history)) for name, r in results.items() if r.history],
        rocs=list(charts.rocs(params, results, names)),
        precision_recalls=list(charts.precision_recalls(params, results, names)),
        legend=charts.legend(params, results),
        classes=list(charts.classes(params, results.get(name), names)),
        calibrations=list(charts.calibrations(params, results.get(name), names)),
        maps=list(_maps(params, summaries, names, index, embeddings / name / str(params.seeds[0]) / "maps.npz", load))
        if name
        else [],
        regenerated=list(_regenerated(params, summaries, names, regeneration)),
        own_only=not set(params.sources) & set(known_datasets()),
        searched=any(r.pools for r in results.values()),
        examples=_examples(params, summaries, results, names, index, load),
        sheet=list(_contact_sheet(params, summaries, names, index, load)),
        hidden=[names[d] for d in hidden],
        missing=missing,
        runs=_runs(params, results),
        params=params,
        params_text=yaml.safe_dump(_public(params, summaries), sort_keys=False, width=100),
    )


def shown(params: Params, summary: Summary) -> bool:
    """Whether images and texts of a data set may appear."""
    return summary.phantom or params.report.show_patient_data


def _table(params: Params, table: Table) -> dict[str, Any]:
    groups = [(name, len(list(columns))) for name, columns in groupby(c.group for c in table.columns)]
    starts = [i == 0 or c.group != table.columns[i - 1].group for i, c in enumerate(table.columns)]

    def row(r: Row) -> dict[str, Any]:
        lines = [
            (label, "against" if label.startswith("against") else label.split(" ")[-1], texts)
            for label, texts in figure_lines(table, r)
        ]
        head = [getattr(r, name) for _, name in table.heads]
        small = " · ".join(text for text in head[1:] if text)  # what a narrow screen shows in place of its own columns
        return {"head": head, "small": small, "run": r.run, "lines": lines, "bold": bold(table, r)}

    return {
        "table": table,
        "groups": groups,
        "starts": starts,
        "heads": [title for title, _ in table.heads],
        "rows": [row(r) for r in table.rows],
        "notes": all_notes(table),
        "paired": any(c.against for r in table.rows for c in r.cells),
        "origins": origins(params, table),
    }


def _tiles(
    params: Params, summaries: Mapping[str, Summary], results: Mapping[str, RunResult]
) -> Iterator[tuple[str, str, str]]:
    """Headline figures (label, figure, remark) of the last main run that has any, in the paper's order the fullest."""
    name = charts.headline(params, results)
    measures = results[name].measures if name else {}
    control = results[params.control].measures if params.control in results else {}
    if MACRO_AUC in measures:
        yield "Mean zero-shot AUC", f"{100 * measures[MACRO_AUC].value:.1f}", f"{name}; chance 50"
    recall = MetricKey("mimic_cxr", "retrieval", "recall", direction="i2t", k=10)
    key = replace(recall, over_chance=True)
    if key in measures:
        queries = results[name].pools["mimic_cxr"]["queries"]
        remark = f"{name}; {100 * measures[recall].value:.1f} % of {queries:,} images"
        remark += f"; control {control[key].value:.1f}×" if key in control else ""
        yield "MIMIC-CXR R@10 over chance", f"{measures[key].value:.1f}×", remark
    accuracy = MetricKey("chexpert5x200", "zero_shot", "accuracy")
    if accuracy in measures:
        value = 100 * measures[accuracy].value
        yield "CheXpert5x200 accuracy", f"{value:.1f}", f"{name}; chance 20"
    archives = {facts(name).archive or name: s for name, s in summaries.items()}  # read twice, counted once
    written = sum(s.written_images for s in archives.values())
    if written:
        rejected = sum(s.rejected_images for s in archives.values())
        yield "Images ingested", f"{written:,}", f"{rejected:,} rejected, {len(archives)} archives"


def _control_line(row: ControlRow) -> dict[str, str | bool | None]:
    limits = ""
    if row.limits:
        low, high = (100 * x for x in row.limits)
        limits = f"{low:.0f}–{high:.0f}" if low else f"≤ {high:.1f}"
    low_high = (
        "—"
        if row.control.low is None or row.control.high is None
        else f"{100 * row.control.low:.1f}–{100 * row.control.high:.1f}"
    )
    return {
        "name": row.name,
        "chance": f"{100 * row.chance:.1f}",
        "control": f"{100 * row.control.value:.1f}",
        "interval": low_high,
        "limits": limits or "—",
        "at_chance": row.at_chance,
        "full": "—" if row.full is None else f"{100 * row.full.value:.1f}",
    }


def centre_square(image: np.ndarray) -> np.ndarray:
    """The centre square of a picture, uint8 [H, W] -> [S, S] with S = min(H, W)."""
    side = min(image.shape)
    y, x = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[y : y + side, x : x + side]


def _maps(
    params: Params,
    summaries: Mapping[str, Summary],
    names: Mapping[str, str],
    index: Path,
    path: Path,
    load: Loader,
) -> Iterator[dict[str, str]]:
    """Similarity maps of one run (``path``: its maps.npz) over the images that may be shown."""
    if not path.exists():
        return
    stored = load_arrays(path, "dvc repro -f embed")
    maps, places = stored["maps"], stored["position"].tolist()
    datasets, texts = stored["dataset"].tolist(), stored["text"].tolist()
    for heat, dataset, place, text in zip(maps, datasets, places, texts, strict=True):
        archive = source_of(dataset)
        summary = summaries.get(archive)
        if summary is None or not shown(params, summary):
            continue
        view = read_studies(index / f"{archive}.parquet", ("test",))[place].first_frontal
        picture = centre_square(load(view))  # what the encoder has seen of it, and so what the map covers
        yield {
            "image": figures.jpeg_uri(picture, SIDE),
            "map": figures.map_uri(picture, heat, SIDE),
            "dataset": names.get(dataset, dataset),
            "text": text,
            "range": f"{heat.min():.2f} to {heat.max():.2f}".replace("-", "−"),
        }


def _regenerated(
    params: Params, summaries: Mapping[str, Summary], names: Mapping[str, str], folder: Path
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Pictures of each run of ``evaluate.regeneration`` (its first training) that may be shown, ratio by ratio."""
    for name in params.evaluate.regeneration.runs:
        path = folder / name / f"{params.seeds[0]}.pictures.npz"
        if not path.exists():
            continue
        found = load_arrays(path, f"dvc repro -f regenerate@{name}-{params.seeds[0]}")
        rows = []
        for n in np.argsort(found["ratio"], kind="stable"):
            dataset = str(found["dataset"][n])
            if dataset not in summaries or not shown(params, summaries[dataset]):
                continue
            row = {key: figures.jpeg_uri(found[key][n], SIDE) for key in ("input", "masked", "without", "with")}
            row["difference"] = figures.difference_uri(found["difference"][n], SIDE)
            row |= {"dataset": names.get(dataset, dataset), "percent": f"{100 * found['ratio'][n]:.0f}"}
            rows.append(row | {"text": str(found["text"][n])})
        if rows:
            yield name, rows


def _examples(
    params: Params,
    summaries: Mapping[str, Summary],
    results: Mapping[str, RunResult],
    names: Mapping[str, str],
    index: Path,
    load: Loader,
) -> dict[str, Any]:
    """Retrieval examples of the last main run that has some, from the first data set that may be shown. Results name
    pictures and texts by their digests; the index has them."""
    for name in reversed([n for n in params.main if n in results]):
        for source in dict.fromkeys((*paired_tests(), *used_for("retrieval"))):
            dataset, summary = facts(source).test_set or source, summaries.get(source)
            found = results[name].examples.get(dataset, [])[:EXAMPLES]
            if not found or summary is None or not shown(params, summary):
                continue
            studies = read_studies(index / f"{source}.parquet", ("test",))
            views = {view.digest: view for study in studies for view in study.views}
            texts = {text_digest(t): t for s in studies for t in (s.findings, s.impression) if t}
            items = []
            for e in found:
                top = [{**t, "text": texts[t["text"]], "correct": t["text"] == e["text"]} for t in e["top"]]
                image = figures.jpeg_uri(load(views[e["image"]]), 2 * SIDE)
                items.append({"rank": e["rank"], "text": texts[e["text"]], "top": top, "image": image})
            pool = results[name].pools.get(dataset, {})
            return {"run": name, "dataset": names[dataset], "examples": items, "candidates": pool.get("candidates")}
    return {}


def _contact_sheet(
    params: Params, summaries: Mapping[str, Summary], names: Mapping[str, str], index: Path, load: Loader
) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """First frontal images of each data set that may be shown, with what is known of them: (data set, pictures)."""
    for dataset, summary in summaries.items():
        if not shown(params, summary) or not summary.written_images:
            continue
        pictures = []
        for study in _varied(index / f"{dataset}.parquet"):
            view = study.first_frontal
            picture = figures.jpeg_uri(load(view), SIDE)
            pictures.append({"image": picture, "position": view.position, "caption": _caption(study)})
        if pictures:
            yield names[dataset], pictures


def _varied(path: Path) -> list[Study]:
    """The first studies of the smallest split that differ in what they show: findings, or the text's first sentence."""
    for split in ("test", "valid", "train"):
        studies = [s for s in read_studies(path, (split,)) if s.first_frontal.position != "LATERAL"]
        if studies:
            break
    else:
        return []
    first: dict[str, Study] = {}
    for study in studies:
        first.setdefault(_caption(study), study)
    chosen = list(first.values())[:PER_DATASET]
    rest = [s for s in studies if s not in chosen]
    return (chosen + rest)[:PER_DATASET]


def _caption(study: Study) -> str:
    """A study's positive labels, or the first sentence of its impression (else of its findings)."""
    if study.labels:
        positive = [name for name, value in study.labels.items() if value == 1]
        text = ", ".join(positive) or "no positive label"
    else:
        text = re.sub(r"^\d+[.)]\s*", "", study.impression or study.findings or "no text")  # "1. Cardiomegaly. 2. ..."
        text = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return text if len(text) <= CAPTION else text[: CAPTION - 1].rstrip() + "…"


def _runs(params: Params, results: Mapping[str, RunResult]) -> list[tuple[str, str, str, str]]:
    """(run, image encoder, data sets, keys it sets otherwise) of the runs."""
    lines = []
    for name in (n for n in results if n in params.runs):
        run = params.runs[name]
        own = {
            f"{section}.{k}": v
            for section in ("sampling", "augment", "loss", "train")
            for k, v in getattr(run, section).items()
        }
        if run.prompts == "ablation":
            own["prompts"] = Path(params.prompts.ablation).name
        changed = ", ".join(
            f"{k}={yaml.safe_dump(v, default_flow_style=True).split(chr(10))[0]}" for k, v in own.items()
        )
        lines.append((name, run.image_encoder, ", ".join(run.datasets), changed or "—"))
    return lines


def _public(params: Params, summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """The parameters without places on the machine: archives by kind, absolute paths by their last part."""
    kinds = {d: "phantom" if s.phantom else "real" for d, s in summaries.items()}
    return {**without_places(asdict(params)), "sources": kinds}
