"""Stage ``audit``: data/index and data/shards -> data/audit (pairs, seen, summary) and reports/leakage.{md,csv}."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline.audit import leakage
from pipeline.audit.copies import find_pairs, images_of
from pipeline.config.load import load_params
from pipeline.storage.index import read_studies
from pipeline.storage.pictures import ImageError
from pipeline.storage.shards import ShardError
from pipeline.tracking import mlflow_runs


def main() -> None:
    params = load_params()
    out, reports = Path("data/audit"), Path("reports")
    with mlflow_runs.stage_run("audit", "all", params.audit, params.tracking.enabled) as record:
        files = [Path("data/index") / f"{name}.parquet" for name in leakage.datasets_in_order(params.sources)]
        images = [image for file in files if file.is_file() for image in images_of(read_studies(file))]
        counts = find_pairs(images, out / "pairs.parquet", params.audit.min_correlation, params.audit.workers)
        group = leakage.groups(images, leakage.read_pairs(out / "pairs.parquet"))
        rows, splits = leakage.seen(images, group), leakage.across_splits(images)
        leakage.write_seen(out / "seen.parquet", rows)
        found = leakage.leakage_table(images, rows)
        summary = {**counts, "seen": len(rows), "patients_across_splits": splits}
        (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        reports.mkdir(exist_ok=True)
        found.to_csv(reports / "leakage.csv", index=False, lineterminator="\n")
        (reports / "leakage.md").write_text(leakage.leakage_markdown(found, counts, splits), encoding="utf-8")
        record.metrics({name: float(n) for name, n in counts.items()})
        record.metrics({"seen": float(len(rows))})
        record.artifact(reports / "leakage.md")
    print(f"audit: {counts['images']:,} images, {counts['pairs']:,} pairs of copies; see {reports}/leakage.md")


if __name__ == "__main__":
    try:
        main()
    except (ShardError, ImageError, ValueError) as error:
        sys.exit(f"audit: {error}")
