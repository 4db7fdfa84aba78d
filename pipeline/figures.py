"""The page's figures: line charts as inline SVG that takes its colours from the page, and images as data URIs.

Same input, same bytes: no date, no random ids.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# matplotlib knows no CSS, so lines are drawn in marker colours that become the page's variables afterwards; that is
# what lets one SVG be read on a light and on a dark page.
MARKERS = {
    "#010201": "var(--ink)",
    "#010202": "var(--muted)",
    "#010203": "var(--rule)",
    "#010204": "var(--series-1)",
    "#010205": "var(--series-2)",
    "#010206": "var(--series-3)",
    "#010207": "var(--accent)",
    "#010208": "var(--paper)",
}
INK, MUTED, RULE, SERIES_1, SERIES_2, SERIES_3, ACCENT, PAPER = MARKERS
SERIES = (SERIES_1, SERIES_2, SERIES_3)
DASHES = ((), (4.0, 2.0), (1.0, 1.6))
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Line:
    """A curve: its legend, points, colour (a marker above) and dashes (empty = solid)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    dashes: tuple[float, ...] = ()


def mean_roc(classes: Mapping[str, Mapping[str, Sequence[float]]], points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """The vertical average of several classes' ROC curves.

    Args:
        classes: class -> {"fpr": [...], "tpr": [...]}, both ascending from 0 to 1.

    Returns:
        fpr and mean tpr, float64 [points] each, starting at (0, 0). One class: its curve as it is.
    """
    curves = [(np.asarray(c["fpr"], float), np.asarray(c["tpr"], float)) for c in classes.values()]
    if len(curves) == 1:
        return curves[0]
    grid = np.linspace(0, 1, points)
    mean = np.mean([np.interp(grid, fpr, tpr) for fpr, tpr in curves], axis=0)
    return np.r_[0.0, grid], np.r_[0.0, mean]


def roc_chart(title: str, lines: Sequence[Line]) -> str:
    """ROC curves of one data set with the diagonal of chance, as SVG."""
    figure, axes = _axes(3.1, 3.05)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, dashes=(1, 2))
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.3, dashes=line.dashes or (None, None))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="False positive rate", ylabel="True positive rate")
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    return _svg(figure, title)


def loss_chart(title: str, history: Sequence[Mapping[str, float]]) -> str:
    """Training and validation loss by epoch, the kept checkpoint marked, as SVG."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(2.1, 1.5)
    epochs = [row["epoch"] + 1 for row in history]  # 0-based in the file; people count from 1
    axes.plot(epochs, [row["train_loss"] for row in history], color=SERIES_1, linewidth=1.3)
    valid = [row["valid_loss"] for row in history]
    axes.plot(epochs, valid, color=SERIES_2, linewidth=1.3, dashes=DASHES[1])
    best = int(np.argmin(valid))
    axes.plot(epochs[best], valid[best], marker="o", markersize=4.5, color=SERIES_2, markeredgecolor=PAPER)
    axes.set_xlabel("Epoch")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.04, y=0.12)
    return _svg(figure, title)


def line_chart(title: str, lines: Sequence[Line], x: str, y: str) -> str:
    """Curves over whole numbers from 1, such as epochs, with the smallest value of each marked, as SVG."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _axes(3.6, 2.5)
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.3, dashes=line.dashes or (None, None))
        best = int(np.argmin(line.y))
        axes.plot(line.x[best], line.y[best], marker="o", markersize=4, color=line.colour, markeredgecolor=PAPER)
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.04, y=0.1)
    return _svg(figure, title)


def jpeg_uri(image: np.ndarray, side: int, quality: int = 82) -> str:
    """A grey uint8 [H, W] image as a JPEG data URI, at most ``side`` pixels on its longer side."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image, dtype=np.uint8), mode="L")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure (inches) with one pair of axes, drawn without pyplot and so without global state."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.add_subplot()


def _svg(figure: Any, title: str) -> str:
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": title}):  # the title as salt: ids are fixed and differ by figure
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.S)  # its CSS would hit the page
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # named groups repeat between figures, and nothing refers to them
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    for marker, variable in MARKERS.items():
        svg = svg.replace(marker, variable)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{label}">', svg, count=1
    )
    return re.sub(r"\n\s*", "\n", svg).strip()
