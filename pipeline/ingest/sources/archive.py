"""What the readers share: an archive's files, its label tables and images among them, and the paper's random splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.datasets import facts
from pipeline.storage.files import Files, FilesError, Gone, base_name, decode_text

IMAGE_SUFFIXES = (".dcm", ".dicom", ".png", ".jpg", ".jpeg")  # where one image comes in two formats, the earlier wins
MAX_LIST = 64 << 20  # bytes of a file that is read whole; RSNA's mappings are 10 MB
MAX_REPORT = 1 << 20  # bytes; real ones are 10 kB


class SourceError(ValueError):
    """An archive that cannot be read as a whole; one line with the path, what is wrong and what to do."""


@dataclass(frozen=True)
class Archive:
    """One archive as a reader sees it: every file below its root, those inside zip and tar files included."""

    dataset: str
    files: Files
    names: tuple[str, ...]
    problems: tuple[tuple[str, str], ...]
    fingerprint: str
    # What a reader sees on its way: rows of the lists that say which images there are, by list, and sentences for
    # whoever reads the tables.
    rows: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[str]:
        """Every image file, sorted."""
        return [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES)]

    def text(self, name: str) -> str | None:
        """The text of a report, or ``None`` where it cannot be read or is too large to be one."""
        try:
            return decode_text(self.files.read(name, MAX_REPORT))
        except Gone:
            raise
        except FilesError:
            return None


def open_archive(dataset: str, path: str, cache: Path, follow_links: bool = False) -> Archive:
    """List an archive.

    Args:
        path: its folder or fsspec URL.
        cache, follow_links: see ``files.Files``.

    Raises:
        SourceError: there is nothing at ``path``.
    """
    files = Files(path, cache, follow_links)
    if not files.exists():
        raise SourceError(
            f"{dataset}: archive folder {path} not found; set sources.{dataset}.path, or leave sources.{dataset} "
            f"out. To get it: {facts(dataset).access}"
        )
    listing = files.walk()
    names = tuple(name for name in listing.files if not _is_litter(name))
    problems = tuple(problem for problem in listing.problems if not _is_litter(problem[0]))
    return Archive(dataset, files, names, problems, listing.fingerprint)


def _is_litter(name: str) -> bool:
    """Whether a file is what a Mac leaves beside each file: ``._image.png``, ``__MACOSX/``."""
    return any(part.startswith("._") or part == "__MACOSX" for part in name.replace("!", "").split("/"))


def find_table(archive: Archive, names: Iterable[str]) -> str | None:
    """The first of the named csv files that the archive has, plain or ``.gz``, loose or packed, also with a
    ``kaggle_`` prefix; of several, the one nearest to the root."""
    by_base: dict[str, str] = {}
    for name in sorted(archive.names, key=lambda n: (n.count("/"), n)):
        if name.lower().endswith((".csv", ".csv.gz")):
            by_base.setdefault(base_name(name), name)
    for name in names:
        variants = [f"{prefix}{name}{suffix}" for prefix in ("", "kaggle_") for suffix in ("", ".gz")]
        if found := [by_base[variant] for variant in variants if variant in by_base]:
            return min(found, key=lambda path: path.count("/"))  # the first of equally near ones
    return None


def required_table(archive: Archive, names: Sequence[str]) -> str:
    """As ``find_table``, for a file the archive cannot be read without.

    Raises:
        SourceError: none of the names exists.
    """
    name = find_table(archive, names)
    if name is None:
        seen = [f" ({at}: {why})" for at, why in archive.problems if base_name(at).startswith(tuple(names))]
        raise SourceError(
            f"{archive.dataset}: label file {names[0]} (or .gz, .zip) not found below {archive.files.root}"
            f"{''.join(seen[:1])}. To get it: {facts(archive.dataset).access}"
        )
    return name


def content(archive: Archive, name: str, most: int = MAX_LIST) -> bytes:
    """All of a label file.

    Raises:
        SourceError: it cannot be read, or is larger than ``most`` bytes. Gone: the archive is no longer there.
    """
    try:
        return archive.files.read(name, most)
    except Gone:
        raise
    except FilesError as error:
        raise SourceError(f"{archive.dataset}: {archive.files.root}/{name}: {error}; download it again") from None


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


def train_valid(n: int, share: float = 0.2) -> list[str]:
    """Split of each of ``n`` items, by default 80 / 20 (ChestX-ray14 and VinDr-CXR; paper Table 1)."""
    splits = ["train"] * n
    for i in split_two(n, share)[1]:
        splits[i] = "valid"
    return splits


def train_valid_test(n: int, held: float = 0.3) -> list[str]:
    """Split of each of ``n`` items, by default 70 / 15 / 15 (RSNA and SIIM; paper Table 1). The second cut's first half
    is test: only so do the paper's counts of 4,003 / 4,003 and 1,808 / 1,807 come out on the right sides.
    """
    splits = ["train"] * n
    rest = split_two(n, held)[1]
    test, valid = split_two(len(rest), 0.5)
    for half, name in ((test, "test"), (valid, "valid")):
        for i in half:
            splits[rest[i]] = name
    return splits
