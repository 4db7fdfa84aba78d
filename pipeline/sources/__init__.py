"""Archives as their publishers lay them out -> ``Study`` records with the paper's splits. One module an archive.

A reader opens label files and reports, never an image. It yields every study the label files list, with all listed
views; a view whose file is not on disk has an empty ``path`` (ingest turns it into a reject). What cannot become a
study at all (unusable row, report without text) comes as a ``Reject``.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.params import Source
from pipeline.sources.archive import SourceError
from pipeline.study import Reject, Study

__all__ = ["SourceError", "notes", "read"]


def read(dataset: str, source: Source, seed: int) -> Iterator[Study | Reject]:
    """Every study of an archive, in a fixed order.

    Args:
        dataset: key of the archive, e.g. ``mimic_cxr``.
        source: where the archive lies.
        seed: used only where the paper's own list is absent (CheXpert5x200); the paper's splits have their own.

    Raises:
        SourceError: the archive or one of its label files is missing or has another layout; says where to get it.
    """
    # Imported by name, not through a table of names, so that every reader is found by searching for its module.
    match dataset:
        case "mimic_cxr":
            from pipeline.sources.mimic_cxr import read_mimic_cxr

            return read_mimic_cxr(source)
        case "chexpert":
            from pipeline.sources.chexpert import read_chexpert

            return read_chexpert(source, seed)
        case "chestxray14":
            from pipeline.sources.chestxray14 import read_chestxray14

            return read_chestxray14(source)
        case "vindr_cxr":
            from pipeline.sources.vindr_cxr import read_vindr_cxr

            return read_vindr_cxr(source)
        case "rsna":
            from pipeline.sources.rsna import read_rsna

            return read_rsna(source)
        case "siim":
            from pipeline.sources.siim import read_siim

            return read_siim(source)
        case "openi":
            from pipeline.sources.openi import read_openi

            return read_openi(source)
    raise SourceError(f"{dataset}: there is no reader for this data set")


def notes(dataset: str, source: Source) -> list[str]:
    """What a reader of the tables must know about how this archive was read; one sentence each."""
    if dataset == "chexpert":
        from pipeline.sources.chexpert import list_file

        if list_file(source) is None:
            return ["CheXpert5x200 list absent: a seeded list drawn by the same rule is used, without impressions"]
    return []
