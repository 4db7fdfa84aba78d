"""A checkpoint of torch, looked at before torch reads it: its directory may not promise more than the file holds."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

PICKLES = 16 << 20  # bytes of all pickles of an archive; a model of a thousand tensors has 200 KB, with optimizer 1 MB
END = b"PK\x05\x06\0\0\0\0"  # a zip's last record, of one volume; 22 bytes if no comment follows


class Refused(ValueError):
    """A file of somebody else's model that is not read; the message is one line: which file, what of it."""


def check_archive(path: Path) -> None:
    """Look at a torch checkpoint's directory, which takes no more memory than the directory itself.

    torch writes its entries as they are. A compressed entry, or entries that share bytes, could make a small file a
    large allocation. A pickle of the old format without an archive around it is bounded by the file itself.

    Raises:
        Refused: the archive is not as torch writes it, or is a tar, which torch would unpack.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch decides
        size = file.seek(0, 2)
        file.seek(max(0, size - 22))
        end = file.read()
    if not zipped:
        if size and _is_tar(path):
            raise Refused(f"{path}: a tar archive, which no torch since 2016 writes; refused")
        return
    # Two readers of zip may take different records for the last one if a comment follows it. torch writes none.
    if not end.startswith(END) or not end.endswith(b"\0\0"):
        raise Refused(f"{path}: not an archive as torch writes it; download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise Refused(f"{path}: not an archive of torch ({type(error).__name__}); download it again") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise Refused(f"{path}: has a compressed entry; torch writes none, so it is refused")
    if sum(entry.file_size for entry in entries) > size:
        raise Refused(f"{path}: its entries are larger than the file; refused")
    if sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl")) > PICKLES:
        raise Refused(f"{path}: its pickle is larger than {PICKLES >> 20} MB; refused")


def _is_tar(path: Path) -> bool:
    """Whether torch would take the file for a tar: not compressed, unlike what ``tarfile.is_tarfile`` tries."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True
