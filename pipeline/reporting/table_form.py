"""What a table is: columns, rows, and cells that hold a figure with all that is said beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.metric_key import MetricKey, read_key


@dataclass(frozen=True)
class Column:
    """A column of a table: its metric's name (Table 1: its data set) and its two header lines."""

    key: str
    group: str
    name: str

    @property
    def metric(self) -> MetricKey:
        """What it shows.

        Raises:
            ValueError: no metric has this name, as in Table 1.
        """
        return read_key(self.key)

    @property
    def dataset(self) -> str:
        """The test set it is measured on; "" for one over several."""
        return self.metric.test_set


@dataclass(frozen=True)
class Cell:
    """One figure in printed units (points, i.e. fraction × 100; PSNR: dB; Table 1: a count). ``written`` is Table 1's
    number of studies or images that passed ingest; ``comparable`` is False for counts of a phantom archive.

    ``clean``: the same figure on the ``clean_n`` test images that training has not seen; None where nothing is known to
    be seen, or no audit was made. ``removed``: how many images that leaves out (None = not audited). ``seeds``: the
    figure by seed. ``against``: (difference, low, high) to the row that ``Row.against`` names, over the same resamples.
    ``phantom``: measured on drawn images; ``own``: on a list of the user's own under the archive's name, which nothing
    of the paper can be compared with.
    """

    ours: float | None = None
    paper: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    written: int | None = None
    comparable: bool = True
    clean: float | None = None
    clean_low: float | None = None
    clean_high: float | None = None
    clean_n: int | None = None
    removed: int | None = None
    seeds: tuple[float, ...] = ()
    against: tuple[float, float, float] | None = None
    phantom: bool = False
    own: bool = False

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, or None where one of them is missing."""
        return None if self.ours is None or self.paper is None or self.own else self.ours - self.paper

    def beats(self, decimals: int) -> bool:
        """Whether our figure as printed is above the paper's, on a real test set: what bold says."""
        if self.ours is None or self.paper is None or self.phantom or self.own:
            return False
        return round(self.ours, decimals) > self.paper


@dataclass(frozen=True)
class Row:
    """One model (Table 1: one split). ``key`` is the run's name, or the paper row's where no run fills it; ``against``
    the run whose figures ``Cell.against`` is taken from."""

    key: str
    model: str
    cells: tuple[Cell, ...]
    backbone: str = ""
    data: str = ""
    run: str = ""
    against: str = ""


@dataclass(frozen=True)
class Table:
    """One table: "1" … "4" of the paper, "S1" … "S6" beside it.

    ``heads``: (title, attribute of ``Row``) of the columns left of the figures; ``command`` computes the figures.
    """

    number: str
    title: str
    measure: str
    heads: tuple[tuple[str, str], ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    decimals: int = 1
    confidence: float = 0.95
    command: str = ""


def table_of(
    number: str,
    form: Mapping[str, Any],
    heads: tuple[tuple[str, str], ...],
    columns: tuple[Column, ...],
    rows: Iterable[Row],
    notes: Iterable[str],
    **rest: Any,
) -> Table:
    """A table with the title, measure and command that its form in ``paper.yaml`` gives; ``rest``: as in ``Table``."""
    measure, command = form.get("measure", ""), form["command"]
    return Table(number, form["title"], measure, heads, columns, tuple(rows), tuple(notes), command=command, **rest)
