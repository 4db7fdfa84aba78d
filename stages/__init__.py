"""The stages of dvc.yaml, one script each, and the commands beside them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any


def run(stage: str, main: Callable[..., Any], usage: str = "") -> None:
    """Call ``main`` with the command's arguments. Wrong arguments and errors of input end the process with one line."""
    words = sys.argv[1:]
    try:
        inspect.signature(main).bind(*words)
    except TypeError:
        sys.exit(f"usage: python -m stages.{stage} {usage}".rstrip())
    try:
        main(*words)
    except (ValueError, OSError, RuntimeError) as error:
        if type(error) is RuntimeError:  # of a library, and no error of input
            raise
        said = f"{stage} {'/'.join(words)}".rstrip() + f": {error}"
        sys.exit(said if str(error) else 1)  # of several processes one says why
