"""The keys of params.yaml that say where archives are and how they become shards, as records (see ``params``)."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config.records import MANY, RECORD, Count, Flag, Name, Positive, Purposes, Share, Texts, Whole


@dataclass(frozen=True, config=RECORD)
class Headings:
    """Headings of sections in another language than English, as they are written, without the colon: of findings and
    impressions, and of sections before and after these. Capitals and accents do not matter."""

    findings: Texts = ()
    impression: Texts = ()
    before: Texts = ()
    after: Texts = ()


@dataclass(frozen=True, config=RECORD)
class About:
    """What a data set of your own is, as nobody else knows (docs/own-data.md)."""

    name: str = ""  # for people; else the source's own
    captions: Literal["reports", "labels"] = "reports"  # what its texts for training are made of
    classes: Texts = ()  # of its labels, which are tested and probed
    patients: Flag = False  # whether a patient id is a person, so that the audit knows whom training has seen
    tests: Purposes = ()  # what its test images are for


@dataclass(frozen=True, config=RECORD)
class Source:
    """An archive: a folder, or an fsspec URL such as s3://bucket/folder.

    ``reader`` is the module of pipeline/ingest/sources that understands its layout; ``stamp`` a small file that DVC
    watches instead of the archive (``python -m stages.fingerprint`` writes one).
    """

    reader: Name
    path: str
    stamp: str
    split: Literal["paper", "patient", "official"] = "paper"  # patient: chestxray14, rsna, openi; official: NIH's
    reports: str = ""  # MIMIC-CXR: the report tree or mimic-cxr-reports.zip, where it is not below path
    list_5x200: str = ""  # CheXpert: chexpert_5x200.csv where it is not below path
    manifest: str = ""  # reader manifest: the CSV or Parquet file that lists the images, below path
    about: About = field(default_factory=About)  # of a data set of your own
    headings: Headings = field(
        default_factory=Headings
    )  # reader manifest: those of its reports, beside the English ones
    follow_links: Flag = False  # also read what symbolic links name outside of path
    present: Flag = False  # a partial download: images that its lists name and that are not there are left out


@dataclass(frozen=True, config=RECORD)
class Phantom:
    """Synthetic archives to draw: archive -> number of studies."""

    archives: dict[Name, Annotated[Whole, Field(ge=20, le=MANY)]]
    size: Annotated[Whole, Field(ge=64, le=1 << 14)] = 256  # pixels of the short side


@dataclass(frozen=True, config=RECORD)
class Ingest:
    """How archives become shards."""

    short_side: Annotated[Whole, Field(ge=16, le=MANY)] = 512
    jpeg_quality: Annotated[Whole, Field(ge=1, le=100)] = 95
    shard_size: Positive = 512
    workers: Count = 0  # local processes; 0 = one a core
    scheduler: str = ""  # address of a dask scheduler whose workers do the work instead
    target: str = ""  # URL under which the shards go; "" = data/shards
    labels_only: Flag = False
    max_rejected: Share = 0.05


@dataclass(frozen=True, config=RECORD)
class Audit:
    """The search for test images that training has seen."""

    min_correlation: Share = 0.8  # of two pictures' detail, from which on they are copies
    workers: Count = 0  # processes; 0 = one a core
