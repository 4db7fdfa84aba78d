"""What the readers share: finding label files and images under an archive's root, and the paper's random splits."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np

WHERE = {
    "mimic_cxr": "credentialed PhysioNet access: physionet.org/content/mimic-cxr-jpg (images, split and metadata csv) "
    "and physionet.org/content/mimic-cxr (reports)",
    "chexpert": "registration with Stanford AIMI: stanfordmlgroup.github.io/competitions/chexpert",
    "chestxray14": "open, NIH Clinical Center: nihcc.app.box.com/v/ChestXray-NIHCC",
    "vindr_cxr": "credentialed PhysioNet access: physionet.org/content/vindr-cxr",
    "rsna": "Kaggle account: kaggle.com/c/rsna-pneumonia-detection-challenge",
    "siim": "Kaggle account: kaggle.com/c/siim-acr-pneumothorax-segmentation",
    "openi": "open, NLM: openi.nlm.nih.gov/faq (NLMCXR_reports.tgz, NLMCXR_png.tgz, NLMCXR_dcm.tgz)",
}
IMAGE_SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")  # where one image comes in two formats, the earlier wins
LABELS = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}
MAX_CELL = 1 << 24  # characters; a run-length mask is longer than the csv module's default of 131,072 allows


class SourceError(ValueError):
    """An archive that cannot be read as a whole; one line with the path, what is wrong and what to do."""


def root(dataset: str, path: str) -> Path:
    """The archive's folder.

    Raises:
        SourceError: there is no such folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise SourceError(
            f"{dataset}: archive folder {folder} not found; set sources.{dataset}.path, or leave sources.{dataset} "
            f"out. To get it: {WHERE[dataset]}"
        )
    return folder


def find_table(folder: Path, names: Iterable[str], subfolders: Iterable[str] = ("",)) -> Path | None:
    """The first of the named csv files that exists, plain, ``.gz`` or ``.zip``, also with a ``kaggle_`` prefix."""
    for name in names:
        for subfolder in subfolders:
            for variant in (f"{prefix}{name}{suffix}" for prefix in ("", "kaggle_") for suffix in ("", ".gz", ".zip")):
                path = folder / subfolder / variant
                if path.is_file():
                    return path
    return None


def table(dataset: str, folder: Path, names: Sequence[str], subfolders: Sequence[str] = ("",)) -> Path:
    """As ``find_table``, for a file the archive cannot be read without.

    Raises:
        SourceError: none of the names exists.
    """
    path = find_table(folder, names, subfolders)
    if path is None:
        raise SourceError(
            f"{dataset}: label file {folder / subfolders[0] / names[0]} (or .gz, .zip) not found. "
            f"To get it: {WHERE[dataset]}"
        )
    return path


def rows(dataset: str, path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a csv file as text, column names and cells stripped of spaces; ids are never read as numbers.

    Args:
        columns: those the caller relies on.

    Raises:
        SourceError: a column is missing, or the file is damaged.
    """
    csv.field_size_limit(MAX_CELL)
    try:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise SourceError(f"{dataset}: {path}: no column {missing[0]!r}; is this the archive's own label file?")
            for cells in reader:
                if cells:
                    # A row cut short reads as blank cells: which is what it says.
                    cells += [""] * (len(header) - len(cells))
                    yield {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zipfile.BadZipFile) as error:
        raise SourceError(f"{dataset}: {path}: damaged ({type(error).__name__}); download it again") from None


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        members = [name for name in archive.namelist() if name.endswith(".csv")]
        if len(members) != 1:
            raise zipfile.BadZipFile("not one csv file")
        return archive.open(members[0])
    return path.open("rb")


def label(cell: str) -> int | None:
    """A label cell: 1, 0, -1, or ``None`` for blank (not mentioned).

    Raises:
        ValueError: anything else.
    """
    return None if cell == "" else _label(cell)


def _label(cell: str) -> int:
    if cell not in LABELS:
        raise ValueError("not a label")
    return LABELS[cell]


def images(folder: Path) -> list[str]:
    """Every image file under ``folder``, as sorted posix paths relative to it: one walk, no stat per listed row."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        relative = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        found += [str(relative / name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(found)


def by_stem(paths: Iterable[str]) -> dict[str, str]:
    """File name without suffix -> path. Of two formats of one image the DICOM wins, then the path that sorts first."""
    index: dict[str, str] = {}
    for path in sorted(paths, key=lambda p: (IMAGE_SUFFIXES.index(PurePosixPath(p).suffix.lower()), p)):
        index.setdefault(PurePosixPath(path).stem, path)
    return index


def split_two(n: int, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """The rows scikit-learn's ``train_test_split(range(n), test_size=share, random_state=seed)`` returns.

    Written out (one permutation of numpy's frozen ``RandomState``) because importing scikit-learn takes longer than
    reading a small archive; the tests compare the two.
    """
    if n < 2:
        return list(range(n)), []
    order = np.random.RandomState(seed).permutation(n).tolist()
    held = int(np.ceil(n * share))
    return order[held:], order[:held]


def train_valid(n: int) -> list[str]:
    """Split of each of ``n`` items, 80 / 20 (ChestX-ray14 and VinDr-CXR; paper Table 1)."""
    splits = ["train"] * n
    for i in split_two(n, 0.2)[1]:
        splits[i] = "valid"
    return splits


def train_valid_test(n: int) -> list[str]:
    """Split of each of ``n`` items, 70 / 15 / 15 (RSNA and SIIM; paper Table 1). The second cut's first half is test:
    only so do the paper's counts of 4,003 / 4,003 and 1,808 / 1,807 come out on the right sides.
    """
    splits = ["train"] * n
    rest = split_two(n, 0.3)[1]
    test, valid = split_two(len(rest), 0.5)
    for half, name in ((test, "test"), (valid, "valid")):
        for i in half:
            splits[rest[i]] = name
    return splits
