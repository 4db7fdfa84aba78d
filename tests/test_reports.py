import random
import re
import tarfile
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.ingest.report_sections import clean_text, sections

OPENI = Path(__file__).parents[2] / "shared" / "real" / "NLMCXR_reports.tgz"

MIMIC = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough, ?findings of pneumonia  // pneumonia?

 COMPARISON:  ___ chest radiograph at 10:45

 FINDINGS:

 The lungs are clear of focal
 consolidation.  Since ___, there is a small
 left pleural effusion (___).

 LUNGS: No nodule.

 IMPRESSION:

 1. Small left pleural effusion.
 2. No pneumonia.

 NOTIFICATION:  Discussed with Dr. ___ at 3:45 pm.
"""


def test_both_sections_of_a_wrapped_report():
    findings, impression = sections(MIMIC)
    assert findings == (
        "The lungs are clear of focal consolidation. Since, there is a small left pleural effusion. LUNGS: No nodule."
    )
    assert impression == "1. Small left pleural effusion. 2. No pneumonia."


@pytest.mark.parametrize(
    "heading",
    [
        "IMPRESSION:",
        "IMPRESSON:",
        "Impression:",
        "IMPRESSION :",
        "CONCLUSION:",
        "Conclusions:",
        "IMPRESSION",
        "FINAL IMPRESSION:",
    ],
)
def test_spellings_of_impression(heading):
    report = f" INDICATION: Fever.\n\n {heading}\n Right lower lobe pneumonia.\n"
    assert sections(report) == (None, "Right lower lobe pneumonia.")


@pytest.mark.parametrize(
    "heading",
    ["FINDINGS:", "FINDNGS:", "Findings:", "FINDING:", "FINDINGS AND IMPRESSION:", "FINDINGS/IMPRESSION:",
     "IMPRESSION AND FINDINGS:", "PA AND LATERAL VIEWS OF THE CHEST:", "CHEST, TWO VIEWS:"],
)  # fmt: skip
def test_spellings_of_findings(heading):
    report = f" HISTORY: Fever.\n\n {heading} Right lower lobe\n pneumonia.\n"
    assert sections(report) == ("Right lower lobe pneumonia.", None)


@pytest.mark.parametrize(
    "heading", ["RECOMMENDATION(S):", "NOTIFICATION:", "Comparison:", "WET READ: ", "FINAL REPORT", "ADDENDUM"]
)
def test_other_headings_end_a_section(heading):
    assert sections(f"IMPRESSION: Nodule.\n {heading}\n Follow up.\n") == (None, "Nodule.")


def test_a_views_heading_inside_findings_is_text_and_not_a_section():
    assert sections("FINDINGS: A line.\nCHEST: Clear.\nIMPRESSION: Normal.") == ("A line. CHEST: Clear.", "Normal.")


def test_sentences_that_look_like_headings_are_text():
    report = "FINDINGS: No effusion.\nFindings since 3:45 unchanged.\nImpression of a nodule: likely a nipple.\n"
    findings, impression = sections(report)
    assert impression is None
    assert findings is not None and findings.endswith("likely a nipple.")


@pytest.mark.parametrize(
    "text", ["", "FINAL REPORT\n PA AND LATERAL CHEST\n", "FINDINGS: \n\nIMPRESSION: ___.\n", "INDICATION: Cough.\n"]
)
def test_no_section_is_none_and_never_empty(text):
    assert sections(text) == (None, None)


def test_an_addendum_is_joined_and_repeats_are_left_out():
    report = "IMPRESSION: Clear.\n ADDENDUM: none\n IMPRESSION: Clear.\n TECHNIQUE: x\n IMPRESSION: New nodule.\n"
    assert sections(report) == (None, "Clear. New nodule.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\n  wrapped\tline. ", "a wrapped line."),
        ("Dr. ___. Normal.", "Dr. Normal."),
        ("Compared to ___ , ___: clear.", "Compared to: clear."),
        ("Normal chest x-XXXX. XXXX are clear.", "Normal chest x-ray. are clear."),
        ("Heart size normal...", "Heart size normal..."),
        ("Tube 3.5 cm above carina (___).", "Tube 3.5 cm above carina."),
        ("______________", None),
        ("The 3rd-5XXXX ribs.", "The 3rd-5 ribs."),
        ("\ufeffA b\ufffdd b\ufeffyte.", "A b d byte."),
        ("XXXX. 1.", None),
        ("\x00\n", None),
    ],
)
def test_clean(text, expected):
    assert clean_text(text) == expected


def test_clean_twice_changes_nothing():
    once = clean_text(MIMIC)
    assert once is not None and clean_text(once) == once


IMPRESSIONS = [
    *("IMPRESSION", "IMPRESSIONS", "IMPRESSON", "IMPRESION", "IMPRESSSION", "IMPRSSION", "IMPRESSIN"),
    *("IMPERSSION", "IMPRESSOIN", "IMRPESSION", "MPRESSION", "IMPRESSIO", "IMPRESSIONN", "IMOPRESSION"),
    *("IMPPRESSION", "INPRESSION", "IMPREESSION", "IMPRESSIOM", "IMPRESIONS", "IMPRSION", "CONCLUSION"),
    *("CONCLUSIONS", "CONCLUSON", "CONCULSION", "SUMMARY", "OPINION"),
]
FINDINGS = [
    *("FINDINGS", "FINDING", "FINDNGS", "FIDINGS", "FINDIGS", "FINDINS", "FINIDNGS", "FINDIGNS"),
    *("FINDINGGS", "FIINDINGS", "FINGDINGS", "FINDINDGS", "FNIDINGS", "FINDINFS", "INDINGS", "FINDINGSS"),
    *("REPORT",),
]
IMPRESSIONS += ["FINAL IMPRESSION", "OVERALL IMPRESSION", "IMPRESSION AND PLAN", "IMPRESSION/RECOMMENDATION(S)"]
FINDINGS += [
    *["FINDINGS AND IMPRESSION", "IMPRESSION AND FINDINGS", "FINDINGS/IMPRESSION", "FINDNGS / IMPRESSON"],
    *[
        "CHEST, TWO VIEWS",
        "CHEST, PA AND LATERAL",
        "AP CHEST",
        "PA AND LATERAL VIEWS OF THE CHEST",
        "CHEST (PORTABLE AP)",
    ],
    *["UPRIGHT PORTABLE CHEST RADIOGRAPH", "SUPINE PORTABLE AP VIEW", "CHEST X-RAY", "AP UPRIGHT AND LATERAL VIEWS"],
    *[
        "AP CHEST, 10:45 A.M., ___",
        "PORTABLE AP CHEST FILM AT 07:29, ___",
        "FRONTAL AND LATERAL CHEST RADIOGRAPHS",
        "RIBS",
    ],
    *["SINGLE SEMI-UPRIGHT VIEW", "RADIOGRAPHIC FINDINGS", "FINDINGS, CHEST"],
]
LEADS = ["INDICATION", "HISTORY", "Clinical History", "REASON FOR EXAM", "REASON FOR EXAMINATION", "COMPARISON",
         "COMPARISIONS", "Comparison exam", "TECHNIQUE", "EXAMINATION", "IDICATION", "TYPE OF EXAMINATION"]  # fmt: skip


def spelt(name, form):
    """A heading as people type it: capitals, title case, own line, no colon, no space behind it, spaces and tabs."""
    title = name.title().replace(" And ", " and ").replace(" Of The ", " of the ").replace("A.M.", "a.m.")
    return {
        "colon": f"{name}: ",
        "title": f"{title}: ",
        "line": f"{name}:\n \n ",
        "spaced": f"\t{name} :\t",
        "tight": f"{name}:",
        "stars": f"**{name}:** ",
    }[form]


FORMS = ["colon", "title", "line", "spaced", "tight", "stars"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("names", "place"), [(FINDINGS, 0), (IMPRESSIONS, 1)], ids=["findings", "impression"])
def test_every_spelling_in_every_form(names, place, form):
    for name in names:
        for lead in LEADS:
            found = sections(f" {lead}: Fever\n and cough.\n \n {spelt(name, form)}1. A line at 10:45.\n 2. Clear.\n")
            assert found[place] == "1. A line at 10:45. 2. Clear.", (name, lead)
            assert found[1 - place] is None, (name, lead)


@pytest.mark.parametrize(
    "name", ["IMPRESSION", "FINDINGS", "IMPRESSON", "Findings", "Impression", "IMPRESSION.", "FINDINGS -"]
)
def test_a_heading_alone_on_its_line_needs_no_colon(name):
    found = sections(f"HISTORY: Cough.\n\n {name}\n Clear.\n")
    assert found == ((None, "Clear.") if name.upper().startswith("I") else ("Clear.", None))


@pytest.mark.parametrize(
    "heading",
    [
        "COMPRESSION",
        "DEPRESSION",
        "OCCLUSION",
        "FILLINGS",
        "EXPRESSION",
        "CONTUSION",
        "HEART",
        "LUNGS",
        "BONES",
        "Tubes",
    ],
)
def test_words_like_a_heading_are_not_one(heading):
    assert sections(f"FINDINGS: A.\n{heading}: B is seen.\n") == (f"A. {heading}: B is seen.", None)


@pytest.mark.parametrize(
    "line",
    [
        "Study limited: the patient is rotated.",
        "Findings suggest the following: edema.",
        "Chest wall: normal.",
        "Comparison is made with the film of 10:45: no change.",
        "1. Findings since 3:45 are unchanged.",
        "Impression: cannot be",  # in the middle of a section: a heading after all
    ],
)
def test_a_sentence_with_a_colon(line):
    found = sections(f"FINDINGS: No effusion.\n{line}\nThe heart is large.\n")
    if line.startswith("Impression"):
        assert found == ("No effusion.", "Impression: cannot be The heart is large."[12:])
    else:
        assert found == (f"No effusion. {line} The heart is large.", None)


CLEAR = ("The lungs are clear.", "No acute disease.")
EXPORTS = {
    "HTML": "<HTML><P>Sent to &quot;WARD 3&quot;.<br /></P><U><STRONG>FINDINGS</STRONG></U><br>The lungs are clear.<br>"
    "<U><STRONG>IMPRESSION</STRONG></U><br>No acute disease.<br></HTML>",
    "HTML with tables": "<table><tr><td><b>Findings:</b></td><td>The&nbsp;lungs are clear.</td></tr><tr><td>"
    "<b>Impression:</b></td><td>No acute disease.</td></tr></table><style>p {color: red}</style>",
    "entities": "FINDINGS:&#10;The lungs are clear.&#xA;IMPRESSION: No acute disease.",
    "HL7, tildes": "EXAM: CHEST PA~ ~HISTORY: Cough.~ ~FINDINGS:~The lungs are clear.~ ~IMPRESSION:~No acute disease.~",
    "HL7, escapes": r"FINDINGS:\.br\The lungs are clear.\.sp2\\H\IMPRESSION:\N\\.br\No acute disease.",
    "line ends as letters": r"FINDINGS:\nThe lungs are clear.\r\n\r\nIMPRESSION: No acute disease.\n",
    "a spreadsheet's": "FINDINGS:_x000D_\nThe lungs are clear._x000D_\nIMPRESSION: No acute disease._x000D_",
    "bullets": "\u2022 FINDINGS: The lungs are clear.\n\u2022 IMPRESSION: No acute disease.",
    "dashes": "- Findings: The lungs are clear.\n- Impression: No acute disease.",
    "numbers": "1. FINDINGS:\nThe lungs are clear.\n2) IMPRESSION:\nNo acute disease.",
    "Markdown": "## Findings\nThe lungs are clear.\n## Impression\nNo acute disease.",
    "quoted": "> FINDINGS: The lungs are clear.\n> IMPRESSION: No acute disease.",
    "brackets": "[FINDINGS]\nThe lungs are clear.\n[IMPRESSION]: No acute disease.",
    "zero width": "\u200bFINDINGS: The lungs are clear.\n\u00ad\u2060IMPRESSION: No acute disease.",
    "NUL": "\0FINDINGS: The lungs are clear.\n\x1fIMPRESSION: No acute disease.",
    "wide colons": "FINDINGS\uff1aThe lungs are clear.\nIMPRESSION \uff1a No acute disease.",
    "one line": "Findings: The lungs are clear. Impression: No acute disease.",
    "one line, capitals": "HISTORY: Cough FINDINGS: The lungs are clear. IMPRESSION: No acute disease.",
    "signed": "FINDINGS: The lungs are clear.\nIMPRESSION: No acute disease.\nElectronically signed by: A. Person, MD",
    "signed inside": "FINDINGS: The lungs are clear.\nIMPRESSION: No acute disease. Dictated by A. Person on 3/4.",
    "radiologist": "FINDINGS: The lungs are clear.\nIMPRESSION: No acute disease.\nRadiologist: A. Person",
    "HTML in entities": "&lt;p&gt;FINDINGS&lt;br/&gt;The lungs are clear.&lt;/p&gt;IMPRESSION: No acute disease.",
    "cells": "<tr><td>FINDINGS</td><td>The lungs are clear.</td></tr><th>IMPRESSION</th><td>No acute disease.</td>",
    "HL7, codes": "FINDINGS:\\X0D\\The lungs are clear.\\X0D0A\\IMPRESSION:\\X0A\\No acute disease.",
    "other names": "DESCRIPTION: The lungs are clear.\nINTERPRETATION: No acute disease.",
    "results": "Results:\nThe lungs are clear.\nAssessment:\nNo acute disease.",
    "approved": "FINDINGS: The lungs are clear.\nIMPRESSION: No acute disease.\nReport approved by A. Person.\nWard 3",
}


@pytest.mark.parametrize("kind", EXPORTS)
def test_reports_as_systems_export_them(kind):
    assert sections(EXPORTS[kind]) == CLEAR


@pytest.mark.parametrize(
    "text",
    [
        "Opacities <5 mm & >3 mm in size.",
        "A nodule of ~5 mm, ~ 6 mm before.",
        "Comparison with 10:45 a.m. shows no change.",
        "1. Findings since then are unchanged. 2. Reviewed with the earlier film by the team.",
        "The patient signed on paper and/or by phone; 50% of films are read by two.",
        "Position verified by CT. The film was interpreted by others as normal.",
        "(see below) The line (new since then) ends in the atrium.",
        "Results were called to the ward.",
    ],
)
def test_what_only_looks_like_an_export_is_left_as_it_is(text):
    assert sections(f"FINDINGS: {text}") == (text, None)


def test_rich_text_is_not_read_as_text():
    assert sections(r"{\rtf1\ansi {\b FINDINGS:} Clear.\par IMPRESSION: Normal.}") == (None, None)


def test_sections_on_one_line():
    report = "INDICATION: Cough. COMPARISON: ___. FINDINGS: Clear, at 10:45. IMPRESSION: Normal. NOTIFICATION: None."
    assert sections(report) == ("Clear, at 10:45.", "Normal.")


BODY = "The lungs are clear."
# Each of these is a row of the table in docs/reports.md, by its number there.
CASES = {
    "1 both headings": ("FINDINGS: A line.\n \n IMPRESSION: Normal.", "A line.", "Normal."),
    "2 a heading on the first line": ("IMPRESSION: Normal.", None, "Normal."),
    "2 a heading without indent": ("HISTORY: x\n\nIMPRESSION: Normal.", None, "Normal."),
    "2 a heading in mixed case": ("HISTORY: x\n\n Impression: Normal.", None, "Normal."),
    "2 a heading without colon": ("HISTORY: x\n\n IMPRESSION\n Normal.", None, "Normal."),
    "3 a slip nobody listed": ("HISTORY: x\n\n IMPREESION: Normal.", None, "Normal."),
    "4 both in one heading": ("HISTORY: x\n\n FINDINGS AND IMPRESSION: Normal.", "Normal.", None),
    "5 views, no FINDINGS": (" HISTORY: x\n\n CHEST, TWO VIEWS: Clear.\n\n IMPRESSION: Normal.", "Clear.", "Normal."),
    "6 views and FINDINGS": (" AP CHEST: ___.\n\n FINDINGS: Clear.\n\n CHEST: A.", "Clear. CHEST: A.", None),
    "7 the section twice": (" IMPRESSION: Old.\n \n ADDENDUM: x\n \n IMPRESSION: New.", None, "Old. New."),
    "8 an addendum first": (" ADDENDUM: Dr. X was told.\n ____\n FINAL REPORT\n IMPRESSION: Old.", None, "Old."),
    "9 a wet read first": (f" WET READ: A.\n \n No.\n __\n FINAL REPORT\n HISTORY: x\n \n {BODY}", BODY, None),
    "10 only a wet read": (" WET READ: ___ 5:57 PM\n  No pneumonia.\n \n ______", None, None),
    "11 last paragraph": (f" REASON FOR EXAM: Cough\n and fever.\n \n {BODY}\n \n Normal.", f"{BODY} Normal.", None),
    "11 after a comparison": (f" HISTORY: x\n \n COMPARISON: None.\n \n {BODY}", BODY, None),
    "12 then a notification": (f" HISTORY: x\n \n {BODY}\n \n NOTIFICATION: Dr. X at 3:45.\n \n By phone.", BODY, None),
    "13 then a comparison": (f" HISTORY: x\n \n {BODY}\n \n COMPARISON: None.", BODY, None),
    "14 no heading, a title": (f" FINAL REPORT\n AP CHEST, 10:45\n \n {BODY}\n \n Normal.", f"{BODY} Normal.", None),
    "15 no heading, no title": (f" FINAL REPORT\n {BODY}\n", BODY, None),
    "15 nothing but text": (BODY, BODY, None),
    "16 text in the comparison": (f" HISTORY: x\n\n COMPARISON: {BODY} Normal.", f"{BODY} Normal.", None),
    "17 a comparison only": (" HISTORY: x\n \n COMPARISON: Chest radiograph from ___.", None, None),
    "18 nothing but a title": (" FINAL REPORT\n CHEST RADIOGRAPH\n", None, None),
    "18 a title before a reason": (" FINAL REPORT\n Chest radiograph of ___.\n \n INDICATION: Cough.", None, None),
    "18 nothing but a reason": (" FINAL REPORT\n INDICATION: Cough.\n", None, None),
    "19 an empty section": (" IMPRESSION:\n \n ___.\n \n HISTORY: x\n \n CHEST: Clear.", "Clear.", None),
    "20 on one line": ("HISTORY: x. FINDINGS: Clear. IMPRESSION: Normal.", "Clear.", "Normal."),
    "21 an export": ("FINDINGS:<br>Clear.~IMPRESSION:\\.br\\Normal.", "Clear.", "Normal."),
    "22 bullets and brackets": ("- FINDINGS: Clear.\n2. [IMPRESSION]\nNormal.", "Clear.", "Normal."),
    "23 who signed": ("IMPRESSION: Normal.\nElectronically signed by A. Person", None, "Normal."),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_case_of_the_table(case):
    report, findings, impression = CASES[case]
    assert sections(report) == (findings, impression)


def test_the_table_has_a_row_for_every_case():
    document = (Path(__file__).parents[1] / "docs" / "reports.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\|(\d+)\|", document, re.M)) == {case.split()[0] for case in CASES}


@pytest.mark.parametrize("case", [*CASES, "whole"])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.replace("\n", "\r\n"),
        lambda t: t.replace("\n", "\r"),
        lambda t: "\ufeff" + t,
        lambda t: t.replace(" ", "\t"),
        lambda t: t.replace(" ", "\u00a0"),
        lambda t: t.replace("\n", "  \n"),
        lambda t: t + "\n" * 9,
    ],
    ids=["crlf", "cr", "bom", "tabs", "nbsp", "trailing", "end"],
)
def test_what_editors_do_to_a_file_changes_nothing(case, change):
    report = MIMIC if case == "whole" else CASES[case][0]
    assert sections(change(report)) == sections(report)


def test_bytes_that_were_no_utf8():
    report = "FINDINGS: Seen by Dr. Mu\u00f1oz, 3\u00b0 tilt.".encode("latin-1").decode("utf-8", errors="replace")
    assert sections(report) == ("Seen by Dr. Mu oz, 3 tilt.", None)


MB = 1_000_000
LETTERS = str.maketrans("0123456789", "GHIJKLMNOP")
ADVERSARIAL = {
    "spaces": " " * MB,
    "newlines": "\n" * MB,
    "spaced letters": "a " * (MB // 2),
    "one word": "A" * MB,
    "one long word with colon": "A" * MB + ":",
    "colons": ":" * MB,
    "points": ".,;:" * (MB // 4),
    "brackets": "(" * MB,
    "brackets and spaces": "(" + " " * MB,
    "brackets and points": "(." * (MB // 2),
    "blanks": "_" * MB,
    "x-rays": "x-" + "X" * MB + "a",
    "x-rays, cut": "x-" + "XXX-" * (MB // 4) + "a",
    "rules": "-=" * (MB // 2),
    "times": "A1" + ":1" * (MB // 2),
    "headings": "IMPRESSION:\n" * (MB // 12),
    "heading words": "\n".join(f"IMPRESS{i:X}:".translate(LETTERS) for i in range(70_000)),
    "many words": ("A FINDINGS B IMPRESSION " * 3 + ":\n") * (MB // 74),
    "headings without colon": "FINDINGS AND " * (MB // 13),
    "headings in a line": "FINDINGS: a. " * (MB // 13),
    "controls": "\x00\x01" * (MB // 2),
    "unicode": "\u0660\u2028\U0001f600" * (MB // 8),
    "capitals": ("A" * 40 + " \n") * (MB // 42),
}  # fmt: skip


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_a_megabyte_of_anything_is_read(kind):
    """A rule that tries every way to read a line would not end within the hour."""
    sections(ADVERSARIAL[kind])


ODD = "\x00\t\r\n:.,;()_ -*\ufffd\ufeff\u00a0\u2028XAz9\u00e9\u4e00"


def mutate(text, draw):
    """The text after up to eight random edits: pieces cut or moved, letters changed, lines broken or joined."""
    for _ in range(draw.randint(1, 8)):
        a, b = sorted(draw.randint(0, len(text)) for _ in range(2))
        b = min(b, a + 40)
        text = draw.choice(
            [
                lambda t, a, b: t[:a] + t[b:],
                lambda t, a, b: t[:b] + t[a:],
                lambda t, a, b: t[b:] + t[:a],
                lambda t, a, b: t[:a] + draw.choice(ODD) + t[a:],
                lambda t, a, b: t[:a] + t[a:b].swapcase() + t[b:],
                lambda t, a, b: t[:a] + t[a:b].replace("\n", " ") + t[b:],
                lambda t, a, b: t[:a] + t[a:b].replace(" ", "\n") + t[b:],
            ]
        )(text, a, b)  # fmt: skip
    return text


def words(text):
    return re.findall(r"\w+", re.sub(r"[\ufeff]", "", text))


def fuzz(rounds, seed):
    draw = random.Random(seed)
    seeds = [MIMIC, *(report for report, _, _ in CASES.values())]
    for _ in range(rounds):
        report = mutate(draw.choice(seeds), draw)
        known = set(words(report)) | {"ray"}
        for section in sections(report):
            assert section is None or (
                re.search(r"[^\W\d_]{2}", section) and "\n" not in section and "  " not in section
            )
            # A blank inside a word leaves its ends, and a byte that was unreadable does, too.
            unknown = [w for w in words(section or "") if w not in known and not any(w in k for k in known)]
            assert not unknown, "a section holds a word the report has not"
            assert "__" not in (section or "")


def test_no_mutation_of_a_report_breaks_it():
    fuzz(400, 1)


@pytest.mark.drill
def test_no_mutation_of_a_report_breaks_it_at_length():
    fuzz(20_000, 2)


def openi():
    """(findings, impression) as Open-I labels them, raw."""
    with tarfile.open(OPENI, "r:gz") as tar:
        for member in tar:
            if member.name.endswith(".xml"):
                texts = {
                    element.get("Label"): "".join(element.itertext())
                    for element in ElementTree.fromstring(tar.extractfile(member).read()).iter("AbstractText")
                }
                yield texts.get("FINDINGS", ""), texts.get("IMPRESSION", "")


@pytest.mark.skipif(not OPENI.is_file(), reason="needs the reports of Open-I")
def test_real_sections_are_recovered_from_free_text():
    draw = random.Random(3)
    found = total = unheaded = unheaded_found = 0
    for texts in openi():
        names = draw.choice(FINDINGS[:17] + FINDINGS[21:]), draw.choice(IMPRESSIONS)
        parts = [(draw.choice(LEADS), "Cough at 10:45, ___ year old."), ("COMPARISON", draw.choice(["None.", "___."]))]
        parts += [(name, text) for name, text in zip(names, texts, strict=True) if text]
        if draw.random() < 0.3:
            parts.append(("NOTIFICATION", "Discussed with Dr. ___ at 3:45 pm: by phone."))
        lines = [" " * 33 + "FINAL REPORT"]
        for name, text in parts:
            heading = spelt(name, draw.choice(FORMS))
            lines += [*(f" {line}" for line in heading.split("\n")[:-1]), ""]
            lines += [*textwrap.wrap(heading.split("\n")[-1] + text, draw.randint(50, 90), break_on_hyphens=False), " "]
        expected = tuple(clean_text(text) for text in texts)
        total += 1
        found += sections("\n".join(lines)) == expected
        if expected[0]:  # the same findings under no heading, as a last paragraph
            wrapped = "\n ".join(textwrap.wrap(texts[0], 70, break_on_hyphens=False))
            unheaded += 1
            unheaded_found += sections(f" FINAL REPORT\n INDICATION: Cough.\n \n {wrapped}\n") == (expected[0], None)
    assert total == 3955 and found / total >= 0.99, f"{found} of {total}"
    assert unheaded_found / unheaded >= 0.99, f"{unheaded_found} of {unheaded}"
