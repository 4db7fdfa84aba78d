"""What a stage says when it ends by an exception: one line to whoever can mend it, or a trace if the fault is ours."""

from __future__ import annotations

from pipeline.storage.faults import fault_line


def last_words(error: Exception, lower: str) -> str | None:
    """The line, "" if another process says it, or None: an exception that nobody foresaw, to be seen whole.

    Errors of input are ``ValueError``, ``OSError`` and our own kinds of ``RuntimeError``; what a disk refuses and a GPU
    without memory come in any type. ``lower``: the keys that decide how much memory of a GPU is taken.
    """
    if refused := fault_line(error):
        return refused
    if isinstance(error, RuntimeError) and "out of memory" in str(error):  # torch has several types for it
        first = ". ".join(str(error).split(". ")[:2]).partition("\n")[0]  # what was tried, without advice
        return f"{first}; lower {lower}"
    own = type(error).__module__.startswith("pipeline.")
    return str(error) if isinstance(error, ValueError | OSError) or (own and isinstance(error, RuntimeError)) else None
