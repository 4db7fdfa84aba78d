"""Texts that come from data or parameters, as cells of CSV files that people open and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import Any

FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # with these a spreadsheet takes a cell for a formula
FIGURES = re.compile(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?( [+-]?\d+(\.\d+)?(e[+-]?\d+)?)*")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # line ends, tabs, what a terminal takes for a command

SIGNS = re.compile(
    r"[\\`|<>&\[\]~]|\*(?=\w)|(?<!\w)\*(?=\S)|(?<![^\W_])_|_(?![^\W_])"
)  # * and _: if emphasis may begin


def csv_row(cells: Iterable[Any], ours: Container[str] = ()) -> list[Any]:
    """A row for ``csv.writer`` that no spreadsheet computes: a text that could be a formula begins with ' (OWASP, CSV
    injection). Numbers, texts of numbers alone and texts of ``ours`` are as they were."""
    return [f"'{cell}" if isinstance(cell, str) and _computes(cell) and cell not in ours else cell for cell in cells]


def _computes(text: str) -> bool:
    begins = text.startswith(("\t", "\r", "\n")) or text.lstrip().startswith(FORMULA)
    return begins and not FIGURES.fullmatch(text)


def markdown(text: str) -> str:
    """Text for a line or table cell of Markdown that shows as it is: no tag, link, code, cell or line of its own."""
    return SIGNS.sub(r"\\\g<0>", CONTROL.sub(" ", text))


def markdown_code(text: str) -> str:
    """Text as code in a line or table cell of Markdown."""
    text = CONTROL.sub(" ", text).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"{fence}{text}{fence}"
