"""The page's figures: line charts as inline SVG that takes its colours from the page, and images as data URIs.

Same input, same bytes: no date, no random ids.
"""

from __future__ import annotations

import base64
import html
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
    _unit_ticks(axes)
    return _svg(figure, title)


def mean_pr(classes: Mapping[str, Mapping[str, Sequence[float]]], points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """The mean precision of several classes' precision-recall curves over a grid of recalls.

    Args:
        classes: class -> {"recall": [...], "precision": [...]}, in any order of recall.

    Returns:
        recall and mean precision, float64 [points] each. One class: its curve in ascending recall.
    """
    curves = []
    for c in classes.values():
        recall, precision = np.asarray(c["recall"], float), np.asarray(c["precision"], float)
        order = np.argsort(recall, kind="stable")
        curves.append((recall[order], precision[order]))
    if len(curves) == 1:
        return curves[0]
    grid = np.linspace(0, 1, points)
    return grid, np.mean([np.interp(grid, recall, precision) for recall, precision in curves], axis=0)


def pr_chart(title: str, lines: Sequence[Line]) -> str:
    """Precision-recall curves of one data set, as SVG."""
    figure, axes = _axes(3.1, 3.05)
    for line in lines:
        axes.plot(line.x, line.y, color=line.colour, linewidth=1.3, dashes=line.dashes or (None, None))
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="Recall", ylabel="Precision")
    _unit_ticks(axes)
    return _svg(figure, title)


def class_chart(title: str, classes: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """AUC of each class, (name, value, low, high) as fractions, as a dot with its interval, best on top, as SVG."""
    ordered = sorted(classes, key=lambda c: c[1])
    figure, axes = _axes(5.6, 0.5 + 0.19 * len(ordered))
    axes.axvline(50, color=MUTED, linewidth=0.8, dashes=(1, 2))
    for y, (_, value, low, high) in enumerate(ordered):
        if low is not None and high is not None:
            axes.plot([100 * low, 100 * high], [y, y], color=SERIES_1, linewidth=1.6, solid_capstyle="butt")
        axes.plot(100 * value, y, marker="o", markersize=4.2, color=SERIES_1, markeredgecolor=PAPER)
        axes.text(101.5, y, f"{100 * value:.1f}", va="center", fontsize=7, color=INK)
    axes.set_yticks(range(len(ordered)), [name for name, *_ in ordered], color=INK, parse_math=False)
    axes.set(xlim=(min(40, *(100 * (c[2] or c[1]) - 2 for c in ordered)), 100), ylim=(-0.7, len(ordered) - 0.3))
    axes.set_xlabel("AUC × 100")
    axes.grid(axis="y", visible=False)
    return _svg(figure, title)


def calibration_chart(title: str, classes: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Observed frequency by mean predicted probability of each class, as SVG; the diagonal is a calibrated model."""
    figure, axes = _axes(3.1, 3.05)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.7, dashes=(1, 2))
    many = len(classes) > 1
    for c in classes.values():
        size = 2.2 if many else 4.2
        axes.plot(
            c["predicted"], c["observed"], marker="o", markersize=size, color=SERIES_1, linewidth=0.8 if many else 1.3
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="Predicted probability", ylabel="Observed frequency")
    _unit_ticks(axes)
    return _svg(figure, title)


def map_uri(image: np.ndarray, heat: np.ndarray, side: int) -> str:
    """A grey uint8 [H, W] image with a map float32 [h, w] laid over it in orange, as a JPEG data URI.

    The map is scaled to its own range: what is seen is where it is high, not how high.
    """
    from PIL import Image

    span = float(heat.max() - heat.min())
    scaled = np.zeros(heat.shape, np.uint8) if span == 0 else np.uint8(255 * (heat - heat.min()) / span)
    size = (image.shape[1], image.shape[0])
    alpha = np.asarray(Image.fromarray(scaled).resize(size, Image.Resampling.BICUBIC), np.float32)[..., None] / 255
    grey = np.repeat(np.asarray(image, np.float32)[..., None], 3, axis=2)
    mixed = grey * (1 - 0.6 * alpha) + np.array([240, 130, 30], np.float32) * 0.6 * alpha
    return _jpeg(Image.fromarray(np.uint8(np.clip(mixed, 0, 255))), side, 82)


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
    return _jpeg(picture, side, quality)


def difference_uri(difference: np.ndarray, side: int) -> str:
    """Differences of two grey images, -255 to 255 [H, W]: light grey where there is none, orange where the first is
    brighter, blue-green where it is darker, full colour from a quarter of the range on."""
    from PIL import Image

    share = np.clip(difference / 64.0, -1, 1)[..., np.newaxis]
    none, brighter, darker = (np.array(c, dtype=np.float64) for c in ((236, 236, 234), (178, 70, 10), (11, 95, 105)))
    colours = none + np.abs(share) * (np.where(share > 0, brighter, darker) - none)
    return _jpeg(Image.fromarray(np.rint(colours).astype(np.uint8), mode="RGB"), side, 88)


def _jpeg(picture: Any, side: int, quality: int) -> str:
    from PIL import Image

    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def _unit_ticks(axes: Any) -> None:
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])


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
    svg = re.sub(r'style="[^"]*"', lambda found: _own_font(found[0]), svg)
    for marker, variable in MARKERS.items():
        svg = svg.replace(marker, variable)
    viewed = re.search(r'viewBox="[^"]*"', svg)
    assert viewed
    begins = f'<svg {viewed[0]} role="img" aria-label="{html.escape(title)}">'  # a title is no pattern
    svg = re.sub(r"<svg [^>]*>", lambda _: begins, svg, count=1)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _own_font(style: str) -> str:
    """A style attribute of matplotlib's without its font, so that the page's is used."""
    return re.sub(r"font-family: [^;\"]*;?", "", re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", style))
