"""Where the images are that a list names: the names of files as a list writes them -> files of the archive."""

from __future__ import annotations

import hashlib
import re
from unicodedata import normalize

from pipeline.ingest.sources.archive import Archive

DRIVE = re.compile(r"[A-Za-z]:/")


class Places:
    """Finds the files of an archive by the names that a list gives them.

    A name is a path below the root. Understood are ``\\`` for ``/``, ``./``, an absolute path below the root, and any
    Unicode form (NFC, as on Linux and Windows, or NFD, as on a Mac).
    """

    def __init__(self, files: Archive) -> None:
        self._root = "" if files.files.local is None else f"{files.files.local.absolute().as_posix()}/"
        self._present = set(files.names)
        self._by_form = {n: name for name in files.names if (n := normalize("NFC", name)) != name}

    def of(self, name: str) -> tuple[str, str]:
        """The file that a list's name means ("" = there is none), and the image's id, which does not depend on how the
        name is written."""
        for path in (name, self._plain(name)):
            if path in self._present:
                return path, image_id(path)
        form = normalize("NFC", self._plain(name))
        path = form if form in self._present else self._by_form.get(form, "")
        return path, image_id(form)

    def _plain(self, name: str) -> str:
        path = name.replace("\\", "/").removeprefix("file://")
        if self._root and path.startswith(self._root):
            path = path[len(self._root) :]
        return re.sub(r"/(\./|/)+", "/", re.sub(r"^(\./+)+", "", path))


def image_id(path: str) -> str:
    """The id of an image in the index and the audit: a digest of its path below the archive's root (blake2b-64, hex),
    because a file's name may be a person's. The Unicode form does not matter."""
    return hashlib.blake2b(normalize("NFC", path).encode(errors="surrogateescape"), digest_size=8).hexdigest()
