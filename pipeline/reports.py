"""Report text -> findings and impression.

The rules, in one place:

* A section starts at a heading at the start of a line, ending in a colon (or alone on its line), in any case.
* Heading spellings are matched by likeness, so IMPRESSON or FINDNGS count; CONCLUSION and SUMMARY are impressions. A
  heading that names both (FINDINGS AND IMPRESSION) gives findings: in both, it would be a pair of equal texts.
* A heading that only describes the images (CHEST, TWO VIEWS:) opens findings where no heading says FINDINGS.
* Headings of other sections (INDICATION, COMPARISON ...) end a section; headings inside one (LUNGS:) belong to it.
* A section that comes twice (an addendum) is joined in order, repeats left out.
* De-identification blanks, ``___`` in MIMIC-CXR and ``XXXX`` in Open-I, are removed (x-XXXX is x-ray), with the
  punctuation they leave behind. A text with no word left is absent: ``None``, never an empty string.
* A report without any heading has neither section: which of its paragraphs is what, nobody said.
"""

from __future__ import annotations

import difflib
import re
from functools import lru_cache
from operator import or_

HEADING = re.compile(r"^[ \t]*([A-Za-z][A-Za-z0-9 \t/,&()'.\-]{1,70}?)[ \t]*(?:(?<!\d):|:(?!\d))", re.ASCII)
BARE_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /&()]{3,40})[ \t]*$")
IMPRESSION = ("IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "SUMMARY", "IMP", "OPINION")
QUALIFIERS = (
    "AND",
    "OR",
    "THE",
    "OF",
    "FINAL",
    "RADIOGRAPHIC",
    "TWO",
    "RECOMMENDATION",
    "RECOMMENDATIONS",
    "PLAN",
    "S",
)
FINDINGS = ("FINDINGS", "FINDING", "FIND", "REPORT")
# First words of headings that end a section.
OTHER = re.compile(
    r"(FINAL REPORT|FINAL ADDENDUM|ADDENDUM|WET READ|PRELIMINARY|EXAM|EXAMINATION|STUDY|PROCEDURE|TYPE OF|REASON|"
    r"INDICATION|HISTORY|CLINICAL|PATIENT|MEDICAL|COMPARISON|COMPARED|REFERENCE|PRIOR|TECHNIQUE|METHOD|PROTOCOL|NOTIFICATION|"
    r"RECOMMENDATION|ATTESTATION|COMMUNICATION|DISCUSSED|DICTATED|ELECTRONIC|SIGNED|DATE|TIME|OPERATORS?|CONTRAST|"
    r"DOSE|DIAGNOSIS|REFERRING|REQUEST|ORDER|LAST|ICD|CPT)\b"
)
VIEWS = re.compile(r"\b(CHEST|VIEWS?|RADIOGRAPHS?|PORTABLE|PA|AP|LATERAL|FRONTAL)\b")
LIKENESS = 0.82  # difflib ratio; IMPRESSON 0.95, IMPESSION 0.95, FINDNGS 0.93, against FILLINGS 0.75

BLANK = re.compile(r"_{2,}|\bX{3,}\b")
X_RAY = re.compile(r"\b([Xx])[- ]X{3,}(?:-?X{3,})*\b")
RULE = re.compile(r"[-=*]{3,}")
SPACE = re.compile(r"\s+")
BEFORE_POINT = re.compile(r"\s+([.,;:!?)])")
AFTER_BRACKET = re.compile(r"\(\s+")
EMPTY_BRACKETS = re.compile(r"\(\s*[.,;:/-]*\s*\)")
TWO_POINTS = re.compile(r"(?<!\.)\.\s?\.(?!\.)")
POINTS = re.compile(r"([,;:])(?:\s*[,;:])*\s*([.,;:])")
LEADING = re.compile(r"^[\s.,;:)\-]+")
WORD = re.compile(r"[A-Za-z]{2,}")


def clean(text: str) -> str | None:
    """One line of text without blanks, rules and stray points, or ``None`` where no word of two letters is left."""
    text = "".join(c if c.isprintable() or c.isspace() else " " for c in text)
    text = X_RAY.sub(r"\1-ray", text)
    text = RULE.sub(" ", BLANK.sub(" ", text))
    text = EMPTY_BRACKETS.sub(" ", text)
    text = AFTER_BRACKET.sub("(", BEFORE_POINT.sub(r"\1", SPACE.sub(" ", text)))
    text = TWO_POINTS.sub(".", POINTS.sub(r"\2", text))
    text = LEADING.sub("", text).strip()
    return text if WORD.search(text) else None


def sections(report: str) -> tuple[str | None, str | None]:
    """Findings and impression of a free-text report (MIMIC-CXR), cleaned; ``None`` where absent."""
    parts: dict[str, list[str]] = {"findings": [], "impression": [], "views": [], "other": []}
    current = "other"
    opened: list[str] = []
    for line in report.splitlines():
        kind, rest = _heading(line)
        if kind and not (kind == "views" and current in ("findings", "impression")):
            if opened:
                parts[current].append("\n".join(opened))
            current, opened = kind, [rest]
        else:
            opened.append(line)
    parts[current].append("\n".join(opened))
    findings = _join(parts["findings"]) or _join(parts["views"])
    return findings, _join(parts["impression"])


def _join(texts: list[str]) -> str | None:
    cleaned = dict.fromkeys(text for text in map(clean, texts) if text)
    return " ".join(cleaned) or None


def _heading(line: str) -> tuple[str, str]:
    """What a line opens ("" = nothing), and its text after the heading."""
    match = HEADING.match(line)
    if match:
        name = match.group(1)
        kind = _kind(" ".join(re.sub(r"[^A-Za-z]+", " ", name).split()).upper())
        # A sentence may hold a colon, too: only shouted or single-purpose headings count for the loose kinds.
        if kind in ("findings", "impression") or (kind and (name.isupper() or len(name.split()) <= 3)):
            return kind, line[match.end() :]
        return "", line
    match = BARE_HEADING.match(line)
    if match:
        kind = _kind(" ".join(re.sub(r"[^A-Z]+", " ", match.group(1)).split()))
        if kind in ("findings", "impression", "other"):
            return kind, ""
    if re.match(r"^[ \t]*(FINAL REPORT|FINAL ADDENDUM|WET READ)\b", line):
        return "other", ""
    return "", line


@lru_cache(maxsize=4096)
def _kind(name: str) -> str:
    """findings, impression, views, other, or "" for a heading inside a section. ``name``: upper case words."""
    if OTHER.match(name):
        return "other"
    words = [word for word in name.split() if word not in QUALIFIERS and not VIEWS.fullmatch(word)]
    findings = [_like(word, FINDINGS) for word in words]
    impression = [_like(word, IMPRESSION) for word in words]
    if words and all(map(or_, findings, impression)):  # a sentence that merely begins with "findings" has other words
        return "findings" if any(findings) else "impression"
    return "views" if VIEWS.search(name) else ""


def _like(word: str, names: tuple[str, ...]) -> bool:
    if word in names:
        return True
    return len(word) >= 6 and any(difflib.SequenceMatcher(None, word, n).ratio() >= LIKENESS for n in names)
