"""The validation loss: what epochs are compared by."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset

from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig
from pipeline.storage.memory import local_world
from pipeline.training.batches import StudyDraw, ValidationSet, batches_of, validation_parts
from pipeline.training.distributed import any_of, gather_rows
from pipeline.training.method import Method

KEPT = 8 << 30  # bytes of batches that the processes of a machine keep from one validation to the next


class Validation:
    """The validation batches of a training. They are the same every time, so what fits ``KEPT`` is read once."""

    def __init__(self, method: Method[Any], sets: Sequence[ValidationSet], config: RunConfig) -> None:
        """Of w processes number r has batches r, r + w, ...; ``train.workers`` processes read them."""
        self.method = method
        self.config = config
        starts = [sum(map(len, sets[:i])) for i in range(len(sets))]
        self.sets = sets
        self._parts = [  # the data set of each batch, and its studies
            (i, part + start)
            for i, (data, start) in enumerate(zip(sets, starts, strict=True))
            for part in validation_parts(len(data), config.train.batch_size)
        ]
        self._kept: list[Any] = []
        self._bytes = 0  # of them, and of those that did not fit

    @torch.no_grad()
    def loss(self, asked: Callable[[], bool] = lambda: False) -> float | None:
        """The method's validation loss on fixed draws: the mean over studies, each batch counting for as many as it
        holds, then the mean over the data sets that have any.

        Each batch is computed by one process alone and sums are taken in the order of the batches, so with the same
        weights the number of processes changes nothing. The model is left in evaluation mode. All processes call it.

        Args:
            asked: whether this process has been asked to stop; looked at between batches.

        Returns:
            The loss, alike on all processes; None if one of them was asked to stop.

        Raises:
            ParamsError: no data set has two studies.
        """
        process = self.method.process
        if not self._parts:
            raise ParamsError(f"runs.{self.config.name}.datasets: none has a validation split of two studies or more")
        self.method.learner.eval()
        rounds = math.ceil(len(self._parts) / process.world)
        losses = torch.zeros(rounds, dtype=torch.float64, device=process.device)
        batches = self._batches()
        for n in range(rounds):
            if any_of([asked()], process.device)[0]:
                return None
            batch = next(batches, None)  # a process with fewer batches leaves a zero
            if batch is not None:
                losses[n] = self.method.validation_loss(batch)
        found = gather_rows(losses, process.device).T.flatten().tolist()
        weighed: dict[int, list[tuple[int, float]]] = {}
        for (data, part), loss in zip(self._parts, found, strict=False):
            weighed.setdefault(data, []).append((len(part), loss))
        means = [sum(n * loss for n, loss in of) / sum(n for n, _ in of) for of in weighed.values()]
        return sum(means) / len(means)

    def _batches(self) -> Iterator[Any]:
        """This process's batches, in order, on the CPU."""
        process = self.method.process
        mine = [part.tolist() for _, part in self._parts[process.rank :: process.world]]
        yield from self._kept
        left = mine[len(self._kept) :]
        if not left:
            return
        sets: ConcatDataset[StudyDraw] = ConcatDataset(self.sets)
        for batch in batches_of(sets, left, self.method.collate, self.config, self.config.train.workers):
            self._bytes += batch.nbytes
            if self._bytes <= KEPT // local_world():
                # A copy: what a process of the loader hands over holds shared memory and a file for each tensor.
                self._kept.append(batch.each(torch.clone) if self.config.train.workers else batch)
            yield batch
