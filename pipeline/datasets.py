"""What is known of each data set: ``datasets.yaml`` as records, and the questions that the steps ask of them.

Every function takes a table (data set -> ``Dataset``): that of ``datasets.yaml`` unless another one is given, such as
``datasets_of``'s, which holds the user's own data sets, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, Protocol

import yaml
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

DATASETS_FILE = Path(__file__).with_suffix(".yaml")
MANIFEST = "manifest"  # the reader of a user's own archives
OWN = "it is your own"  # how to get those

Split = Literal["paper", "patient", "official"]
Use = Literal[
    "pretraining",
    "classification",
    "binary_classification",
    "official_classification",
    "own_classification",
    "retrieval",
]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Dataset:
    """The facts of one data set; the head of ``datasets.yaml`` says what each means."""

    name: str
    reader: str
    access: str
    text: Literal["reports", "labels", "both"]
    captions: Literal["reports", "labels"]
    uses: tuple[Use, ...]
    short: str = ""
    archive: str = ""
    splits: tuple[Split, ...] = ("paper",)
    all_test: tuple[Split, ...] = ()
    classes: tuple[str, ...] = ()
    patient_ids: bool = False
    random_negatives: bool = False
    test_set: str = ""
    test_name: str = ""

    @property
    def captioned(self) -> bool:
        """Whether its texts for training are made from labels, through prompts."""
        return "pretraining" in self.uses and self.captions == "labels"


Table = Mapping[str, Dataset]


class Description(Protocol):
    """What a user says of a data set of his own (``config.archive_params.About``)."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def captions(self) -> Literal["reports", "labels"]:
        """What its texts for training are made of."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Of its labels."""

    @property
    def patients(self) -> bool:
        """Whether a patient id is a person."""

    @property
    def tests(self) -> tuple[str, ...]:
        """What its test images are for."""


class Described(Protocol):
    """An entry of ``sources``, of which only the reader and the description matter here."""

    @property
    def reader(self) -> str:
        """The module that reads the archive."""

    @property
    def about(self) -> Description:
        """What the user says of it."""


@cache
def known_datasets() -> Table:
    """``datasets.yaml``, in its order."""
    raw = yaml.safe_load(DATASETS_FILE.read_text(encoding="utf-8"))
    whole = {name: {**raw.get(entry.get("archive"), {}), **entry} for name, entry in raw.items()}
    return TypeAdapter(dict[str, Dataset]).validate_python(whole)


def _given(table: Table | None) -> Table:
    return known_datasets() if table is None else table


def facts(name: str, table: Table | None = None) -> Dataset:
    """What is known of a data set. One that is not in the table is a user's own: reports to train on, and no more."""
    return _given(table).get(name) or Dataset(name, MANIFEST, OWN, "both", "reports", ("pretraining",))


def own_datasets(sources: Mapping[str, Described]) -> dict[str, Dataset]:
    """The data sets among ``sources`` that are the user's own, as he describes them."""
    return {name: _described(name, source.about) for name, source in sources.items() if name not in known_datasets()}


def _described(name: str, about: Description) -> Dataset:
    uses: list[Use] = ["pretraining"]
    uses += ["own_classification"] if "classification" in about.tests else []
    uses += ["retrieval"] if "retrieval" in about.tests else []
    found = Dataset(about.name or name, MANIFEST, OWN, "both", about.captions, tuple(uses))
    return replace(found, classes=about.classes, patient_ids=about.patients)


def datasets_of(sources: Mapping[str, Described]) -> Table:
    """The known data sets and the user's own among ``sources``.

    A known data set that the user lists in a manifest keeps what it is used for; its splits are the manifest's.
    """
    listed = {
        name: replace(facts(name), reader=MANIFEST, access=OWN, splits=("paper",), all_test=())
        for name, source in sources.items()
        if source.reader == MANIFEST and name in known_datasets()
    }
    return {**known_datasets(), **listed, **own_datasets(sources)}


def with_own(own: Table) -> Table:
    """The known data sets and a user's own."""
    return {**known_datasets(), **own}


def used_for(use: Use, table: Table | None = None) -> tuple[str, ...]:
    """The data sets with this use, in the table's order."""
    return tuple(name for name, found in _given(table).items() if use in found.uses)


def captioned(table: Table | None = None) -> tuple[str, ...]:
    """The data sets whose texts for training are made from labels."""
    return tuple(name for name, found in _given(table).items() if found.captioned)


def archives(table: Table | None = None) -> tuple[str, ...]:
    """The data sets with an archive of their own: those that are not another's read once more."""
    return tuple(name for name, found in _given(table).items() if not found.archive)


def tested(table: Table | None = None) -> tuple[str, ...]:
    """The data sets whose test images are evaluated."""
    return tuple(name for name, found in _given(table).items() if {*found.uses} - {"pretraining"})


def paired_tests(table: Table | None = None) -> tuple[str, ...]:
    """The retrieval sets in which every image has a report of its own, which CheXpert5x200 is not."""
    return tuple(name for name in used_for("retrieval", table) if facts(name, table).text == "reports")


def display_names(table: Table | None = None) -> dict[str, str]:
    """Names for people of data sets, then of test sets that are called otherwise than their data set."""
    found = _given(table)
    return {name: d.name for name, d in found.items()} | {d.test_set: d.test_name for d in found.values() if d.test_set}


def source_of(test_set: str, table: Table | None = None) -> str:
    """The data set whose test images a test set is made of: its own name, unless the table says otherwise."""
    return next((name for name, found in _given(table).items() if found.test_set == test_set), test_set)
