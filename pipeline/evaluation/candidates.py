"""Retrieval's candidate texts: which text is a study's own, and the distinct ones of a test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.protocols import RetrievalSet
from pipeline.study import NEGATIVE, POSITIVE, UNCERTAIN, Study
from pipeline.text.prompts import NO_FINDING
from pipeline.text.translations import text_hash


@dataclass(frozen=True)
class CandidateTexts:
    """Distinct texts in order of first appearance; ``queries`` are the studies (by position) that take part and
    ``targets`` the text of each."""

    texts: list[str]
    queries: list[int]
    targets: np.ndarray


def report_text(study: Study, rule: RetrievalSet) -> str | None:
    """The longest of the texts that the rule names, the first named of equally long ones; None where all lack."""
    sections = {"findings": study.findings, "impression": study.impression, "labels": label_text(study)}
    return max((sections[name] or "" for name in rule.text), key=len) or None


def label_text(study: Study) -> str | None:
    """The names of the positive classes; "No Finding" where all that are known are negative; None where none is known
    or one is uncertain."""
    found = dict(study.labels)
    normal = found.pop(NO_FINDING, POSITIVE if found else NEGATIVE) == POSITIVE and UNCERTAIN not in found.values()
    positive = [name for name, value in found.items() if value == POSITIVE]
    return ", ".join(positive) or (NO_FINDING if normal else None)


def text_digest(text: str) -> str:
    """What results name a text by, in hex; they are looked at and passed on, and the text stays in the index."""
    return f"{text_hash(text):016x}"


def candidate_texts(studies: Sequence[Study], rule: RetrievalSet) -> CandidateTexts:
    """Deduplicate the texts of test studies. A study without a text, or with lateral views only, takes no part."""
    texts: dict[str, int] = {}
    queries, targets = [], []
    for i, study in enumerate(studies):
        text = report_text(study, rule)
        if text is None or all(v.position == "LATERAL" for v in study.views):
            continue
        queries.append(i)
        targets.append(texts.setdefault(text, len(texts)))
    return CandidateTexts(list(texts), queries, np.array(targets, dtype=np.int64))
