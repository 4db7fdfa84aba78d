"""VinDr-CXR (Nguyen et al. 2022; PhysioNet)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pipeline.ingest.sources import archive
from pipeline.ingest.sources.archive import Archive
from pipeline.ingest.sources.named_images import images_by_stem
from pipeline.ingest.sources.tables import image_rows, parse_label
from pipeline.study import Reject, Study, View


def read_vindr_cxr(files: Archive) -> Iterator[Study | Reject]:
    """One study an image. Train images have three readers' rows: a class is positive where any reader says so.

    The official train images, in order of their id, are split 80 / 20 into train and valid; the official test set is
    the test split (paper Table 1: 12,000 / 3,000 / 3,000). The archive gives no patient: an image is its own.

    Raises:
        SourceError: a label file is missing.
    """
    labels: dict[str, dict[str, dict[str, int]]] = {}
    for part in ("train", "test"):
        file = archive.required_table(files, [f"image_labels_{part}.csv"])
        labels[part] = {}
        bad: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for row in image_rows(files, file, ["image_id"]):
            image = row["image_id"]
            rows[image] += 1
            try:
                values = {name: parse_label(cell) for name, cell in row.items() if name not in ("image_id", "rad_id")}
            except ValueError:
                bad[image] += 1
                continue
            if any(value not in (0, 1) for value in values.values()):
                bad[image] += 1
                continue
            known = labels[part].setdefault(image, {})
            for name, value in values.items():
                known[name] = max(known.get(name, 0), value or 0)
        for image in sorted(bad):
            # A reader's row that cannot be read might have held the finding, so the image's label is unknown.
            labels[part].pop(image, None)
            for _ in range(rows[image]):
                yield Reject("vindr_cxr", image, "row", "a label is neither 1 nor 0, in this row or another reader's")
    on_disk = images_by_stem(files)
    train = sorted(labels["train"])
    splits = [*zip(train, archive.train_valid(len(train)), strict=True), *((i, "test") for i in labels["test"])]
    for image, split in splits:
        view = View(id=image, path=on_disk.get(image, ""))
        of_image = labels["test" if split == "test" else "train"][image]
        yield Study("vindr_cxr", image, image, split, (view,), labels=of_image)
