"""A method is a set of weighted terms. Those that compare embeddings alone are here, all on one learnable scale:

    mvs   image-text pairs (paper equation 2; with ``mvs: false`` the first pair alone, which is CLIP)
    icl   the two images of a study (section 3.3)
    tcl   the two texts of a study

DeCLIP's further terms, which need networks or a memory of their own, are in ``pipeline.training.methods.declip``. What
is compared, two images of a study or one image twice, is the sampling rule's to say (``pipeline.training.batches``).

A process computes the rows of its own studies against the candidates of all processes: the mean over processes of what
it returns is the loss of the whole batch, and no process holds more than b x B logits of its b and all B studies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.params import Loss
from pipeline.models.vectors import at_least_float32


@dataclass(frozen=True)
class Embeddings:
    """Unit-norm embeddings of B studies, each [B, D]; the second of a kind is None where not sampled.

    ``labels``, int64 [B], are equal where two studies have the same labels (``pipeline.training.sampling.label_key``);
    None where no term asks.
    """

    image1: Tensor
    text1: Tensor
    image2: Tensor | None = None
    text2: Tensor | None = None
    labels: Tensor | None = None


def info_nce(a: Tensor, candidates: Tensor, scale: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over the rows of ``a`` of -log softmax(scale * cosines) at the target.

    Args:
        a: [b, D] unit-norm; ``candidates``: [B, D] unit-norm.
        scale: scalar that multiplies the cosines.
        target: int64 [b], which candidate belongs to a row; or [b, B], the share of each that does.
        label_smoothing: share of the target spread over all candidates.

    Returns:
        Scalar. Products and softmax are taken in float32 (float64 where the inputs are) whatever autocast says.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, candidates = at_least_float32(a), at_least_float32(candidates)
        return F.cross_entropy(scale.to(a.dtype) * a @ candidates.T, target, label_smoothing=label_smoothing)


def clip_loss(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    label_smoothing: float = 0.0,
    all_a: Tensor | None = None,
    all_b: Tensor | None = None,
    rank: int = 0,
    alike: Tensor | None = None,
) -> Tensor:
    """L_CLIP of equation 1: the mean of the two InfoNCE directions, row i of ``a`` belonging to row i of ``b``.

    Args:
        a, b: [b, D] unit-norm embeddings of this process.
        scale, label_smoothing: see ``info_nce``.
        all_a, all_b: [B, D] those of all processes, in order of rank; ``a`` and ``b`` themselves unless given.
        rank: of this process, so that row i of ``a`` is row rank * b + i of ``all_a``.
        alike: bool [b, B], which candidates belong to a row: the target is spread evenly over them, in both directions
            (UniCL's objective, Yang et al., CVPR 2022). None: the own one alone.

    Returns:
        Scalar: the mean over this process's rows.
    """
    all_a, all_b = a if all_a is None else all_a, b if all_b is None else all_b
    if alike is None:
        target = torch.arange(len(a), device=a.device) + rank * len(a)
    else:
        target = alike / alike.sum(dim=1, keepdim=True)
        target = target.to(torch.promote_types(a.dtype, torch.float32))
    rows = info_nce(a, all_b, scale, target, label_smoothing)
    columns = info_nce(b, all_a, scale, target, label_smoothing)
    return (rows + columns) / 2


def image_text_pairs(weights: Loss) -> list[tuple[str, str]]:
    """The pairs that count as image and text of one study, as names in ``Embeddings``."""
    return [(i, t) for i in ("image1", "image2") for t in ("text1", "text2")] if weights.mvs else [("image1", "text1")]


def cxr_clip_loss(
    e: Embeddings, scale: Tensor, weights: Loss, everyone: Embeddings | None = None, rank: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """mvs_weight * MVS + icl_weight * ICL + tcl_weight * TCL.

    MVS is the mean of L_CLIP over the four image-text pairs (equation 2), or L_CLIP of the first pair alone where
    ``weights.mvs`` is off (vanilla CLIP); with ``weights.label_positives`` its positives are all studies of the same
    labels. ICL = L_CLIP(I1, I2), TCL = L_CLIP(T1, T2). A term of weight 0 is not computed.

    Args:
        e: of this process's studies.
        everyone: of all processes' studies, in order of rank; ``e`` itself unless given.
        rank: of this process.

    Returns:
        The total and its unweighted parts by name (``mvs``, ``icl``, ``tcl``), all scalars, over this process's rows.

    Raises:
        ValueError: a term needs a second image or text, or labels, that were not sampled.
    """
    everyone = everyone or e
    alike = None
    if weights.label_positives:
        if e.labels is None or everyone.labels is None:
            raise ValueError("loss.label_positives needs the labels of the studies")
        alike = e.labels.unsqueeze(1) == everyone.labels

    def term(a: str, b: str, alike: Tensor | None = None) -> Tensor:
        mine = getattr(e, a), getattr(e, b)
        return clip_loss(*mine, scale, weights.label_smoothing, getattr(everyone, a), getattr(everyone, b), rank, alike)

    parts: dict[str, Tensor] = {}
    weighted: list[Tensor] = []
    if weights.mvs_weight:
        if weights.mvs and (e.image2 is None or e.text2 is None):
            raise ValueError("loss.mvs needs two images and two texts a study")
        parts["mvs"] = torch.stack([term(i, t, alike) for i, t in image_text_pairs(weights)]).mean()
        weighted.append(weights.mvs_weight * parts["mvs"])
    for name, weight, a, b in (
        ("icl", weights.icl_weight, "image1", "image2"),
        ("tcl", weights.tcl_weight, "text1", "text2"),
    ):
        if weight:
            if getattr(e, b) is None:
                raise ValueError(f"loss.{name}_weight needs two samples a study")
            parts[name] = term(a, b)
            weighted.append(weight * parts[name])
    total = weighted[0]
    for value in weighted[1:]:
        total = total + value
    return total, parts


def samples_needed(weights: Loss) -> tuple[int, int]:
    """How many images and texts a study the loss looks at: 1 or 2 of each."""
    images = weights.mvs or weights.icl_weight or weights.simsiam_weight
    return (2 if images else 1, 2 if weights.mvs or weights.tcl_weight else 1)
