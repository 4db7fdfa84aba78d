"""How the C library gives memory back to the system."""

from __future__ import annotations

import ctypes


def keep_memory() -> None:
    """Make this process keep the memory it frees, where the C library is glibc.

    Every picture and every batch needs the same few blocks. Handed back to the system and fetched anew each time, they
    cost as much as the work on them: each page is cleared and mapped again. Forked processes are made to keep theirs.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 1 << 30)
