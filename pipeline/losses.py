"""The three contrastive terms of CXR-CLIP (paper section 3.3), all on one learnable scale.

A process computes the rows of its own studies against the candidates of all processes: the mean over processes of what
it returns is the loss of the whole batch, and no process holds more than b x B logits of its b and all B studies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.params import Loss


@dataclass(frozen=True)
class Embeddings:
    """Unit-norm embeddings of B studies, each [B, D]; the second of a kind is None where not sampled."""

    image1: Tensor
    text1: Tensor
    image2: Tensor | None = None
    text2: Tensor | None = None


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision made single; single and double as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def clip_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    label_smoothing: float = 0.0,
    all_a: Tensor | None = None,
    all_b: Tensor | None = None,
    rank: int = 0,
) -> Tensor:
    """L_CLIP of equation 1: the mean of the two InfoNCE directions, row i of ``a`` belonging to row i of ``b``.

    Args:
        a, b: [b, D] unit-norm embeddings of this process.
        scale: scalar that multiplies the cosines.
        label_smoothing: share of the target spread over all candidates.
        all_a, all_b: [B, D] those of all processes, in order of rank; ``a`` and ``b`` themselves unless given.
        rank: of this process, so that row i of ``a`` is row rank * b + i of ``all_a``.

    Returns:
        Scalar: the mean over this process's rows. Products and softmax are taken in float32 (float64 where the inputs
        are) whatever autocast says.
    """
    all_a, all_b = a if all_a is None else all_a, b if all_b is None else all_b
    target = torch.arange(len(a), device=a.device) + rank * len(a)
    with torch.autocast(a.device.type, enabled=False):
        a, b, all_a, all_b = (at_least_float32(x) for x in (a, b, all_a, all_b))
        rows = F.cross_entropy(scale.to(a.dtype) * a @ all_b.T, target, label_smoothing=label_smoothing)
        columns = F.cross_entropy(scale.to(a.dtype) * b @ all_a.T, target, label_smoothing=label_smoothing)
    return (rows + columns) / 2


def cxr_clip_loss(
    e: Embeddings, scale: Tensor, weights: Loss, everyone: Embeddings | None = None, rank: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """MVS + icl_weight * ICL + tcl_weight * TCL.

    MVS is the mean of L_CLIP over the four image-text pairs (equation 2), or L_CLIP of the first pair alone where
    ``weights.mvs`` is off (vanilla CLIP). ICL = L_CLIP(I1, I2), TCL = L_CLIP(T1, T2). A term of weight 0 is not
    computed.

    Args:
        e: of this process's studies.
        everyone: of all processes' studies, in order of rank; ``e`` itself unless given.
        rank: of this process.

    Returns:
        The total and its unweighted parts by name (``mvs``, ``icl``, ``tcl``), all scalars, over this process's rows.

    Raises:
        ValueError: a term needs a second image or text that was not sampled.
    """
    everyone = everyone or e

    def term(a: str, b: str) -> Tensor:
        mine = getattr(e, a), getattr(e, b)
        return clip_loss(*mine, scale, weights.label_smoothing, getattr(everyone, a), getattr(everyone, b), rank)

    parts: dict[str, Tensor] = {}
    if weights.mvs:
        if e.image2 is None or e.text2 is None:
            raise ValueError("loss.mvs needs two images and two texts a study")
        pairs = [(i, t) for i in ("image1", "image2") for t in ("text1", "text2")]
    else:
        pairs = [("image1", "text1")]
    parts["mvs"] = torch.stack([term(i, t) for i, t in pairs]).mean()
    total = parts["mvs"]
    for name, weight, a, b in (
        ("icl", weights.icl_weight, "image1", "image2"),
        ("tcl", weights.tcl_weight, "text1", "text2"),
    ):
        if weight:
            if getattr(e, b) is None:
                raise ValueError(f"loss.{name}_weight needs two samples a study")
            parts[name] = term(a, b)
            total = total + weight * parts[name]
    return total, parts


def samples_needed(weights: Loss) -> tuple[int, int]:
    """How many images and texts a study the loss looks at: 1 or 2 of each."""
    return (2 if weights.mvs or weights.icl_weight else 1, 2 if weights.mvs or weights.tcl_weight else 1)
