"""BatchNorm over the batch of all processes, so that their number changes nothing (the paper's SyncBatchNorm).

``GlobalBatchNorm`` is ours, because torch's SyncBatchNorm (2.15) refuses CPU tensors, which tests and the demo have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.config.records import ParamsError
from pipeline.models.vectors import at_least_float32
from pipeline.training.distributed import summed


class GlobalBatchNorm(_BatchNorm):
    """``nn.BatchNorm1d`` or ``2d`` with the statistics of all processes' rows, on any device; each has as many rows."""

    def forward(self, x: Tensor) -> Tensor:
        """[b, C, ...] -> [b, C, ...], of the input's type; statistics are taken in float32 at least."""
        if not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._normalised(at_least_float32(x)).to(x.dtype)

    def _normalised(self, x: Tensor) -> Tensor:
        world = torch.distributed.get_world_size()
        # Two sums rather than one of squares: a difference of large numbers would lose digits.
        others, wide = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
        mean = summed(x.mean(others)) / world
        centred = x - mean.view(wide)
        variance = summed(centred.square().mean(others)) / world
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            self._track(mean.detach(), variance.detach(), world * x.numel() // x.shape[1])
        y = centred * (variance + self.eps).rsqrt().view(wide)
        return y if self.weight is None else y * self.weight.view(wide) + self.bias.view(wide)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions will do."""

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        assert self.num_batches_tracked is not None and self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance * (count / max(1, count - 1)), share)  # unbiased, as torch keeps it


def has_batch_norm(model: nn.Module) -> bool:
    """Whether rows of a batch affect one another in training."""
    return any(isinstance(m, _BatchNorm) for m in model.modules())


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Make every BatchNorm below ``model`` take its statistics over all processes; parameters and keys stay.

    Raises:
        ParamsError: on the CPU, a kind of BatchNorm other than torch's own.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, _BatchNorm):
                continue
            if device.type == "cuda":
                from timm.layers import convert_sync_batchnorm

                setattr(parent, name, convert_sync_batchnorm(child))
            elif type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
                ours = GlobalBatchNorm(
                    *(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
                )
                ours.load_state_dict(child.state_dict())
                setattr(parent, name, ours.to(next(model.parameters())))
            else:
                raise ParamsError(
                    f"model.image_encoders: {type(child).__name__} cannot be synchronised on the CPU; train with one "
                    "process or on CUDA"
                )


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics are afterwards what they were: for a forward pass that is computed a second time inside."""
    buffers = [b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
    before = [b.clone() for b in buffers]
    yield
    for buffer, was in zip(buffers, before, strict=True):
        buffer.copy_(was)
