"""Processes that a process has started."""

from __future__ import annotations

import os
from multiprocessing import parent_process
from threading import Thread


def end_with_parent() -> None:
    """Make this process, which multiprocessing has started, end when its parent does: the ``initializer`` of a pool.

    A killed parent cannot tell its pool, and a process that waits for work would wait for ever. The parent holds a
    pipe that multiprocessing watches; the system closes it, whatever ended the parent. (Linux can send a signal, but
    does so already when the *thread* ends that has started the process.)
    """
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
