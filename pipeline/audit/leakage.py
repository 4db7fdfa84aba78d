"""Pairs of copies -> which test images a training set has already shown, as copies or as other images of the patient.

An image takes part in a *group*: itself, its copies, theirs, and so on. A *person* is a patient id of an archive whose
ids mean a person; through its group an image inherits the persons of its copies. That is how an image of RSNA or SIIM,
drawn from ChestX-ray14 and given new names, gets its ChestX-ray14 patient back.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from pipeline.audit.copies import AuditImage
from pipeline.datasets import Table, facts, known_datasets, tested, used_for
from pipeline.storage.parquet import read_table, write_table
from pipeline.storage.printed import csv_row, markdown
from pipeline.study import SPLITS

SEEN_SPLITS = ("train", "valid")
SEEN_SCHEMA = pa.schema(
    [(n, pa.string()) for n in ("dataset", "patient", "study", "view", "training_set", "training_split", "how")]
)
Person = tuple[str, str]  # data set and patient id
ImageId = tuple[str, str, str, str]  # data set, patient, study, view


def datasets_in_order(datasets: Iterable[str]) -> list[str]:
    """Data sets in the order of ``datasets.yaml``; after them a user's own, by name."""
    known = list(known_datasets())
    return sorted(datasets, key=lambda name: (known.index(name) if name in known else len(known), name))


def image_id(image: AuditImage) -> ImageId:
    """What names an image: data set, patient, study and view (CheXpert counts studies and views of each patient)."""
    return image.dataset, image.patient, image.study, image.view.id


def read_pairs(path: Path) -> list[tuple[ImageId, ImageId]]:
    """The two ends of every pair that ``copies.find_pairs`` wrote, in its order."""
    ends = [[f"{name}_{side}" for name in ("dataset", "patient", "study", "view")] for side in "ab"]
    pairs = read_table(path, ends[0] + ends[1]).to_pydict()
    a, b = (list(zip(*(pairs[name] for name in side), strict=True)) for side in ends)
    return list(zip(a, b, strict=True))


def groups(images: Sequence[AuditImage], pairs: Iterable[tuple[ImageId, ImageId]]) -> list[int]:
    """The group of every image: the position of its first member (union-find; Galler and Fischer 1964).

    Raises:
        ValueError: a pair names an image that is not among ``images`` (it is of another index).
    """
    place = {image_id(image): n for n, image in enumerate(images)}
    first = list(range(len(images)))

    def find(n: int) -> int:
        while first[n] != n:
            first[n] = first[first[n]]
            n = first[n]
        return n

    for a, b in pairs:
        if a not in place or b not in place:
            raise ValueError("the pairs name an image that the index does not hold; run the audit again")
        one, other = sorted((find(place[a]), find(place[b])))
        first[other] = one
    return [find(n) for n in range(len(images))]


def persons(images: Sequence[AuditImage], group: Sequence[int], table: Table | None = None) -> list[frozenset[Person]]:
    """Whose pictures are in each image's group: its own patient and those of its copies, where ids mean a person.

    The transitive rule: an image without a patient id of its own (RSNA, SIIM, VinDr-CXR, Open-I) is of the persons its
    copies are of. Empty where nothing is known, which does not mean that nobody is shared.
    """
    known: dict[int, set[Person]] = defaultdict(set)
    for image, number in zip(images, group, strict=True):
        if facts(image.dataset, table).patient_ids:
            known[number].add((image.dataset, image.patient))
    frozen = {number: frozenset(several) for number, several in known.items()}
    return [frozen.get(number, frozenset()) for number in group]


def seen(images: Sequence[AuditImage], group: Sequence[int], table: Table | None = None) -> list[dict[str, str]]:
    """One row (``SEEN_SCHEMA``) for each test image, data set and part of it (train, valid) that has shown it.

    ``how`` is ``duplicate`` where a copy of the image is there, else ``patient`` where another image of one of its
    persons is. Rows in the order of the images, then of ``datasets_in_order``.
    """
    people = persons(images, group, table)
    shown: dict[tuple[str, str], tuple[set[int], set[Person]]] = {}
    for image, number, whose in zip(images, group, people, strict=True):
        if image.split in SEEN_SPLITS:
            copies, patients = shown.setdefault((image.dataset, image.split), (set(), set()))
            copies.add(number)
            patients |= whose
    rows = []
    places = [(d, s) for d in datasets_in_order({d for d, _ in shown}) for s in SEEN_SPLITS if (d, s) in shown]
    for image, number, whose in zip(images, group, people, strict=True):
        if image.split != "test":
            continue
        for dataset, split in places:
            copies, patients = shown[dataset, split]
            if number in copies or not whose.isdisjoint(patients):
                how = "duplicate" if number in copies else "patient"
                row = (*image_id(image), dataset, split, how)
                rows.append(dict(zip(SEEN_SCHEMA.names, row, strict=True)))
    return rows


def write_seen(path: Path, rows: list[dict[str, str]]) -> None:
    """Write what ``seen`` returned as Parquet."""
    write_table(path, pa.Table.from_pylist(rows, schema=SEEN_SCHEMA))


def across_splits(images: Iterable[AuditImage], table: Table | None = None) -> dict[str, dict[str, int] | str]:
    """For each data set, in how many pairs of splits patients stand: "train/test" -> number of patient ids in both.

    ``unknown`` for a data set whose ids do not mean a person.
    """
    splits: dict[str, dict[str, set[str]]] = {}
    for image in images:
        splits.setdefault(image.dataset, {s: set() for s in SPLITS})[image.split].add(image.patient)
    both = [(a, b) for n, a in enumerate(SPLITS) for b in SPLITS[n + 1 :]]
    return {
        dataset: {f"{a}/{b}": len(of[a] & of[b]) for a, b in both} if facts(dataset, table).patient_ids else "unknown"
        for dataset, of in splits.items()
    }


def leakage_table(
    images: Sequence[AuditImage], rows: Sequence[dict[str, str]], table: Table | None = None
) -> pd.DataFrame:
    """Counts of ``seen`` rows, one line for each test set, training set and part of it that the index holds.

    Columns: ``test_set``, ``training_set``, ``training_split``, ``own`` (both are one data set), ``images`` (of the
    test set), ``duplicates``, ``patients`` (images whose patient was seen, not the image), ``patients_known``: ``yes``
    where the ids of both sides can be compared; ``through copies``, where only images with a copy in an archive of
    patient ids could be, so that ``patients`` is a lower bound.
    """
    tests: dict[str, int] = defaultdict(int)
    there: set[tuple[str, str]] = set()
    for image in images:
        there.add((image.dataset, image.split))
        tests[image.dataset] += image.split == "test"
    counted: dict[tuple[str, ...], int] = defaultdict(int)
    for row in rows:
        counted[row["dataset"], row["training_set"], row["training_split"], row["how"]] += 1
    lines: list[dict[str, Any]] = []
    own_sets = datasets_in_order(tests.keys() - known_datasets().keys())
    trainings = (*used_for("pretraining"), *own_sets)
    known_tests = sorted(tested(), key=lambda name: name in trainings)  # first those that nothing is trained on
    for test in (t for t in (*known_tests, *own_sets) if tests[t]):
        for training in (*(d for d in trainings if d != test), test):
            for split in (s for s in SEEN_SPLITS if (training, s) in there):
                own = training == test
                lines.append(
                    {
                        "test_set": test,
                        "training_set": training,
                        "training_split": split,
                        "own": own,
                        "images": tests[test],
                        "duplicates": counted[test, training, split, "duplicate"],
                        "patients": counted[test, training, split, "patient"],
                        "patients_known": "yes" if own and facts(test, table).patient_ids else "through copies",
                    }
                )
    columns = ("test_set", "training_set", "training_split", "own")
    return pd.DataFrame(lines, columns=[*columns, "images", "duplicates", "patients", "patients_known"])


def leakage_csv(frame: pd.DataFrame) -> str:
    """The file leakage.csv: the table as it is, safe to open in a spreadsheet."""
    safe = pd.DataFrame([csv_row(line) for line in frame.astype(object).to_numpy().tolist()], columns=frame.columns)
    return str(safe.to_csv(index=False, lineterminator="\n"))


def cell(line: dict[str, Any]) -> str:
    """A line of ``leakage_table`` in words: "3 copies, 12 by patient"; "≥" or "unknown" if ids cannot be compared."""
    if line["patients_known"] == "yes":
        patients = f"{line['patients']} by patient"
    else:
        patients = f"≥ {line['patients']} by patient" if line["patients"] else "patients unknown"
    return f"{line['duplicates']} copies, {patients}"


def leakage_markdown(frame: pd.DataFrame, counts: dict[str, int], splits: dict[str, dict[str, int] | str]) -> str:
    """The page reports/leakage.md: a table for each part, what was searched, and patients across splits."""
    lines = ["# Test images that a training set has already shown", ""]
    evaluated = {d for d in frame["test_set"] if "pretraining" not in facts(d).uses}
    trainings = [d for d in datasets_in_order(set(frame["training_set"])) if d not in evaluated]
    lines += [
        "Copies are found from pixels; *by patient* counts further test images whose patient the training set has "
        "shown. *Patients unknown*: no ids that could be compared. Method and limits: docs/leakage.md.",
    ]
    for split in SEEN_SPLITS:
        part = frame[frame["training_split"] == split]
        cells: dict[str, dict[str, str]] = {}
        for line in part.to_dict("records"):
            of_test = cells.setdefault(f"{markdown(line['test_set'])} ({line['images']:,})", {})
            text = cell({str(k): v for k, v in line.items()})
            if line["own"]:
                of_test["own"] = text
            if line["training_set"] in trainings:
                of_test[line["training_set"]] = text
        columns = [*(d for d in trainings if any(d in of for of in cells.values())), "own"]
        heads = " | ".join(["test set (images)", *map(markdown, columns)])
        lines += ["", f"## Seen in the {split} split of", "", f"| {heads} |"]
        lines += ["|---" * (len(columns) + 1) + "|"]
        lines += [f"| {name} | " + " | ".join(of.get(c, "—") for c in columns) + " |" for name, of in cells.items()]
    lines += ["", "## What was searched", "", "| " + " | ".join(counts) + " |", "|---" * len(counts) + "|"]
    lines += ["| " + " | ".join(f"{n:,}" for n in counts.values()) + " |"]
    lines += ["", "## Patients in two splits of one data set", ""]
    for dataset, of in splits.items():
        text = of if isinstance(of, str) else ", ".join(f"{name} {n}" for name, n in of.items())
        lines.append(f"- {markdown(dataset)}: {text}")
    return "\n".join(lines) + "\n"
