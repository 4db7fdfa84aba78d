"""Reports as information systems export them -> plain lines: HTML, HL7's escapes, line ends written as letters, and
characters that nobody sees.

Every step takes time proportional to the text, whatever is in it.
"""

from __future__ import annotations

import html
import re

TAGS = (
    "a|b|big|body|br|center|code|div|em|font|h[1-6]|head|hr|html|i|img|li|meta|o:p|ol|p|pre|s|small|span|strong|sub|sup|"
    "table|tbody|td|th|thead|title|tr|tt|u|ul"
)
LINE_TAG = re.compile(r"(?i)</?(?:br|div|h[1-6]|hr|li|ol|p|pre|table|td|th|title|tr|ul)\b[^<>]{0,200}/?>")
TAG = re.compile(rf"(?i)</?(?:{TAGS})\b[^<>]{{0,200}}/?>")
UNREAD = re.compile(r"(?is)<(style|script)\b[^<>]{0,200}>[^<]{0,20000}</\1\s*>")
ENTITY = re.compile(r"&(?:[A-Za-z]{2,8}|#\d{1,6}|#x[0-9A-Fa-f]{1,5});")
# HL7 v2 escapes (chapter 2.7): formatting, then the separators themselves.
HL7_LINE = re.compile(r"(?i)\\(?:\.(?:br|sp|ce|fi|nf|sk) ?[+-]?\d{0,3}|X(?:0D|0A)+)\\")
HL7_FORM = re.compile(r"\\(?:\.(?:in|ti)[+-]?\d{0,3}|H|N)\\")
HL7_SIGNS = {r"\F" "\\": "|", r"\S" "\\": "^", r"\T" "\\": "&", r"\R" "\\": "~", r"\E" "\\": "\\"}
WRITTEN_END = re.compile(r"(?:\\r)?\\n|\\r|_x000[DA]_")
WRITTEN_TAB = re.compile(r"\\t(?![a-z])")
# HL7's repetition sign ends a line; before a number it is "about", unless the number numbers a line.
TILDE = re.compile(r"~(?!\s?\d+(?![.)]\s)(?:\d|\b))")
# Of no width: spaces, joiners, marks of direction, the soft hyphen, byte order marks.
UNSEEN = re.compile("[\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff]")
CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
COLONS = str.maketrans({"\uff1a": ":", "\ufe55": ":", "\u2236": ":", "\ufffd": " "})


def plain(report: str) -> str:
    """The text of a report, or of a section of one, with a line where its export has one; twice is as once."""
    if report.lstrip().startswith("{\\rtf"):
        return ""  # its words are between its commands
    for _ in range(2):  # tags may be written as entities
        if "<" in report:
            report = TAG.sub("", LINE_TAG.sub("\n", UNREAD.sub(" ", report)))
        if "&" in report and ENTITY.search(report):
            report = html.unescape(report)
    if "\\" in report or "_x000" in report:
        report = HL7_FORM.sub(" ", HL7_LINE.sub("\n", report))
        for escape, sign in HL7_SIGNS.items():
            report = report.replace(escape, sign)
        report = WRITTEN_TAB.sub(" ", WRITTEN_END.sub("\n", report))
    if "~" in report:
        report = TILDE.sub("\n", report)
    return CONTROL.sub(" ", UNSEEN.sub("", report)).translate(COLONS)
