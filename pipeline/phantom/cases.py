"""Planning: who is examined, which views are taken and what is wrong, before anything is drawn.

Findings are dealt from shuffled decks, so that a small archive still holds its share of each.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.phantom.anatomy import Patient, draw_patient
from pipeline.phantom.findings import Finding, compatible, draw_finding

EVERYTHING = {
    "cardiomegaly": 10,
    "pleural effusion": 10,
    "pneumothorax": 10,
    "consolidation": 8,
    "pneumonia": 13,
    "edema": 7,
    "atelectasis": 10,
    "nodule": 5,
    "mass": 5,
    "lung tumor": 9,
    "lung opacity": 5,
    "infiltration": 9,
    "rib fracture": 9,
    "support devices": 6,
    "emphysema": 4,
    "pulmonary fibrosis": 10,
    "ild": 10,
    "pleural thickening": 10,
    "hiatal hernia": 3,
    "aortic enlargement": 9,
    "calcification": 9,
    "mediastinal shift": 9,
    "tuberculosis": 9,
    "enlarged cardiomediastinum": 4,
}
# Findings that bring another along, and how often.
COMPANIONS = {
    "consolidation": ("pneumonia", 0.3),
    "pneumonia": ("consolidation", 0.2),
    "edema": ("pleural effusion", 0.3),
}


@dataclass(frozen=True)
class Case:
    """One planned examination: its number in the archive, its seed, the patient, the views and the findings.

    ``listed`` marks an examination of CheXpert5x200.
    """

    number: int
    seed: int
    patient: Patient
    views: tuple[str, ...]
    findings: tuple[Finding, ...]
    listed: bool = False

    def rng(self, purpose: str) -> np.random.Generator:
        """A generator for one purpose; the same whatever else is drawn."""
        return np.random.default_rng([self.seed, zlib.crc32(purpose.encode())])

    def view_seed(self, view: int) -> int:
        """Seed of what differs between the views."""
        return self.seed * 8 + view


def deck(weights: Mapping[str, int], rng: np.random.Generator) -> Iterator[str]:
    """Deal kinds for ever from shuffled decks that hold each as often as its weight says."""
    cards = [kind for kind, weight in weights.items() for _ in range(weight)]
    while True:
        yield from (cards[i] for i in rng.permutation(len(cards)))


def deal(dealer: Iterator[str], wanted: int, allowed: Sequence[str], rng: np.random.Generator) -> list[Finding]:
    """Deal up to ``wanted`` findings that can be drawn together."""
    present: list[Finding] = []
    held: list[str] = []
    for _ in range(60):
        if len(present) >= wanted:
            break
        kind = held.pop() if held else next(dealer)
        if not compatible(kind, present):
            continue
        present.append(draw_finding(kind, rng))
        partner, often = COMPANIONS.get(kind, ("", 0.0))
        if partner in allowed and rng.random() < often:
            held.append(partner)
            wanted = min(wanted + 1, 4)
    return present


def plan(
    archive: str,
    studies: int,
    seed: int,
    weights: Mapping[str, int],
    views: Mapping[tuple[str, ...], float],
    normal: float = 0.3,
) -> list[Case]:
    """Plan the examinations of one archive: about a share ``normal`` without findings, the others with 1 to 4.

    ``weights`` gives the kinds and how often each is dealt, ``views`` the sets of views and their shares.
    """
    rng = np.random.default_rng([seed, zlib.crc32(archive.encode())])
    dealer = deck(weights, rng)
    sets, shares = list(views), np.array(list(views.values()))
    cases = []
    for number in range(studies):
        wanted = 0 if rng.random() < normal else int(rng.choice([1, 2, 3, 4], p=[0.35, 0.35, 0.2, 0.1]))
        findings = deal(dealer, wanted, list(weights), rng)
        taken = sets[int(rng.choice(len(sets), p=shares / shares.sum()))]
        cases.append(Case(number, int(rng.integers(2**40)), draw_patient(rng), taken, tuple(findings)))
    return cases


def only(kinds: Sequence[str]) -> dict[str, int]:
    """The usual weights, for some kinds."""
    return {k: EVERYTHING[k] for k in kinds}
