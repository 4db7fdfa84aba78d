"""Dropout and stochastic depth whose masks belong to a study, not to the place where it happens to be computed.

A mask is a function of the row's key (study, epoch, seed, which of its images or texts), the layer and the position. So
it is the same on any number of processes, in any micro-batch, at any padded length, and when a pass is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.records import ParamsError
from pipeline.models.attention_kernel import is_fused, keyed_attention
from pipeline.models.dropout_kernel import keyed_dropout
from pipeline.models.keyed_random import stream_seeds

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
        return keyed_dropout(x, self.seeds(), self.p, self.whole_rows) if self.training else x

    def seeds(self) -> Tensor:
        """This layer's seed of each row in flight, int32 [B, 2]."""
        if self.rows.seeds is None:
            raise RuntimeError("dropout in training needs the keys of the rows: pass them to the tower's forward")
        return self.rows.seeds[self.layer]


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
    if getattr(model, "_supports_attention_backend", False):
        _route_attention(model)
    return rows


def _route_attention(model: Any) -> None:
    """A BERT of transformers hands its dropout rate to a function of attention: give it one that asks the module. Its
    own mask looks at the data to see whether it is needed, for which the device is waited for; ours does not."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _bias)
    model.set_attn_implementation(ATTENTION)


def _bias(
    batch_size: int,
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    mask_function: Any = None,
    **more: Any,
) -> Tensor | None:
    """What is added to scores, [B, 1, 1 or L, L]: 0 where to look, else the least number.

    Args:
        attention_mask: [B, L], which tokens are no padding; None: all.
        mask_function: of transformers, who may look where; other than plain attention to all, such as in a window.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is bidirectional_mask_function:
        looks = None if attention_mask is None else attention_mask.bool()[:, None, None]
    else:
        more |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        sizes = batch_size, q_length, kv_length
        looks = sdpa_mask(*sizes, attention_mask=attention_mask, mask_function=mask_function, **more)
    if looks is None:
        return None
    kind = looks.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    return torch.zeros(looks.shape, dtype=dtype, device=looks.device).masked_fill_(~looks, torch.finfo(dtype).min)


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
    """Attention over [B, heads, L, width] with a ``_bias`` -> [B, L, heads, width]."""
    if not dropout:  # evaluation, or no dropout here
        out = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if is_fused(query, attention_mask):
        assert attention_mask is not None
        drop: StudyDropout = module.dropout
        return keyed_attention(query, key, value, attention_mask, drop.seeds(), drop.p, scale)[0], None
    scores = (query * scale) @ key.transpose(2, 3)
    if attention_mask is not None:
        scores = scores + attention_mask
    with torch.autocast(query.device.type, enabled=False):  # softmax sums in float32 without a copy in it
        weights = module.dropout(scores.softmax(-1))
    return (weights @ value).transpose(1, 2).contiguous(), None
