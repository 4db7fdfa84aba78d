"""Radiology prose for what was drawn: sentences that affirm, sentences that deny, and the reports made of them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np

from pipeline.phantom.findings import Finding
from pipeline.phantom.sentences import ADVERB, AFFIRM, BONES, BREAST, DENY, HEALTHY, NORMAL, PORTABLE


def sentence(f: Finding, rng: np.random.Generator, short: bool = False) -> str:
    """One sentence that affirms a finding; ``short`` gives the label-like form with side, zone and severity."""
    forms = AFFIRM[f.kind]
    form = forms[0] if short else forms[int(rng.choice(len(forms)))]
    where = {"right": "right ", "left": "left ", "bilateral": "bilateral ", "": ""}[f.side]
    lobe_zone = (
        "upper" if f.zone == "upper" else "lower" if f.zone == "lower" else "middle" if f.side == "right" else "mid"
    )
    part = "lobe" if lobe_zone != "mid" else "lung"
    plural = "s" if f.side == "bilateral" else ""
    base = rng.random() < 0.5 and f.zone == "lower"
    text = form.format(
        side=f.side,
        lobe=f"{where}{lobe_zone} {part}{plural}",
        zone=f"{where}lung base{plural}" if base else f"{where}{f.zone} lung zone{plural}",
        level={"upper": "upper", "mid": "mid", "lower": "lower", "": ""}[f.zone],
        sev=f"{f.severity} " if f.severity else "",
        adv=ADVERB.get(f.severity, ""),
        device=f.variant,
    )
    text = " ".join(text.split())
    return text[0].upper() + text[1:]


def denials(findings: Sequence[Finding], rng: np.random.Generator, count: int) -> list[str]:
    """Up to ``count`` sentences that deny what was not drawn."""
    present = {f.kind for f in findings}
    absent = [s for kinds, s in DENY if not kinds & present]
    chosen = rng.permutation(len(absent))[:count]
    return [str(rng.choice(absent[i])) for i in chosen]


def findings_text(findings: Sequence[Finding], rng: np.random.Generator, view: str = "", sex: str = "") -> str:
    """The findings section: every finding affirmed, several others denied, in the order a radiologist might dictate.

    ``view`` (of the frontal image) and ``sex`` add what is seen of them: a portable film, breast shadows.
    """
    said = [sentence(findings[i], rng) for i in rng.permutation(len(findings))]
    said += denials(findings, rng, int(rng.integers(2, 5)) if findings else int(rng.integers(3, 7)))
    if not findings:
        said.insert(0, str(rng.choice(HEALTHY)))
    if rng.random() < 0.3:
        said.append(str(rng.choice(BONES)))
    if sex == "F" and rng.random() < 0.6:
        said.append(str(rng.choice(BREAST)))
    if view == "AP" and rng.random() < 0.7:
        said.append(str(rng.choice(PORTABLE)))
    head, tail = said[: len(findings)], said[len(findings) :]
    if rng.random() < 0.4:  # findings in between rather than first
        return " ".join(said[i] for i in rng.permutation(len(said)))
    return " ".join(head + tail)


def impression_text(findings: Sequence[Finding], rng: np.random.Generator) -> str:
    """The impression: the findings in label-like or longer form, sometimes numbered, perhaps a denial; of a normal
    study its normality, denials, or both. The last full stop is sometimes forgotten, as people do."""
    if findings:
        said = [sentence(findings[i], rng, short=bool(rng.random() < 0.65)) for i in rng.permutation(len(findings))]
        if len(said) > 1 and rng.random() < 0.35:
            said = [f"{n}. {s}" for n, s in enumerate(said, 1)]
        elif rng.random() < 0.25:
            said += denials(findings, rng, 1)
    else:
        said = denials(findings, rng, int(rng.integers(0, 3)))
        if not said or rng.random() < 0.7:
            said.insert(0, str(rng.choice(NORMAL)))
    text = " ".join(said)
    return text.removesuffix(".") if rng.random() < 0.4 else text


def _indication(patient_age: int, sex: str, rng: np.random.Generator) -> str:
    why = (
        "cough and fever",
        "shortness of breath",
        "chest pain",
        "trauma",
        "preoperative assessment",
        "hypoxia",
        "weight loss",
        "follow-up",
    )
    who = "man" if sex == "M" else "woman"
    return f"___ year old {who} with {rng.choice(why)}  // evaluate for acute process"


def mimic_report(
    findings: Sequence[Finding], views: Sequence[str], age: int, sex: str, rng: np.random.Generator
) -> str:
    """A whole MIMIC-CXR report: indented, wrapped lines, ``___`` where something was removed.

    About 12 % hold findings only, 14 % an impression only and 3 % neither (the text is then under no header).
    """
    form = float(rng.random())
    frontal = "AP" in views
    name = "CHEST (PORTABLE AP)" if frontal else "CHEST (PA AND LAT)" if "LATERAL" in views else "CHEST (SINGLE VIEW)"
    parts = [("EXAMINATION", name), ("INDICATION", _indication(age, sex, rng))]
    if rng.random() < 0.3:
        parts.append(
            (
                "TECHNIQUE",
                "Portable upright AP view of the chest." if frontal else "Frontal and lateral views of the chest.",
            )
        )
    parts.append(
        ("COMPARISON", str(rng.choice(("None.", "___.", "Chest radiograph from ___.", "Prior study dated ___."))))
    )
    if form < 0.86 and form >= 0.03:
        parts.append(("FINDINGS", findings_text(findings, rng, views[0], sex)))
    if form < 0.03:
        parts.append(("RECOMMENDATION(S)", "Report to be dictated by ___ service."))
    elif form < 0.74 or form >= 0.86:
        parts.append(("IMPRESSION", impression_text(findings, rng)))
    lines = [" " * 33 + "FINAL REPORT"]
    for header, text in parts:
        if header in ("FINDINGS", "IMPRESSION"):
            lines += [f" {header}:", " ", *textwrap.wrap(text, 78, initial_indent=" ", subsequent_indent=" "), " "]
        else:
            lines += [*textwrap.wrap(f"{header}:  {text}", 78, initial_indent=" ", subsequent_indent=" "), " "]
    return "\n".join(lines).rstrip() + "\n"
