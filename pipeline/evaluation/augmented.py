"""Training images of a probe or a fine-tuning under augmentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.config.params import Augment
from pipeline.evaluation.pictures import Pictures, Prepare
from pipeline.study import View
from pipeline.training.augment import augment_view


class AugmentedViews(Pictures):
    """Training images under augmentation; the draw of an image depends on seed, draw and its position alone."""

    def __init__(
        self, views: Sequence[View], size: int, options: Augment, seed: int, prepare: Prepare | None = None
    ) -> None:
        """``prepare``: uint8 [size, size] -> model input."""
        self.views, self.size, self.options = views, size, options
        self.seed, self.prepare = seed, prepare

    def __getitem__(self, item: tuple[int, int]) -> tuple[np.ndarray, int]:
        """The model's input and the position of the image; ``item``: (draw, position in ``views``)."""
        draw, position = item
        rng = np.random.default_rng([self.seed, draw, position])
        picture = augment_view(self.views[position], self.size, self.options, rng)
        return (self.prepare(picture) if self.prepare else picture), position
