"""A checkpoint of torch, looked at before torch reads it: it may not promise more than the file holds."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Collection
from pathlib import Path

from pipeline.storage.torch_pickle import PICKLES, Checkpoint, Odd

OLD_PICKLES = 5  # of the format without an archive: two numbers, a table, what was saved, the storages' keys
END = b"PK\x05\x06\0\0\0\0"  # a zip's last record, of one volume; 22 bytes if no comment follows
RECORDS = 56 + 20 + 22  # bytes of those that end a large archive, which torch always writes


class Refused(ValueError):
    """A file of somebody else's model that is not read; the message is one line: which file, what of it."""


def check_archive(path: Path, known: Collection[str] = ()) -> None:
    """Look at a torch checkpoint's directory and at its pickles, which takes no more memory than these.

    torch writes its entries as they are. A compressed entry, or entries that share bytes, could make a small file a
    large allocation, and so could numbers in a pickle (``pipeline.storage.torch_pickle``), in an archive or without.

    Args:
        known: names in its pickles, beside torch's own, that are allowed since the caller reads them as inert.

    Raises:
        Refused: the file is not as torch writes it, states more than it holds, or is a tar, which torch would unpack.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # as torch decides
        size = file.seek(0, 2)
        file.seek(max(0, size - RECORDS))
        records = file.read()
    if not zipped and size and _is_tar(path):
        raise Refused(f"{path}: a tar archive, which no torch since 2016 writes; refused")
    try:
        checkpoint = Checkpoint(size, known)
        if zipped:
            for pickle in _pickles(path, size, records):
                checkpoint.follow(io.BytesIO(pickle))
        else:
            with path.open("rb") as file:
                start = io.BytesIO(file.read(PICKLES))
            for _ in range(OLD_PICKLES):
                checkpoint.follow(start)
    except Refused:
        raise
    except Odd as error:
        raise Refused(f"{path}: {error}; refused") from None
    except Exception as error:  # of any class, as the pickle may be anything
        raise Refused(f"{path}: not a checkpoint of torch ({type(error).__name__}); download it again") from None


def _pickles(path: Path, size: int, records: bytes) -> list[bytes]:
    """The pickles of an archive of ``size`` bytes that ends with ``records``, after a look at its directory."""
    # Two readers of zip may take different directories for the archive's, if a comment follows its last record or the
    # directory is not where that record says. Of what torch writes neither is so.
    if not _directory_ends(size, records):
        raise Refused(f"{path}: not an archive as torch writes it; download it again")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise Refused(f"{path}: has a compressed entry; torch writes none, so it is refused")
        if sum(entry.file_size for entry in entries) > size:
            raise Refused(f"{path}: its entries are larger than the file; refused")
        # torch finds it by its name without regard to case
        pickles = [entry for entry in entries if entry.orig_filename.lower().endswith(".pkl")]
        if len(pickles) > 1:
            raise Refused(f"{path}: has several pickles, as code for torch does; refused")
        if sum(entry.file_size for entry in pickles) > PICKLES:
            raise Refused(f"{path}: its pickle is larger than {PICKLES >> 20} MB; refused")
        return [archive.read(entry) for entry in pickles]


def _directory_ends(size: int, records: bytes) -> bool:
    """Whether the directory of a zip of ``size`` bytes is where its last ``records`` say: right before them."""
    large, end = records[:-22], records[-22:]
    if not end.startswith(END) or not end.endswith(b"\0\0"):
        return False
    *_, length, start = struct.unpack("<4s4H2I", end[:-2])
    at = size - 22
    if large[56:60] == b"PK\x06\x07":
        length, start = struct.unpack_from("<2Q", large, 40)
        at = size - RECORDS
        if large[:12] != b"PK\x06\x06" + struct.pack("<Q", 44) or struct.unpack_from("<Q", large, 64)[0] != at:
            return False
    return bool(start + length == at)


def _is_tar(path: Path) -> bool:
    """Whether torch would take the file for a tar: not compressed, unlike what ``tarfile.is_tarfile`` tries."""
    try:
        tarfile.open(path, "r:").close()
    except tarfile.TarError:
        return False
    return True
