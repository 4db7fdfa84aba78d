"""Random numbers that depend on a key and a position alone, in torch, the same on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int, bits: int) -> int:
    """The signed integer of the same bits; torch multiplies those and keeps the low bits of the product."""
    return value - (1 << bits) if value >> (bits - 1) else value


# Odd multipliers of the usual kind: those of splitmix64 and of a 32-bit finaliser found by search for low bias.
_FIRST64, _SECOND64 = _signed(0xBF58476D1CE4E5B9, 64), _signed(0x94D049BB133111EB, 64)
_STEP32 = _signed(0x9E3779B1, 32)
_FIRST32, _SECOND32 = 0x7FEB352D, _signed(0x846CA68B, 32)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's own drags the sign along."""
    return (x >> by).bitwise_and_((1 << (torch.iinfo(x.dtype).bits - by)) - 1)


def mix_bits(x: Tensor) -> Tensor:
    """A bijection of int64 (or int32) after which every bit of the input affects every bit of the output."""
    if x.dtype == torch.int64:
        x = (x ^ _shifted(x, 30)) * _FIRST64
        x = (x ^ _shifted(x, 27)) * _SECOND64
        return x ^ _shifted(x, 31)
    x = (x ^ _shifted(x, 16)) * _FIRST32
    x = (x ^ _shifted(x, 15)) * _SECOND32
    return x ^ _shifted(x, 16)


def row_keys(keys: Tensor, kind: int, samples: int) -> Tensor:
    """Keys of the rows of a tower: int64 [samples * B], all first samples first.

    Args:
        keys: int64 [B], one a study and epoch.
        kind: 0 for images, 1 for texts, 2 for the words that are masked, 3 for hidden cells, 4 for what is masked
            together.
        samples: images (texts) a study, 1 or 2.
    """
    return torch.cat([mix_bits(mix_bits(keys) + 2 * kind + sample) for sample in range(samples)])


def keyed_mask(seeds: Tensor, shape: tuple[int, ...], rate: float) -> Tensor:
    """Which values to drop: bool [B, *shape], True with probability ``rate``, a number in (0, 1) met to within 2**-32;
    see ``keyed_numbers``."""
    return keyed_numbers(seeds, shape) < threshold(rate)


def threshold(rate: float) -> int:
    """The int32 that a share ``rate`` of all int32 is below."""
    return round(rate * 2**32) - 2**31


def keyed_numbers(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Random numbers: int32 [B, *shape], every value of the type as likely as any other.

    Number [b, i, j, ...] depends on ``seeds[b]``, i, j, ... alone, not on B or ``shape``.

    Args:
        seeds: int32 [B, 2].
    """
    return keyed_bits(seeds, position_hash(shape, seeds.device))


def position_hash(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A number for each position: int32 [*shape]."""
    position = torch.zeros((), dtype=torch.int32, device=device)
    for size in shape:
        position = mix_bits(position.unsqueeze(-1) + torch.arange(size, dtype=torch.int32, device=device) * _STEP32)
    return position


def keyed_bits(seeds: Tensor, position: Tensor) -> Tensor:
    """``keyed_numbers`` of positions whose hash is known."""
    first, second = (seed.view(-1, *[1] * position.dim()) for seed in seeds.unbind(1))
    x = (position ^ first).mul_(second | 1)
    return x.bitwise_xor_(_shifted(x, 16)).mul_(_FIRST32)


def stream_seeds(keys: Tensor) -> Tensor:
    """Keys int64 [...] -> seeds of ``keyed_numbers``, int32 [..., 2]."""
    return mix_bits(keys).unsqueeze(-1).view(torch.int32)
