"""Stage ``tables``: counts, metrics and curves -> reports/: table*.{md,csv,tex}, metrics.json, plots/, index.html."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from pipeline.config.load import load_params
from pipeline.config.params import Report
from pipeline.reporting import charts, formats, page, tables
from pipeline.reporting.results import headline_metrics, load_results, load_summaries
from pipeline.storage.atomic import write_text
from pipeline.storage.shards import load_view
from pipeline.tracking import mlflow_runs
from stages import run

INDEX, RESULTS, AUDIT, OUT = Path("data/index"), Path("data/results"), Path("data/audit"), Path("reports")
WITH_PATIENTS = Path("data/page_with_patients.html")  # where git, DVC and MLflow do not look


def main() -> None:
    params = load_params()
    with mlflow_runs.stage_run("tables", "all", params=params, enabled=params.tracking.enabled, send=True) as record:
        summaries = load_summaries(INDEX, params.sources)
        results, missing = load_results(
            *(RESULTS, params.runs, params.main, params.others, params.seeds),
            confidence=params.evaluate.bootstrap.confidence,
            official=params.evaluate.official.runs,
            regeneration=params.evaluate.regeneration.runs,
        )
        sys.stderr.writelines(f"tables: {path}: not found, so its figures are missing\n" for path in missing)
        built, phantom = tables.build_tables(params, summaries, results), tables.phantoms(summaries)
        written = formats.write_tables(OUT, built, metrics := headline_metrics(results), phantom)
        written += charts.write_plots(OUT / "plots", params, results)
        written += [write_text(OUT / n, (AUDIT / n).read_text(encoding="utf-8")) for n in ("leakage.md", "leakage.csv")]
        pages = {OUT / "index.html": replace(params, report=Report(show_patient_data=False))}
        if params.report.show_patient_data and len(phantom) < len(summaries):
            pages[WITH_PATIENTS] = params
            print(f"tables: {WITH_PATIENTS} shows patients: not for git", file=sys.stderr)
        for place, shown in pages.items():
            html = page.render_page(shown, tables.shown(built), summaries, results, missing, INDEX, load_view)
            write_text(place, html)
        record.metrics({f"{name}.{key}": value for name, values in metrics.items() for key, value in values.items()})
        record.artifacts([*written, OUT / "index.html"])
    print("\n".join(formats.table_markdown(t, phantom) for t in tables.shown(built) if t.number[0] != "S"))


if __name__ == "__main__":
    run("tables", main)
