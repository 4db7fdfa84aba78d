"""The learning-rate schedule of pre-training and linear probe: linear warm-up, then cosine (paper section 4.2)."""

from __future__ import annotations

import math


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate at a step (from 0): rises to 1 over ``warmup`` steps without starting at 0, then
    falls along a cosine, reaching 0 at step ``total``."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
