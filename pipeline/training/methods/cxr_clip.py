"""CXR-CLIP's way to pre-train (paper section 3): two views and two texts of each study, compared pair by pair.

What it compares, and how they are weighed, is in ``pipeline.training.losses``. The functions below the method are also
DeCLIP's, which adds terms to these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.config.params import Train
from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.keyed_random import row_keys
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.batch_norm import has_batch_norm, statistics_kept
from pipeline.training.batches import Batch, Collate, collator
from pipeline.training.distributed import Process, gathered
from pipeline.training.losses import Embeddings, cxr_clip_loss
from pipeline.training.method import Scaled, Stateful, Terms
from pipeline.training.step import FORWARD, autocast, average_gradients, distributed_module, made_ready
from pipeline.training.throughput import Work

TERMS = ("mvs", "icl", "tcl")
Groups = Sequence[tuple[Any, ...]]  # of a batch's texts: of each length group tokens, mask, keys and more, row by row


class CxrClipMethod:
    """See ``pipeline.training.method.Method``; a batch is a ``Batch``."""

    terms = TERMS

    def __init__(self, net: CxrClip, tokenizer: Tokenizer, config: RunConfig, process: Process) -> None:
        """``net``: untrained, on any device."""
        self.config = config
        self.process = process
        self.net = self.learner = made_ready(net, net, config.train, process)
        self.module = distributed_module(net, process)
        self.state: Mapping[str, Stateful] = {}
        self.collate: Collate[Batch] = collator(tokenizer, config)

    @classmethod
    def build(cls, config: RunConfig, tokenizer: Tokenizer, process: Process) -> CxrClipMethod:
        """With the untrained model that a run's parameters describe."""
        return cls(CxrClip(config, len(tokenizer)), tokenizer, config, process)

    def loss(self, batch: Batch) -> Terms:
        """Embed a batch in one pass and compare it with the batches of all processes; see ``Method.gradients``."""
        batch = batch.to(self.process.device)
        with autocast(self.config.train, self.process.device):
            images, texts, scale = self.module(batch.images, batch.tokens, batch.mask, *dropout_keys(batch))
        return contrast(images, texts, scale, batch, self.config, self.process)[:2]

    def gradients(self, batch: Batch, scaled: Scaled) -> Terms:
        """See ``Method``. With ``train.micro_batch`` below this process's share, activations are held for that many
        studies at a time; see ``gradients_in_pieces``."""
        if not 0 < self.config.train.micro_batch < batch.studies:
            loss, parts = self.loss(batch)
            scaled(loss).backward()
            return loss, parts
        on = batch.to(self.process.device)

        def compare(images: Tensor, texts: Tensor) -> Terms:
            return contrast(images, texts, self.net.scale, on, self.config, self.process)[:2]

        net = self.net
        terms = gradients_in_pieces(
            net, on, text_groups(on), net.encode_image, net.encode_text, compare, scaled, self.config.train
        )
        average_gradients(net, self.process.world)
        return terms

    def validation_loss(self, batch: Batch) -> Tensor:
        """See ``Method``."""
        return contrast_alone(self.net, batch, self.config, self.process)

    def finite(self, batch: Batch) -> Tensor:
        """See ``Method``."""
        return finite_studies(self.net, batch, self.config, self.process)

    def meter(self) -> Callable[[Batch], float]:
        """See ``Method``."""
        return meter_of(self.net, self.config, self.process)


# ---- what DeCLIP does alike


def dropout_keys(batch: Batch) -> tuple[Tensor, Tensor]:
    """Dropout's keys of the images, int64 [n * B], and of the texts in the order of their groups, int64 [m * B]."""
    images = row_keys(batch.keys, kind=0, samples=len(batch.images) // batch.studies)
    texts = row_keys(batch.keys, kind=1, samples=len(batch.order) // batch.studies)
    return images, texts[torch.argsort(batch.order)]


def text_groups(batch: Batch, *more: Sequence[Any]) -> Groups:
    """Of each length group tokens and mask, int64 [g, L_g], dropout's keys, int64 [g], and what ``more`` has of it."""
    keys = dropout_keys(batch)[1].split([len(t) for t in batch.tokens])
    return list(zip(batch.tokens, batch.mask, keys, *more, strict=True))


def contrast(
    images: Tensor, texts: Tensor, scale: Tensor, batch: Batch, config: RunConfig, process: Process
) -> tuple[Tensor, dict[str, Tensor], Embeddings, Embeddings]:
    """The contrastive terms of this process's embeddings, unit-norm [n * b, D] and [m * b, D] in the order of the
    groups, by one gather; with the embeddings of this process and of all."""
    world = process.world
    mine = _stacked(images, texts, batch)
    everyone = gathered(mine).transpose(0, 1).flatten(1, 2) if world > 1 else mine  # [n + m, B, D]
    count = len(images) // batch.studies
    labels = all_labels = None
    if config.loss.label_positives:
        labels = all_labels = batch.labels
        if world > 1:
            all_labels = gathered(labels).flatten()
    own, candidates = _named(mine, count, labels), _named(everyone, count, all_labels)
    return *cxr_clip_loss(own, scale, config.loss, candidates, process.rank), own, candidates


def gradients_in_pieces(
    net: CxrClip,
    batch: Batch,
    groups: Groups,
    encode_image: Callable[[Tensor, Tensor], Tensor],
    encode_text: Callable[..., Tensor],
    compare: Callable[[Tensor, Tensor], Terms],
    scaled: Scaled,
    options: Train,
) -> Terms:
    """Loss and gradients of this process's whole share with the activations of ``train.micro_batch`` studies of it.

    1. Embed piece by piece and forget the activations. 2. The loss of all embeddings gives the gradient of each.
    3. Embed each piece again, with activations, and send its embeddings' gradient back.

    An image tower with BatchNorm cannot be cut, since its rows affect one another: it sees the whole batch once, keeps
    what is between its blocks, and computes each block again in the backward pass.

    Args:
        batch: on the device; ``groups``: its texts, each a row of arguments of ``encode_text``.
        encode_image: images and dropout's keys to rows, ``encode_text`` a group to rows.
        compare: all rows of images and of texts (in the order of the groups) to the terms.

    Raises:
        ParamsError: a tower has BatchNorm, and timm cannot compute its blocks again.
    """
    image_keys = dropout_keys(batch)[0]
    images = _cut(batch.images, image_keys, size=options.micro_batch * len(batch.images) // batch.studies)
    texts = []
    for group in groups:
        texts += _cut(*group, size=options.micro_batch * len(batch.order) // batch.studies)
    whole = has_batch_norm(net.image_tower)
    if whole:
        images = [(batch.images, image_keys)]
        _compute_blocks_again(net)

    def embed(encode: Callable[..., Tensor], piece: tuple[Any, ...]) -> Tensor:
        with autocast(options, batch.images.device):
            return encode(*piece)

    with torch.set_grad_enabled(whole):
        first_images = [embed(encode_image, piece) for piece in images]
    with torch.no_grad():
        first_texts = [embed(encode_text, piece) for piece in texts]
    all_images, all_texts = (torch.cat(first).detach().requires_grad_() for first in (first_images, first_texts))
    loss, parts = compare(all_images, all_texts)
    scaled(loss).backward()
    assert all_images.grad is not None and all_texts.grad is not None
    with statistics_kept(net):
        for piece, grad in zip(texts, all_texts.grad.split([len(e) for e in first_texts]), strict=True):
            embed(encode_text, piece).backward(grad)
        for piece, first, grad in zip(
            images, first_images, all_images.grad.split([len(e) for e in first_images]), strict=True
        ):
            (first if whole else embed(encode_image, piece)).backward(grad)
    return loss, parts


def contrast_alone(net: CxrClip, batch: Batch, config: RunConfig, process: Process) -> Tensor:
    """The contrastive loss of a batch by itself, whatever other processes do; ``net`` is in evaluation mode, where rows
    do not affect one another, and sees ``FORWARD`` studies at a time."""
    device = process.device
    batch = batch.to(device)
    pieces = _cut(batch.images, size=FORWARD * len(batch.images) // batch.studies)
    texts = [piece for group in zip(batch.tokens, batch.mask, strict=True) for piece in _cut(*group, size=2 * FORWARD)]
    with autocast(config.train, device):
        image_rows = torch.cat([net.encode_image(*piece) for piece in pieces])
        text_rows = torch.cat([net.encode_text(*piece) for piece in texts])
    return contrast(image_rows, text_rows, net.scale, batch, config, Process(device))[0]


@torch.no_grad()
def finite_studies(net: CxrClip, batch: Batch, config: RunConfig, process: Process) -> Tensor:
    """Whether all embeddings of each of this process's studies are finite, bool [b]."""
    batch = batch.to(process.device)
    with autocast(config.train, process.device):
        images, texts, _ = net(batch.images, batch.tokens, batch.mask, *dropout_keys(batch))
    return _stacked(images, texts, batch).isfinite().flatten(2).all(2).all(0)


def meter_of(net: CxrClip, config: RunConfig, process: Process) -> Callable[[Batch], float]:
    """What counts the FLOPs of the two encoders in a step on a batch."""
    work = Work(net, config.image_size, config.text_encoder.max_tokens, process.device)
    return lambda batch: work.of(len(batch.images), torch.cat([mask.sum(dim=1) for mask in batch.mask]))


def _cut(*parts: Any, size: int) -> list[tuple[Any, ...]]:
    """Pieces of ``size`` rows of tensors and tuples that belong together."""
    return [tuple(x[start : start + size] for x in parts) for start in range(0, len(parts[0]), size)]


def _compute_blocks_again(net: CxrClip) -> None:
    try:
        net.image_tower.model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        name = type(net.image_tower.model).__name__
        raise ParamsError(
            f"train.micro_batch: {name} has BatchNorm, so it needs the whole batch, and timm cannot checkpoint its "
            "blocks; set 0"
        ) from None


def _stacked(images: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    """All rows of a study's images and texts together, [n + m, b, D]."""
    return torch.cat([images, texts.index_select(0, batch.order)]).unflatten(0, (-1, batch.studies))


def _named(stacked: Tensor, images: int, labels: Tensor | None) -> Embeddings:
    """[n + m, B, D], the ``images`` first, by name."""
    (image1, *image2), (text1, *text2) = stacked[:images], stacked[images:]
    return Embeddings(image1, text1, image2[0] if image2 else None, text2[0] if text2 else None, labels)
