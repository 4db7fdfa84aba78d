"""Stage ``audit``: data/index and data/shards -> data/audit: pairs, seen images, summary, leakage.{md,csv}."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.audit import leakage
from pipeline.audit.copies import find_pairs, images_of
from pipeline.config.settings import AuditSettings, load_machine, read_settings
from pipeline.datasets import with_own
from pipeline.storage.atomic import write_text
from pipeline.storage.index import read_studies
from pipeline.tracking import mlflow_runs
from stages import run


def main() -> None:
    settings, machine = read_settings(AuditSettings, "audit"), load_machine()
    out, table = Path("data/audit"), with_own(settings.own)
    with mlflow_runs.stage_run("audit", "all", settings, machine.tracking) as record:
        files = [Path("data/index") / f"{name}.parquet" for name in leakage.datasets_in_order(settings.sources)]
        images = [image for file in files if file.is_file() for image in images_of(read_studies(file))]
        counts = find_pairs(images, out / "pairs.parquet", settings.min_correlation, machine.audit_workers, table)
        group = leakage.groups(images, leakage.read_pairs(out / "pairs.parquet"))
        rows, splits = leakage.seen(images, group, table), leakage.across_splits(images, table)
        leakage.write_seen(out / "seen.parquet", rows)
        found = leakage.leakage_table(images, rows, table)
        summary = {**counts, "seen": len(rows), "patients_across_splits": splits}
        write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_text(out / "leakage.csv", leakage.leakage_csv(found))
        write_text(out / "leakage.md", leakage.leakage_markdown(found, counts, splits))
        record.metrics({name: float(n) for name, n in counts.items()})
        record.metrics({"seen": float(len(rows))})
        record.artifact(out / "leakage.md")
    print(f"audit: {counts['images']:,} images, {counts['pairs']:,} pairs of copies; see {out / 'leakage.md'}")


if __name__ == "__main__":
    run("audit", main)
