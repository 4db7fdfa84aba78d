"""How well a training uses its time: waiting for data, and model FLOPs against what the device can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pipeline.models.checkpoint import Net

T = TypeVar("T")
# Dense peak of 16-bit matrix products, FLOP/s, as the makers' data sheets give it; the first name that fits counts.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("A100", 312e12),
)


def peak(device: torch.device, precision: str) -> float | None:
    """Dense 16-bit FLOP/s of a device; None where we do not know it, or the arithmetic is of another width."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS if part in name), None)


class Work:
    """FLOPs of a model's training step, forward and backward, padding not counted."""

    def __init__(self, net: Net, image_size: int, max_tokens: int, device: torch.device) -> None:
        """Counts one forward pass of an image and of two texts. A text of n tokens costs a * n + b * n²."""
        training = net.training
        net.eval()
        self.image = _flops(net.encode_image, torch.zeros(1, image_size, image_size, dtype=torch.uint8, device=device))
        short, long = max(1, max_tokens // 2), max_tokens
        ids = torch.zeros(1, long, dtype=torch.int64, device=device)
        f, g = (_flops(net.encode_text, ids[:, :n], torch.ones_like(ids[:, :n])) for n in (short, long))
        self.square = (g / long - f / short) / (long - short) if long > short else 0.0
        self.token = g / long - self.square * long
        net.train(training)

    def of(self, images: int, lengths: Tensor) -> float:
        """FLOPs of a step on ``images`` images and texts of ``lengths`` tokens, int64 [m * B]. Backward is counted as
        two forwards."""
        n = lengths.double()
        return 3 * (images * self.image + float((self.token * n + self.square * n * n).sum()))


def _flops(forward: Callable[..., Tensor], *inputs: Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward(*inputs)
    return float(counter.get_total_flops())


def epoch_line(row: dict[str, float]) -> str:
    """An epoch's row of the history for those who watch."""
    return (
        f"epoch {row['epoch']}, loss {row['train_loss']:.3f}, validation {row['valid_loss']:.3f}, "
        f"{row['studies_per_second']:.1f} studies/s, {row['waiting']:.1%} of the time waiting for data, "
        f"MFU {format(row['mfu'], '.1%') if 'mfu' in row else '—'}"
    )


class Waiting(Generic[T]):
    """An iterable that adds up in ``seconds`` how long its user waited for the next item."""

    def __init__(self, items: Iterable[T], seconds: float = 0.0) -> None:
        self.items = items
        self.seconds = seconds

    def __iter__(self) -> Iterator[T]:
        """The items."""
        items = iter(self.items)
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item
