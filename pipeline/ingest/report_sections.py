"""Report text -> findings and impression.

The rules, in one place; docs/reports.md has them case by case, beside those of the parser most papers use:

* A section starts at a heading at the start of a line, ending in a colon (or alone on its line), in any case. The plain
  names of sections count inside a line, too, in capitals with a colon after a full stop or the like.
* Findings and impressions are also found under slips of the pen: one letter added, left out, swapped or wrong, two
  left out, any letter doubled (IMPRESSON, FIDINGS). CONCLUSION and SUMMARY are impressions. A heading that names both
  (FINDINGS AND IMPRESSION) gives findings: in both, it would be a pair of equal texts.
* A heading may have a bullet, a number, ``#`` or brackets around it (2. IMPRESSION:, [FINDINGS], # Findings).
* Who dictated or signed a report is no part of it: such a line, or sentence, ends what is above it.
* A heading that only describes the images (CHEST, TWO VIEWS:) opens findings where no heading says FINDINGS.
* Headings of other sections (INDICATION, COMPARISON ...) end a section; headings inside one (LUNGS:) belong to it.
* A section that comes twice (an addendum) is joined in order, repeats left out.
* Without either section, the paragraphs that no heading claims are the findings: those after the first paragraph of
  the last section that has more than one, or all but the title where there is no heading. Where there are none, a
  COMPARISON of two sentences or more is: some reports are written there. Wet reads and addenda never are.
* De-identification blanks, ``___`` in MIMIC-CXR and ``XXXX`` in Open-I, are removed (x-XXXX is x-ray), with the
  punctuation they leave behind. A text with no word left is absent: ``None``, never an empty string.

Every step takes time proportional to the text, whatever is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from pipeline.ingest.report_text import plain

# A name may hold a time (AP CHEST, 10:45 A.M.:), so a colon between digits does not end it.
HEADING = re.compile(
    r"[*_]* ?([A-Za-z](?:[A-Za-z0-9 /,&()'._\-]|(?<=\d):(?=\d)){1,90}?) ?\*{0,2}(?:(?<!\d):|:(?!\d))\*{0,2}", re.ASCII
)
BARE_HEADING = re.compile(r"[*_]* ?([A-Z][A-Z /&()]{3,40}|Findings|Impression|Conclusion) ?[*_.;\-]*")
MISPUNCTUATED = re.compile(r"([A-Z][A-Z /&]{6,40}) ?[;.\-] ")
# What may be before a heading, or around it: bullets, numbers, signs of Markdown, brackets.
BEFORE_HEADING = re.compile(r"[\s>#*+\u2022\u00b7\u25aa\u25cf\u25e6\u2023\u2013\u2014-]+|\(?\d{1,2}[.)] ")
IN_BRACKETS = re.compile(r"(?:\[([^\[\]]{3,60})\]|\{([^{}]{3,60})\}|<([^<>]{3,60})>|\(([^()]{3,60})\)) ?(?:: ?|$)")
# Who signed: a name is behind "by", so that a film that was verified by CT, or read by others, is still described.
_SIGNED = (
    r"(?:(?i:(?:this |final )?report (?:was |has been )?|reviewed and )?(?:(?i:electronically|digitally) )?"
    r"(?:(?i:(?:signed|dictated) (?:on|at)) \d|"
    r"(?i:signed|dictated|transcribed|authenticated|approved|verified|finali[sz]ed|typed|interpreted|reported|read)"
    r"(?: (?i:and) [A-Za-z]{4,14})?(?: (?i:electronically|digitally))? (?i:by) ?:? ?"
    r"(?:(?i:dr|prof)\b|[A-Z][a-z]|[A-Z]\.)|"
    r"(?i:(?:electronically|digitally) (?:signed|authenticated|verified|approved))\b|"
    r"(?i:signed|dictated|transcribed|typed|(?:signing|reporting) [a-z]{4,14}) ?:))"
)
SIGNED, SIGNED_INSIDE = re.compile(_SIGNED), re.compile(rf"(?<=[.;:_)\]]) +(?={_SIGNED})")
REPORT_STARTS = re.compile(r"FINAL REPORT\b")
TAIL_STARTS = re.compile(r"(FINAL ADDENDUM|WET READ)\b")
INSIDE_A_LINE = re.compile(
    r"(?<=[.:;?)_\]]) +(?=(?:FINDINGS?|IMPRESSIONS?|CONCLUSIONS?|INDICATION|HISTORY|COMPARISONS?|TECHNIQUE|EXAMINATION|"
    r"NOTIFICATION|RECOMMENDATIONS?(?:\(S\))?|Findings|Impression|Conclusion|Indication|History|Comparison|Technique|"
    r"Recommendations?):(?!\d))"
)
# Without a full stop before it, where the line has begun with another heading.
AFTER_ANOTHER = re.compile(r" (?=(?:FINDINGS|IMPRESSION|CONCLUSION|Findings|Impression|Conclusion):\s)")

IMPRESSION = {"IMPRESSION", "IMPRESSIONS", "CONCLUSION", "CONCLUSIONS", "SUMMARY", "IMP", "OPINION"}
FINDINGS = {"FINDINGS", "FINDING", "FIND", "REPORT"}
# Headings by themselves: in a longer one they are of what was told to whom.
ALONE = {
    **dict.fromkeys(("RESULT", "RESULTS", "DESCRIPTION"), "findings"),
    **dict.fromkeys(("INTERPRETATION", "ASSESSMENT"), "impression"),
}
VIEWS = {
    "CHEST", "VIEW", "VIEWS", "RADIOGRAPH", "RADIOGRAPHS", "RADIOGRAPHY", "FILM", "FILMS", "CXR", "PORTABLE", "PA",
    "AP", "LATERAL", "LAT", "FRONTAL", "UPRIGHT", "RIBS", "BONE",
}  # fmt: skip
# Words that may stand beside the above without changing what a heading is.
BESIDE = {
    "A", "AN", "AND", "AT", "OF", "ON", "OR", "S", "THE", "WITH", "ONE", "SINGLE", "TWO", "THREE", "ONLY", "X",
    "RAY", "FINAL", "OVERALL", "RADIOGRAPHIC", "WINDOW", "SEMI", "SUPINE", "ERECT", "PLAN", "RECOMMENDATION",
    "RECOMMENDATIONS", "AM", "PM", "M",
}  # fmt: skip
# Sections before the findings, by first word. A report without a FINDINGS heading goes on below one of these.
LEAD = re.compile(
    r"(EXAM|EXAMINATION|STUDY|PROCEDURE|TYPE OF|REASON|INDICATIONS?|HISTORY|CLINICAL|PATIENT|MEDICAL|COMPARED|PRIOR|"
    r"REFERENCE|TECHNIQUE|METHOD|PROTOCOL|DATE|TIME|CONTRAST|DOSE|DIAGNOSIS|REFERRING|REQUEST|ORDER)\b"
)
# Sections after the findings, or that somebody wrote before or after the report itself.
TAIL = re.compile(
    r"(FINAL ADDENDUM|ADDENDUM|WET READ|WETREAD|PRELIMINARY|PROVISIONAL|PFI|NOTIFICATION|RECOMMENDATIONS?|ATTESTATION|"
    r"COMMUNICATION|DISCUSSED|DICTATED|ELECTRONIC|SIGNED|OPERATORS?|LAST|ICD|CPT|RADIOLOGIST|ATTENDING|RESIDENT|INTERPRETING|READING)\b"
)
# In a heading that is not in capitals every word must be a heading's: a sentence may hold a colon, too.
HEADING_WORDS = BESIDE | {
    "ADDENDUM", "CLINICAL", "COMMUNICATION", "DATE", "DIAGNOSIS", "DOSE", "EXAM", "EXAMS", "FOR", "INFORMATION",
    "MEDICAL", "NOTE", "NOTIFICATION", "PATIENT", "PHYSICIAN", "PRELIMINARY", "PRIOR", "PROCEDURE", "READ", "REASON",
    "REFERENCE", "REPORT", "STUDIES", "STUDY", "TO", "TYPE", "WET", "RADIOLOGIST", "ATTENDING", "RESIDENT",
    "INTERPRETING", "READING",
}  # fmt: skip

BLANK = re.compile(r"_{2,}|(?<![A-Za-z])X{3,}(?![A-Za-z])")
X_RAY = re.compile(r"\b([Xx])[- ]X{3,}(?:-X{3,})*\b")
RULE = re.compile(r"[-=*]{3,}")
SPACE = re.compile(r"\s+")
BEFORE_POINT = re.compile(r" ([.,;:!?)])")
AFTER_BRACKET = re.compile(r"\( ")
EMPTY_BRACKETS = re.compile(r"\( ?[.,;:/-]* ?\)")
TWO_POINTS = re.compile(r"(?<!\.)\. ?\.(?!\.)")
POINTS = re.compile(r"([,;:])(?: ?[,;:])* ?([.,;:])")
LEADING = re.compile(r"^[\s.,;:)\-]+")
WORD = re.compile(r"[^\W\d_]{2,}")  # of any language
REPEATED = re.compile(r"(.)\1+")
LETTERS = re.compile(r"[A-Z]+")
SENTENCE_END = re.compile(r"[.!?](?=\s|$)")


def clean_text(text: str) -> str | None:
    """One line of text without blanks, rules and stray points, or ``None`` where no word of two letters is left."""
    text = plain(text)
    if not WORD.search(text):
        return None
    text = "".join(c if c.isprintable() or c.isspace() else " " for c in text)
    text = X_RAY.sub(r"\1-ray", text)
    text = RULE.sub(" ", BLANK.sub(" ", text))
    # Spaces are folded before anything else looks for them: long runs would cost the square of their length.
    text = SPACE.sub(" ", EMPTY_BRACKETS.sub(" ", SPACE.sub(" ", text)))
    text = AFTER_BRACKET.sub("(", BEFORE_POINT.sub(r"\1", text))
    text = TWO_POINTS.sub(".", POINTS.sub(r"\2", text))
    text = LEADING.sub("", text).strip()
    return text if WORD.search(text) else None


def sections(report: str) -> tuple[str | None, str | None]:
    """Findings and impression of a free-text report (MIMIC-CXR), each cleaned to one line; ``None`` where absent.

    Takes any string and raises nothing; both are ``None`` for a report that says nothing about its images.
    """
    parts = list(_parts(report))
    texts: dict[str, dict[str, None]] = {"findings": {}, "views": {}, "impression": {}}
    for kind, lines in parts:
        if kind in texts and (text := clean_text("\n".join(lines))):
            texts[kind][text] = None
    findings = " ".join(texts["findings"] or texts["views"]) or None
    impression = " ".join(texts["impression"]) or None
    if findings is None and impression is None:
        findings = _unheaded(parts)
    return findings, impression


def section_text(text: str) -> str | None:
    """The text of one section by itself, as in a list's column: without its heading, and without what
    follows it (who signed), cleaned to one line; ``None`` where no word is left."""
    kept = [" ".join(lines) for kind, lines in _parts(text) if kind not in ("tail", "lead", "comparison")]
    return clean_text("\n".join(kept)) or clean_text(text)


def outline(report: str) -> list[tuple[str, str]]:
    """The parts of a report in order: what each is (findings, impression, views, comparison, lead, tail, or start,
    before any heading), and its text on one line; parts without a word are left out."""
    parts = ((kind, clean_text("\n".join(lines))) for kind, lines in _parts(report))
    return [(kind, text) for kind, text in parts if text]


def _parts(report: str) -> Iterator[tuple[str, list[str]]]:
    """The report as (kind, lines): findings, impression, views, comparison, lead, tail, or start (no heading yet)."""
    current, opened = "start", list[str]()
    for unfolded in plain(report).splitlines():
        # Blanks are kept for ``clean_text``, which knows what to do about the punctuation around them.
        folded = " ".join(unfolded.split())
        for line in _lines(folded):
            kind, rest = _heading(line)
            if kind and not (kind == "views" and current in ("findings", "impression")):
                yield current, opened
                current, opened = kind, [rest]
            else:
                opened.append(line)
    yield current, opened


def _lines(line: str) -> Iterator[str]:
    """A line cut before each heading inside it, and before who signed."""
    for part in INSIDE_A_LINE.split(line) if line.count(":") > 1 else (line,):
        for piece in SIGNED_INSIDE.split(part):
            kind, rest = _heading(piece) if piece.count(":") > 1 else ("", piece)
            first, *others = AFTER_ANOTHER.split(rest) if kind else [rest]
            yield piece[: len(piece) - len(rest)] + first
            yield from others


def _unheaded(parts: list[tuple[str, list[str]]]) -> str | None:
    """The text of a report that has no heading for it."""
    body = [(kind, _paragraphs(lines)) for kind, lines in parts if kind != "tail"]
    for n, (kind, paragraphs) in enumerate(reversed(body)):
        if kind != "start":
            paragraphs = paragraphs[1:]  # the first one is what the heading announces
        elif n:
            continue  # text before the first heading is the title of the examination
        while paragraphs and _title(paragraphs[0]):
            paragraphs = paragraphs[1:]
        if text := clean_text("\n".join(paragraphs)):
            return text
    compared = [" ".join(paragraphs) for kind, paragraphs in body if kind == "comparison"]
    return next((clean_text(text) for text in compared if len(SENTENCE_END.findall(text)) > 1), None)


def _paragraphs(lines: list[str]) -> list[str]:
    return [text for text in (part.strip() for part in re.split(r"\n\n+", "\n".join(lines))) if text]


def _title(paragraph: str) -> bool:
    """Whether a paragraph only names the examination: capitals without a full stop."""
    return not paragraph.endswith(".") and not any(c.islower() for c in paragraph)


def _heading(line: str) -> tuple[str, str]:
    """What a line opens ("" = nothing), and its text after the heading."""
    kind, rest = _bare_heading(line)
    if kind or not line or line[0].isalpha():
        return kind, rest
    if match := IN_BRACKETS.match(line):
        name = next(filter(None, match.groups()))
        kind, rest = _kind(name.upper(), name.isupper()), line[match.end() :]
    elif (match := BEFORE_HEADING.match(line)) and match.end() < len(line):
        kind, rest = _heading(line[match.end() :])
    return (kind, rest) if kind and kind != "views" else ("", line)


def _bare_heading(line: str) -> tuple[str, str]:
    """As ``_heading``, of a line without signs before it."""
    if not line:
        return "", line
    if SIGNED.match(line):
        return "tail", ""
    if match := HEADING.match(line):
        name = match.group(1)
        kind = _kind(name.upper(), name.isupper())
        return (kind, line[match.end() :]) if kind else ("", line)
    if REPORT_STARTS.match(line):
        return "start", ""
    if TAIL_STARTS.match(line):
        return "tail", ""
    if match := BARE_HEADING.fullmatch(line):
        kind = _kind(match.group(1).upper(), False)
        if kind and kind != "views":
            return kind, ""
    elif match := MISPUNCTUATED.match(line):
        kind = _kind(match.group(1), False)
        if kind in ("findings", "impression"):
            return kind, line[match.end() :]
    return "", line


@lru_cache(maxsize=4096)
def _kind(name: str, shouted: bool) -> str:
    """findings, impression, views, comparison, lead, tail, or "" for what is no heading, or one inside a section.

    ``name``: in upper case; ``shouted``: whether it was so in the report. Then the public parser's rule holds, that any
    word of a heading decides; else all words must be known.
    """
    words = LETTERS.findall(name)
    if not words:
        return ""
    if len(words) == 1 and words[0] in ALONE:
        return ALONE[words[0]]
    slips = [_slip(word) for word in words]
    if shouted or all(word in HEADING_WORDS or slip in LEADS for word, slip in zip(words, slips, strict=True)):
        name = " ".join(words)
        if TAIL.match(name):
            return "tail"
        if slips[0] in LEADS or LEAD.match(name):
            return slips[0] or "lead"
    decide = any if shouted else all
    said = [word for word in words if word not in BESIDE and word not in VIEWS]
    findings = [word in FINDINGS or _slip(word) == "findings" for word in said]
    impression = [word in IMPRESSION or _slip(word) == "impression" for word in said]
    if said and decide(f or i for f, i in zip(findings, impression, strict=True)):
        return "findings" if any(findings) else "impression"
    if any(word in VIEWS for word in words) and (shouted or not said):
        return "views"
    return ""


def _shorter(word: str) -> set[str]:
    """The word without one of its letters."""
    return {word[:i] + word[i + 1 :] for i in range(len(word))}


def _spellings(losses: int) -> dict[str, str]:
    """What is left of each name without up to ``losses`` of its letters -> its kind. Double letters count once."""
    left: dict[str, str] = {}
    for kind, names in NAMES.items():
        for name in names.split():
            # Without two letters CONCLUSION is OCCLUSION: only the two commonest headings may lose two.
            most = losses if name.startswith(("FINDINGS", "IMPRESSION")) else min(losses, 1)
            shorter = {REPEATED.sub(r"\1", name)}
            for _ in range(most):
                shorter |= set().union(*map(_shorter, shorter))
            left.update(dict.fromkeys(shorter, kind))
    return left


LEADS = ("comparison", "lead")
NAMES = {
    "findings": "FINDINGS FINDING",
    "impression": "IMPRESSION IMPRESSIONS CONCLUSION CONCLUSIONS",
    "comparison": "COMPARISON COMPARISONS",
    "lead": "INDICATION INDICATIONS TECHNIQUE HISTORY EXAMINATION",
}
LOST, LOST_ONE = _spellings(2), _spellings(1)


@lru_cache(maxsize=4096)
def _slip(word: str) -> str:
    """The kind of section whose name a word is but for a slip of the pen (see the head of this file), or ""."""
    squeezed = REPEATED.sub(r"\1", word)
    if not 6 <= len(squeezed) <= 13:
        return ""
    if squeezed in LOST:
        return LOST[squeezed]
    for i in range(len(squeezed)):  # a letter wrong, or two swapped: the word and the name both lose one
        if kind := LOST_ONE.get(squeezed[:i] + squeezed[i + 1 :]):
            return kind
    return ""
