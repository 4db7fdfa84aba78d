"""One training step: the objective and its gradients, the same on any number of processes and in any micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.params import Train
from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig
from pipeline.models.checkpoint import Net
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.keyed_random import row_keys
from pipeline.models.mixed import MixedNet
from pipeline.models.vectors import unit
from pipeline.training.batch_norm import has_batch_norm, statistics_kept
from pipeline.training.batches import Batch
from pipeline.training.declip import Learner
from pipeline.training.distributed import gathered
from pipeline.training.losses import Embeddings, cxr_clip_loss
from pipeline.training.mixed_batches import MixedBatch
from pipeline.training.mixed_losses import mixed_objective

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def training_loss(
    module: nn.Module, batch: Batch | MixedBatch, config: RunConfig, device: torch.device, world: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Embed a batch in one pass and compare it with the batches of all ``world`` processes.

    Args:
        module: a ``CxrClip``, a ``Learner`` around it where terms of DeCLIP are wanted, or the DDP of either; with a
            ``MixedBatch`` a ``MixedNet``.
        batch: this process's share, on any device.

    Returns:
        The total loss and its parts (see ``cxr_clip_loss``, ``Heads.terms`` and ``mixed_objective``) over this
        process's studies: their mean over processes is that of the whole batch, and so are the gradients that DDP
        averages.
    """
    if isinstance(batch, MixedBatch):
        with _autocast(config.train, device):
            return mixed_objective(_mixed(module), batch, config.loss, device, world)
    batch, words = _words_out(batch.to(device), _inner(module))
    with _autocast(config.train, device):
        images, texts, scale = module(batch.images, batch.tokens, batch.mask, *_row_keys(batch), *words)
    return _objective(_inner(module), images, texts, scale, batch, words, config, world)


@torch.no_grad()
def finite(net: Net, batch: Batch | MixedBatch, config: RunConfig, device: torch.device) -> Tensor:
    """Whether all embeddings of each of this process's studies are finite, bool [B]."""
    batch = batch.to(device)
    with _autocast(config.train, device):
        if isinstance(batch, MixedBatch):
            found = torch.ones_like(batch.keys, dtype=torch.bool)
            if len(batch.images):
                found[batch.image_of] &= net.encode_image(batch.images).isfinite().all(1)
            if len(batch.tokens):
                found[batch.text_of] &= net.encode_text(batch.tokens, batch.mask).isfinite().all(1)
            return found
        images, texts, _ = net(batch.images, batch.tokens, batch.mask, *_row_keys(batch))
    return _stacked(images, texts, batch).isfinite().flatten(2).all(2).all(0)


def compute_gradients(
    module: nn.Module,
    batch: Batch | MixedBatch,
    config: RunConfig,
    device: torch.device,
    world: int,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a step and, in ``.grad`` of every parameter, its gradient averaged over processes.

    With ``train.micro_batch`` below this process's share, activations are held for that many studies at a time and the
    result is still that of the whole batch; see ``_in_pieces``.

    Args:
        scaler: of fp16; gradients are then multiplied by its factor, as after ``scaler.scale(loss).backward()``.

    Returns:
        Loss and parts as numbers of the whole batch, alike on all processes and without a graph.
    """
    scaled: Callable[[Tensor], Tensor] = scaler.scale if scaler is not None else lambda loss: loss
    if isinstance(batch, MixedBatch):
        loss, parts = training_loss(module, batch, config, device, world)
        if loss.requires_grad:
            scaled(loss).backward()
        for p in module.parameters():  # without a part in this step; the optimizer's moments decay all the same
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if world > 1:
            _average_gradients(module, world)
    elif 0 < config.train.micro_batch < batch.studies:
        loss, parts = _in_pieces(_inner(module), batch.to(device), config, world, scaled)
    else:
        loss, parts = training_loss(module, batch, config, device, world)
        scaled(loss).backward()
    numbers = torch.stack([loss, *parts.values()]).detach()
    if world > 1:
        dist.all_reduce(numbers)
        numbers /= world
    return numbers[0], dict(zip(parts, numbers[1:], strict=True))


def _in_pieces(
    model: CxrClip | Learner, batch: Batch, config: RunConfig, world: int, scaled: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradients of the whole batch with the activations of a piece of it.

    1. Embed piece by piece and forget the activations. 2. The loss of all embeddings gives the gradient of each.
    3. Embed each piece again, with activations, and send its embeddings' gradient back.

    An image tower with BatchNorm cannot be cut, since its rows sway one another: it sees the whole batch once, keeps
    what lies between its blocks, and computes each block again on the way back. Heads of DeCLIP see the embeddings of
    the whole batch, once.
    """
    net = model.net if isinstance(model, Learner) else model
    batch, words = _words_out(batch, model)
    image_keys, text_keys = _row_keys(batch)
    images = _cut(batch.images, image_keys, size=config.train.micro_batch * len(batch.images) // batch.studies)
    texts = []
    keys = text_keys.split([len(t) for t in batch.tokens])
    for group in zip(batch.tokens, batch.mask, keys, *words, strict=True):
        texts += _cut(*group, size=config.train.micro_batch * len(batch.order) // batch.studies)
    whole = has_batch_norm(net.image_tower)
    if whole:
        images = [(batch.images, image_keys)]
        _compute_blocks_again(net)

    def embed(encode: Callable[..., Tensor], piece: tuple[Tensor, ...]) -> Tensor:
        with _autocast(config.train, batch.images.device):
            return encode(*piece)

    with torch.set_grad_enabled(whole):
        first_images = [embed(model.encode_image, piece) for piece in images]
    with torch.no_grad():
        first_texts = [embed(model.encode_text, piece) for piece in texts]
    all_images, all_texts = (torch.cat(first).detach().requires_grad_() for first in (first_images, first_texts))
    loss, parts = _objective(model, all_images, all_texts, net.scale, batch, words, config, world)
    scaled(loss).backward()
    assert all_images.grad is not None and all_texts.grad is not None
    with statistics_kept(net):
        for piece, grad in zip(texts, all_texts.grad.split([len(e) for e in first_texts]), strict=True):
            embed(model.encode_text, piece).backward(grad)
        for piece, first, grad in zip(
            images, first_images, all_images.grad.split([len(e) for e in first_images]), strict=True
        ):
            (first if whole else embed(model.encode_image, piece)).backward(grad)
    if world > 1:
        _average_gradients(model, world)
    return loss, parts


def _cut(*tensors: Tensor, size: int) -> list[tuple[Tensor, ...]]:
    """Pieces of ``size`` rows of tensors that belong together."""
    return list(zip(*(x.split(size) for x in tensors), strict=True))


def _compute_blocks_again(net: CxrClip) -> None:
    try:
        net.image_tower.model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        name = type(net.image_tower.model).__name__
        raise ParamsError(
            f"train.micro_batch: {name} has BatchNorm, so it needs the whole batch, and timm cannot checkpoint its "
            "blocks; set 0"
        ) from None


def _average_gradients(net: nn.Module, world: int) -> None:
    """What DDP does, for gradients that were gathered without it."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(total.view(grad.shape) / world)


def _row_keys(batch: Batch) -> tuple[Tensor, Tensor]:
    """Dropout's keys of the images, int64 [n * B], and of the texts in the order of their groups, int64 [m * B]."""
    images = row_keys(batch.keys, kind=0, samples=len(batch.images) // batch.studies)
    texts = row_keys(batch.keys, kind=1, samples=len(batch.order) // batch.studies)
    return images, texts[torch.argsort(batch.order)]


def _inner(module: nn.Module) -> CxrClip | Learner:
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(inner, CxrClip | Learner)
    return inner


def _mixed(module: nn.Module) -> MixedNet:
    assert isinstance(module, MixedNet)
    return module


def _words_out(batch: Batch, model: CxrClip | Learner) -> tuple[Batch, tuple[tuple[Tensor, ...], ...]]:
    """For a ``Learner`` the batch without some words of its first texts, and what they were, int64 [g, L_g] for each
    group, as a tuple of one; else the batch itself and an empty tuple."""
    if not isinstance(model, Learner):
        return batch, ()
    text_of = torch.argsort(batch.order)
    keys = row_keys(batch.keys, kind=2, samples=1)[text_of % batch.studies]
    sizes = [len(t) for t in batch.tokens]
    groups = zip(batch.tokens, batch.mask, keys.split(sizes), (text_of < batch.studies).split(sizes), strict=True)
    tokens, words = zip(*(model.heads.take_out(*group) for group in groups), strict=True)
    return replace(batch, tokens=tokens), (words,)


def _objective(
    model: CxrClip | Learner,
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    batch: Batch,
    words: tuple[tuple[Tensor, ...], ...],
    config: RunConfig,
    world: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """All terms of this process's studies, from what ``model`` encodes: [n * b, D] and [m * b, D] or, of a ``Learner``,
    [m * b, D + 1], texts in the order of the groups."""
    if not isinstance(model, Learner):
        return _contrast(images, texts, scale, batch, config, world)[:2]
    texts, missed = texts[:, :-1], texts[:, -1].sum()
    asked = torch.stack([(w >= 0).sum() for w in words[0]]).sum()
    if world > 1:
        dist.all_reduce(asked)
    loss, parts, (mine, everyone) = _contrast(unit(images), texts, scale, batch, config, world)
    heads, views = model.heads, images.unflatten(0, (-1, batch.studies)).unbind()
    rank = dist.get_rank() if world > 1 else 0
    missed = missed / asked.clamp(min=1)
    for name, weight, value in heads.terms(views, missed, mine, scale, config.loss, rank, world):
        parts[name] = value
        loss = loss + weight * value
    heads.remember(everyone, world)
    return loss, parts


def _contrast(
    images: Tensor, texts: Tensor, scale: Tensor, batch: Batch, config: RunConfig, world: int
) -> tuple[Tensor, dict[str, Tensor], tuple[Embeddings, Embeddings]]:
    """The contrastive terms of this process's embeddings, [n * b, D] and [m * b, D] in the order of the groups, by one
    gather; with the embeddings of this process and of all."""
    mine = _stacked(images, texts, batch)
    everyone = gathered(mine).transpose(0, 1).flatten(1, 2) if world > 1 else mine  # [n + m, B, D]
    count = len(images) // batch.studies
    rank = dist.get_rank() if world > 1 else 0
    labels = all_labels = None
    if config.loss.label_positives:
        labels = all_labels = batch.labels
        if world > 1:
            all_labels = gathered(labels).flatten()
    named = _named(mine, count, labels), _named(everyone, count, all_labels)
    return *cxr_clip_loss(named[0], scale, config.loss, named[1], rank), named


def _stacked(images: Tensor, texts: Tensor, batch: Batch) -> Tensor:
    return torch.cat([images, texts.index_select(0, batch.order)]).unflatten(0, (-1, batch.studies))


def _named(stacked: Tensor, images: int, labels: Tensor | None) -> Embeddings:
    """[n + m, B, D], the ``images`` first, by name."""
    (image1, *image2), (text1, *text2) = stacked[:images], stacked[images:]
    return Embeddings(image1, text1, image2[0] if image2 else None, text2[0] if text2 else None, labels)


def _autocast(options: Train, device: torch.device) -> torch.autocast | nullcontext[None]:
    if options.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, PRECISIONS[options.precision])
