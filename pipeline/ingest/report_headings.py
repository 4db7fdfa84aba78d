"""Headings of reports in other languages -> the English ones that ``report_sections`` knows."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from unicodedata import combining, normalize

from pipeline.config.archive_params import Headings
from pipeline.ingest.report_text import plain

ENGLISH = {"findings": "FINDINGS", "impression": "IMPRESSION", "before": "INDICATION", "after": "NOTIFICATION"}
MARKS = "[\u0300-\u036f]*"


@dataclass(frozen=True)
class Translation:
    """Puts English headings in the place of a user's."""

    headings: Headings

    def english(self, report: str) -> str:
        """The report, NFC, with the English heading where a line, or a sentence inside one, begins with a user's."""
        if not self._kinds:
            return report
        lines = normalize("NFD", plain(report)).splitlines()
        return normalize("NFC", "\n".join(self._pattern.sub(self._put, line) for line in lines))

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return {_folded(name): kind for kind in ENGLISH for name in getattr(self.headings, kind)}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        # Of names of which one begins another the longer is looked for first.
        def spelt(kinds: Collection[str]) -> str:
            names = sorted((n for n, kind in self._kinds.items() if kind in kinds), key=len, reverse=True)
            return "|".join(
                "".join(r"\s+" if letter == " " else re.escape(letter) + MARKS for letter in name) for name in names
            )

        before = r"(?:^(?:[\s>#*+\u2022-]{0,10}|\(?\d{1,2}[.)] )[\[(*]{0,2}|(?<=[.;?!])\s)"
        # Whoever signs needs no colon, but a line of his own.
        after = rf"|^\s*({ends})\b[ ,:]?" if (ends := spelt(["after"])) else ""
        return re.compile(rf"(?i){before}({spelt(ENGLISH)})[\])*]{{0,2}} ?(?::|$){after}")

    def _put(self, found: re.Match[str]) -> str:
        name = next(filter(None, found.groups()))
        return f"\n{ENGLISH[self._kinds[_folded(name)]]}:"


def _folded(text: str) -> str:
    """In small letters without accents."""
    return " ".join("".join(c for c in normalize("NFD", text.lower()) if not combining(c)).split())
