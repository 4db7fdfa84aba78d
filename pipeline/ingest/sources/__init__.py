"""Archives as their publishers lay them out -> ``Study`` records with the paper's splits. One module an archive.

A reader opens label files and reports, never an image. It yields every study the label files list, with all listed
views; a view whose file is not on disk has an empty ``path`` (ingest turns it into a reject). What cannot become a
study at all (unusable row, report without text) comes as a ``Reject``.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.config.archive_params import Source
from pipeline.datasets import MANIFEST, facts, known_datasets
from pipeline.ingest.sources.archive import Archive, SourceError, open_archive
from pipeline.storage.files import PACK_SUFFIXES, Files, FilesError
from pipeline.study import Reject, Study

__all__ = ["SourceError", "fingerprint", "notes", "open_archive", "read"]


def read_archive(archive: Archive, source: Source, seed: int) -> Iterator[Study | Reject]:
    """Every study of an archive, in a fixed order.

    Args:
        archive: as ``open_archive`` lists it.
        source: its entry in params.yaml.
        seed: used only where the paper's own list is absent (CheXpert5x200); the paper's splits have their own.

    Raises:
        SourceError: one of its label files is missing or has another layout; says where to get it.
    """
    # Imported by name, not through a table of names, so that every reader is found by searching for its module.
    match source.reader:
        case "mimic_cxr":
            from pipeline.ingest.sources.mimic_cxr import read_mimic_cxr

            return read_mimic_cxr(archive, _reports(archive, source))
        case "chexpert":
            from pipeline.ingest.sources.chexpert import read_chexpert

            return read_chexpert(archive, source.list_5x200, seed)
        case "chestxray14":
            from pipeline.ingest.sources.chestxray14 import read_chestxray14

            return read_chestxray14(archive, source.split)
        case "vindr_cxr":
            from pipeline.ingest.sources.vindr_cxr import read_vindr_cxr

            return read_vindr_cxr(archive)
        case "rsna":
            from pipeline.ingest.sources.rsna import read_rsna

            return read_rsna(archive, source.split)
        case "siim":
            from pipeline.ingest.sources.siim import read_siim

            return read_siim(archive)
        case "openi":
            from pipeline.ingest.sources.openi import read_openi

            return read_openi(archive, source.split)
        case "manifest":
            from pipeline.ingest.sources.manifest import read_manifest

            return read_manifest(archive, source.manifest, source.headings)
    raise SourceError(f"{archive.dataset}: there is no reader {source.reader!r}")


def _reports(archive: Archive, source: Source) -> Archive:
    """Where MIMIC-CXR's reports are: among the images, in another tree, or in one zip file."""
    if not source.reports:
        return archive
    if not source.reports.lower().endswith(PACK_SUFFIXES):
        return open_archive(archive.dataset, source.reports, archive.files.cache, source.follow_links)
    folder, _, pack = source.reports.rpartition("/")
    files = Files(folder or ".", archive.files.cache, follow_links=True)  # the one file that params.yaml names
    try:
        names, problems = files.list_pack(pack)
        return Archive(archive.dataset, files, tuple(names), tuple(problems), "")
    except FilesError as error:
        said = f"{archive.dataset}: {source.reports}: {error}. To get it: {facts(archive.dataset).access}"
        raise SourceError(said) from None


def archive_fingerprint(dataset: str, source: Source) -> dict[str, str]:
    """What changes whenever a file of an archive does: a digest of all names, sizes and times of change, of its images
    and, if they are elsewhere, of its reports and its CheXpert5x200 list. No file is opened.

    Raises:
        SourceError: there is nothing where it should be.
    """
    prints = {}
    for key, place in (("path", source.path), ("reports", source.reports), ("list_5x200", source.list_5x200)):
        files = Files(place, "", source.follow_links)
        if place and files.exists():
            prints[key] = files.fingerprint()
        elif place and files.local is not None and files.local.is_file():
            status = files.local.stat()
            prints[key] = f"{status.st_size} {status.st_mtime_ns}"
        elif place:
            raise SourceError(
                f"{dataset}: sources.{dataset}.{key}: {place} not found. To get it: {facts(dataset).access}"
            )
    return prints


def archive_notes(archive: Archive, source: Source) -> list[str]:
    """What a reader of the tables must know about how this archive was read; one sentence each."""
    if source.reader == MANIFEST and archive.dataset in known_datasets():
        return [
            "A list of your own under this name: not the archive as it is published, so not compared with the paper"
        ]
    if facts(archive.dataset).archive:  # the notes of the other reading say it
        return []
    if source.split != "paper":
        how = "as the owner's lists say" if source.split == "official" else "by patient"
        return [f"Split {how}, not as the paper does: the counts and metrics are not the paper's"]
    if source.reader == "chexpert":
        from pipeline.ingest.sources.chexpert import find_list

        if find_list(archive, source.list_5x200) is None:
            return ["CheXpert5x200 list absent: a seeded list drawn by the same rule is used"]
    return []
