"""The learnable temperature of contrastive learning: a network's ``scale`` is one over it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class WithTemperature(nn.Module):
    """A network whose cosines are multiplied by a learnable scale, which is one over the temperature.

    The parameter is the scale's logarithm (CLIP, Radford et al., ICML 2021), under the key ``log_scale``.
    """

    def __init__(self, temperature: float, limits: tuple[float, float]) -> None:
        """``temperature``: the first one; ``limits``: of the scale, 0 for no bound (``loss.scale_limits``)."""
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.log_limits = [math.log(limit) if limit else -math.inf for limit in limits]

    @property
    def scale(self) -> Tensor:
        """The factor on the cosines, a scalar."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale(self) -> None:
        """Hold the scale within its limits; called after every step, so that the parameter can still come back. The
        paper and its release have no bounds; the default, 100 or below, is CLIP's."""
        self.log_scale.clamp_(*self.log_limits)
