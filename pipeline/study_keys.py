"""The key that everything random about a study follows from: a hash of its ids and of what the number is for.

So a draw is the same in any order, on any number of processes and beside any other studies.
"""

from __future__ import annotations

from hashlib import blake2b

from pipeline.study import Study


def study_key(study: Study, *purpose: str | int) -> int:
    """A number from 0 to 2**63 - 1, decided by the purpose and the study's data set, patient and id alone.

    Args:
        purpose: what the number is for, such as a seed and an epoch. Keys of different purposes are independent.
    """
    start = "".join(f"{part}/" for part in purpose)
    return hashed(f"{start}{study.dataset}/{study.patient}\0{study.study}")


def hashed(name: str) -> int:
    """A number from 0 to 2**63 - 1, equal for equal names."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little") >> 1
