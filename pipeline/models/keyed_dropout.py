"""Dropout and stochastic depth whose masks belong to a study, not to the place where it happens to be computed.

A mask is a function of the row's key (study, epoch, seed, which of its images or texts), the layer and the position. So
it is the same on any number of processes, in any micro-batch, at any padded length, and when a pass is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.records import ParamsError
from pipeline.models.keyed_random import keyed_mask, stream_seeds

ATTENTION = "study_dropout"  # the name under which transformers finds ``_attention``


class Rows:
    """What the dropout layers of one tower know of the rows in flight."""

    def __init__(self) -> None:
        self.layers = 0
        self.seeds: Tensor | None = None  # int32 [layers, B, 2]

    def are(self, keys: Tensor | None) -> None:
        """The tower is about to see rows with these keys (int64 [B]); None: rows without keys, for evaluation."""
        if keys is None or not self.layers:
            self.seeds = None
            return
        numbers = torch.arange(self.layers, device=keys.device).unsqueeze(1)
        self.seeds = stream_seeds(keys + numbers)


class StudyDropout(nn.Module):
    """``nn.Dropout`` (or with ``whole_rows`` stochastic depth) by the keys of the rows."""

    def __init__(self, p: float, rows: Rows, whole_rows: bool = False) -> None:
        super().__init__()
        if not 0 < p < 1:
            raise ParamsError(f"model: a dropout rate of {p} is outside (0, 1)")
        self.p = p
        self.rows = rows
        self.whole_rows = whole_rows
        self.layer = rows.layers
        rows.layers += 1

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> the same shape; [B * parts, ...] where the tower cut each row into parts, such as windows."""
        if not self.training:
            return x
        if self.rows.seeds is None:
            raise RuntimeError("dropout in training needs the keys of the rows: pass them to the tower's forward")
        seeds = self.rows.seeds[self.layer]
        shape = (x.shape[0] // len(seeds), *x.shape[1:])
        mask = keyed_mask(seeds, () if self.whole_rows else shape, self.p)
        mask = mask.view(-1, *[1] * len(shape)) if self.whole_rows else mask
        rows = x.unflatten(0, (len(seeds), -1))
        return (rows.masked_fill(mask, 0) * (1 / (1 - self.p))).flatten(0, 1)


def draw_by_study(model: nn.Module, what: str) -> Rows:
    """Put ``StudyDropout`` in the place of a tower's dropout and stochastic depth; in evaluation nothing changes.

    Args:
        model: of timm or transformers, changed in place.
        what: the key of the parameters that describes it, for errors.

    Returns:
        What has to be told the keys of the rows before each forward pass.

    Raises:
        ParamsError: the model drops something in a way that cannot be drawn by study.
    """
    rows = Rows()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout and child.p:
                setattr(parent, name, StudyDropout(child.p, rows))
                if name == "attn_drop" and hasattr(parent, "fused_attn"):
                    parent.fused_attn = False  # type: ignore[assignment]  # timm's fused attention draws by itself
            elif type(child).__name__ == "DropPath":
                if rate := float(child.drop_prob):  # type: ignore[arg-type]
                    setattr(parent, name, StudyDropout(rate, rows, whole_rows=True))
            elif "Drop" in type(child).__name__ and type(child) is not nn.Dropout:
                raise ParamsError(f"{what}: {type(child).__name__} cannot be drawn by study; set its rate to 0")
    if getattr(model, "drop_rate", 0):
        raise ParamsError(f"{what}: drop_rate {model.drop_rate} cannot be drawn by study; set it to 0")
    if getattr(model, "_supports_attention_backend", False) and rows.layers:
        _route_attention(model)
    return rows


def _route_attention(model: Any) -> None:
    """A BERT of transformers hands its dropout rate to a function of attention: give it one that asks the module."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention over [B, heads, L, width] with a bool mask [B, 1, L, L], True where to look -> [B, L, heads, width]."""
    if not dropout:  # evaluation, or no dropout here
        out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = module.dropout(scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)))
    return (weights.to(value.dtype) @ value).transpose(1, 2).contiguous(), None
