"""The three contrastive terms of CXR-CLIP (paper section 3.3), all on one learnable scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.params import Loss


@dataclass(frozen=True)
class Embeddings:
    """Unit-norm embeddings of a batch of B studies, each [B, D]; the second of a kind is None where not sampled."""

    image1: Tensor
    text1: Tensor
    image2: Tensor | None = None
    text2: Tensor | None = None


def clip_loss(a: Tensor, b: Tensor, scale: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """L_CLIP of equation 1: the mean of the two InfoNCE directions, row i of ``a`` belonging to row i of ``b``.

    Args:
        a, b: [B, D] unit-norm embeddings of all ranks together.
        scale: scalar that multiplies the cosines.
        label_smoothing: share of the target spread over all candidates.

    Returns:
        Scalar, float32: the products are taken in float32 whatever the inputs' precision.
    """
    logits = scale.float() * a.float() @ b.float().T
    target = torch.arange(len(a), device=a.device)
    rows = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    columns = F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)
    return (rows + columns) / 2


def cxr_clip_loss(e: Embeddings, scale: Tensor, weights: Loss) -> tuple[Tensor, dict[str, Tensor]]:
    """MVS + icl_weight * ICL + tcl_weight * TCL.

    MVS is the mean of L_CLIP over the four image-text pairs (equation 2), or L_CLIP of the first pair alone where
    ``weights.mvs`` is off (vanilla CLIP). ICL = L_CLIP(I1, I2), TCL = L_CLIP(T1, T2). A term of weight 0 is not
    computed.

    Returns:
        The total and its unweighted parts by name (``mvs``, ``icl``, ``tcl``), all scalars.

    Raises:
        ValueError: a term needs a second image or text that was not sampled.
    """
    parts: dict[str, Tensor] = {}
    if weights.mvs:
        if e.image2 is None or e.text2 is None:
            raise ValueError("loss.mvs needs two images and two texts a study")
        pairs = [(i, t) for i in (e.image1, e.image2) for t in (e.text1, e.text2)]
    else:
        pairs = [(e.image1, e.text1)]
    parts["mvs"] = torch.stack([clip_loss(i, t, scale, weights.label_smoothing) for i, t in pairs]).mean()
    total = parts["mvs"]
    for name, weight, a, b in (
        ("icl", weights.icl_weight, e.image1, e.image2),
        ("tcl", weights.tcl_weight, e.text1, e.text2),
    ):
        if weight:
            if b is None:
                raise ValueError(f"loss.{name}_weight needs two samples a study")
            parts[name] = clip_loss(a, b, scale, weights.label_smoothing)
            total = total + weight * parts[name]
    return total, parts


def samples_needed(weights: Loss) -> tuple[int, int]:
    """How many images and texts a study the loss looks at: 1 or 2 of each."""
    return (2 if weights.mvs or weights.icl_weight else 1, 2 if weights.mvs or weights.tcl_weight else 1)
