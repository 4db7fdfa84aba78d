"""What a training asks of a method. Each one is an object in ``pipeline.training.methods``; loop, step, validation and
saved state know what is said here, and none of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from pipeline.models.checkpoint import Net
from pipeline.training.batches import B, Collate
from pipeline.training.distributed import Process

Terms = tuple[Tensor, dict[str, Tensor]]  # the weighted sum of a method's terms, and each of them by name; all scalars
Scaled = Callable[[Tensor], Tensor]  # a loss, as it is sent back: times the factor of fp16's scaler


class Stateful(Protocol):
    """Model, optimizer, schedule, scaler; what a method has beside its model."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text alone."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over such a state."""


class Method(Protocol[B]):
    """One way to pre-train, on this process's share of each batch."""

    @property
    def process(self) -> Process:
        """This one among those that train together."""
        ...

    @property
    def net(self) -> Net:
        """The model, all that evaluation reads."""
        ...

    @property
    def learner(self) -> nn.Module:
        """All that has weights to train: the net itself, or a module around it."""
        ...

    @property
    def state(self) -> Mapping[str, Stateful]:
        """What has a state of its own beside the net, by name."""
        ...

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the loss's terms, which are columns of the history."""
        ...

    @property
    def collate(self) -> Collate[B]:
        """This process's draws of a step to a batch on the CPU, with ``places``, int64 [b], of the studies."""
        ...

    def gradients(self, batch: B, scaled: Scaled) -> Terms:
        """The loss over this process's studies, and in ``.grad`` of every parameter the gradient of ``scaled`` of it,
        averaged over processes. The mean of the loss and of each term over processes is that of the whole batch."""
        ...

    def validation_loss(self, batch: B) -> Tensor:
        """What epochs are compared by: the loss of a batch by itself, whatever other processes do; a scalar. The net is
        in evaluation mode, and no gradient is wanted."""
        ...

    def finite(self, batch: B) -> Tensor:
        """Whether all embeddings of each of this process's studies are finite, bool [b]. All processes call it."""
        ...

    def meter(self) -> Callable[[B], float] | None:
        """What counts the FLOPs of a step on a batch; None where they are not counted."""
        ...
