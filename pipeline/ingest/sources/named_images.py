"""The image files of a published archive by the name that its lists give them, wherever they are below the root."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from itertools import islice

from pipeline.ingest.sources.archive import IMAGE_SUFFIXES, Archive, SourceError
from pipeline.storage.files import FilesError, Gone, base_name

# Folders of what is made from pictures, beside them.
DERIVED = re.compile(r"(?i)mask|segment|thumb|preview|heat_?map|overlay|annotat")
MAX_FILE = 1 << 30  # bytes
COMPARED = 64  # pairs of files of one name whose bytes are compared


def images_by_stem(files: Archive) -> dict[str, str]:
    """File name without suffix -> path; see ``images_by``."""
    return images_by(files, _stem)


def images_by(files: Archive, name: Callable[[str], str]) -> dict[str, str]:
    """Name -> path of every image, in one of these formats: of two formats of one image, DICOM, PNG, JPEG, the first.

    An image below a folder of masks, segmentations, thumbnails, previews, heat maps, overlays or annotations is none,
    unless all are; a note says so. Two files of one name and format have to be the same: up to ``COMPARED`` pairs,
    spread over all there are, are compared.

    Args:
        name: of a path, without its suffix.

    Raises:
        SourceError: two files of one name differ; names both. Gone: see there.
    """
    images = files.images
    plain = [path for path in images if not _derived(path.rpartition("/")[0])]
    if plain and len(plain) < len(images):
        files.notes.append(
            f"{len(images) - len(plain)} images are passed over: their folders are named as those of masks, "
            "thumbnails or the like"
        )
    index: dict[str, str] = {}
    twins: list[tuple[str, str]] = []
    formats: list[tuple[str, str]] = []
    for suffix in IMAGE_SUFFIXES:
        for path in plain or images:
            if path.lower().endswith(suffix):
                first = index.setdefault(name(path), path)
                if first != path:
                    (twins if first.lower().endswith(suffix) else formats).append((first, path))
    for one, other in islice(twins, 0, None, max(1, len(twins) // COMPARED)):
        if not _same(files, one, other):
            raise SourceError(
                f"{files.dataset}: {files.files.root}: {one} and {other} are two pictures of one name; move the folder "
                "of one of them out of the archive"
            )
    if formats:
        taken, left = formats[0]
        files.notes.append(f"{len(formats)} images are there in two formats: {taken} was taken, not {left}, and so on")
    return index


@lru_cache(maxsize=1 << 16)
def _derived(folder: str) -> bool:
    return DERIVED.search(folder) is not None


def _stem(path: str) -> str:
    return base_name(path).rpartition(".")[0]


def _same(files: Archive, one: str, other: str) -> bool:
    """Whether two files hold the same bytes, or one of them cannot be read, which ingest will say."""
    try:
        return files.files.read(one, MAX_FILE) == files.files.read(other, MAX_FILE)
    except Gone:
        raise
    except FilesError:
        return True
