"""Study and View: the one record every stage handles.

A study flows one way: archive file -> ``Study`` -> shard -> batch -> embedding -> metric -> table cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

SPLITS = ("train", "valid", "test")
POSITIONS = ("PA", "AP", "FRONTAL", "LATERAL", "")  # FRONTAL: either of the first; "" = the archive does not say
FRONTAL = ("PA", "AP", "FRONTAL")
POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1  # a class that is not mentioned is absent from ``labels``


@dataclass(frozen=True, slots=True)
class View:
    """One image of a study.

    ``path`` (relative to the archive root) exists only between reader and ingest; shards and index never hold it.
    ``shard``/``offset``/``length`` address the encoded image inside an uncompressed tar; ``digest`` is the
    blake2b-64 of those bytes in hex, so that an index changes whenever a pixel does. ``width``/``height`` in pixels.
    """

    id: str
    position: str = ""
    path: str = ""
    shard: str = ""
    offset: int = -1
    length: int = 0
    width: int = 0
    height: int = 0
    digest: str = ""

    @property
    def frontal(self) -> bool:
        """Whether the archive says this is a PA or AP view, or one of them."""
        return self.position in FRONTAL


@dataclass(frozen=True, slots=True)
class Study:
    """One examination: its views, and either report sections or labels (or both).

    ``patient`` and ``study`` are the archive's own pseudonymous ids. ``findings``/``impression`` are cleaned text or
    ``None``, never an empty string. ``labels`` maps class name -> 1 positive, 0 negative, -1 uncertain.
    """

    dataset: str
    patient: str
    study: str
    split: str
    views: tuple[View, ...]
    findings: str | None = None
    impression: str | None = None
    labels: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"{self.dataset}: split {self.split!r} of a study is none of {SPLITS}")
        if self.findings == "" or self.impression == "":
            raise ValueError(f"{self.dataset}: an absent section is None, not an empty string")

    @property
    def first_frontal(self) -> View:
        """The view evaluation uses (paper section 4.1: one frontal image): the first frontal one, else the first of
        unknown position, else the first lateral one."""
        return min(self.views, key=lambda view: 0 if view.frontal else 1 if not view.position else 2)

    def with_views(self, views: Iterable[View]) -> Study:
        """The same study with other views."""
        return replace(self, views=tuple(views))


@dataclass(frozen=True, slots=True)
class Reject:
    """One thing of an archive that could not be used: ``item`` is a path inside the archive or a row's id,
    ``kind`` says what was lost (``image``: counts against the images found; ``row`` of a list: against its rows;
    ``study``; ``text``: a report of which nothing is used; ``file``: a pack or folder that cannot be read;
    ``unlisted``: an image that no list names; ``mended``: an image that is used, but not as its file says), and
    ``reason`` is one line without any content of the file.
    """

    dataset: str
    item: str
    kind: str
    reason: str


def truth_of(studies: Sequence[Study], cls: str) -> np.ndarray:
    """What the labels say of a class, int8 [N]: 1 positive, 0 negative, -1 neither, where a study is uncertain of it or
    does not mention it."""
    known = (NEGATIVE, POSITIVE)
    return np.array([value if (value := s.labels.get(cls)) in known else UNCERTAIN for s in studies], np.int8)
