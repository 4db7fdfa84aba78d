import pytest

from pipeline.reports import clean, sections

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
    "text", ["", "FINAL REPORT\n Lungs are clear.\n", "FINDINGS: \n\nIMPRESSION: ___.\n", "INDICATION: Cough.\n"]
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
        ("XXXX. 1.", None),
        ("\x00\n", None),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


def test_clean_twice_changes_nothing():
    once = clean(MIMIC)
    assert once is not None and clean(once) == once
