"""DeCLIP (Li et al., ICLR 2022): CXR-CLIP's step, and terms of its own with what each needs beside the two towers:

    nn        image -> the remembered text nearest to its own: a queue of texts
    simsiam   two images of a study (DeCLIP: two augmentations of one) predict one another: a projector and a predictor
    mlm       words that were taken out of the first text: a head on the text tower

All of it is training's alone: the model that evaluation reads is the ``CxrClip`` inside the ``Learner``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config.params import Loss
from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig
from pipeline.models.cxr_clip import CxrClip
from pipeline.models.keyed_random import row_keys
from pipeline.models.masked_tokens import MaskedWords, WordMask
from pipeline.models.vectors import at_least_float32, unit
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.batches import Batch, Collate, StudyDraw, collate
from pipeline.training.distributed import Process, gathered
from pipeline.training.losses import Embeddings, image_text_pairs, info_nce
from pipeline.training.method import Scaled, Stateful, Terms
from pipeline.training.methods.cxr_clip import (
    TERMS,
    contrast,
    contrast_alone,
    dropout_keys,
    finite_studies,
    gradients_in_pieces,
    meter_of,
    text_groups,
)
from pipeline.training.step import autocast, average_gradients, distributed_module, made_ready

WIDTH, BOTTLENECK = 1024, 512  # of the projector, and within the predictor


class TextQueue(nn.Module):
    """The texts of the latest steps, first in, first out."""

    texts: Tensor

    def __init__(self, size: int, dim: int) -> None:
        """Room for ``size`` embeddings, float32 [size, dim]; none is in it."""
        super().__init__()
        self.register_buffer("texts", torch.zeros(size, dim))
        self.seen = 0  # texts that ever were in it

    def push(self, texts: Tensor) -> None:
        """Add unit-norm [B, dim] in their order, in the place of the oldest."""
        size = len(self.texts)
        places = (self.seen + torch.arange(len(texts), device=texts.device))[-size:] % size
        self.texts[places] = texts.detach()[-size:].to(self.texts.dtype)
        self.seen += len(texts)

    @torch.no_grad()
    def nearest(self, texts: Tensor) -> Tensor:
        """For each of [b, dim] the remembered text of the largest cosine, [b, dim]; while none is, the text itself."""
        if not self.seen:
            return texts.detach()
        known = self.texts[: self.seen]
        return known[(texts.to(known.dtype) @ known.T).argmax(dim=1)].to(texts.dtype)

    def get_extra_state(self) -> Tensor:
        """What belongs to the state beside the texts."""
        return torch.tensor(self.seen)

    def set_extra_state(self, state: Tensor) -> None:
        """Inverse of ``get_extra_state``."""
        self.seen = int(state)


class SimSiam(nn.Module):
    """Chen & He, CVPR 2021: each of two embeddings of a picture predicts the other one, which is held still."""

    def __init__(self, dim: int, wide: int = WIDTH, narrow: int = BOTTLENECK) -> None:
        """``dim``: of the images' embeddings; ``wide``: of the projector's, and of what is predicted."""
        super().__init__()

        def layer(width: int, to: int) -> list[nn.Module]:
            return [nn.Linear(width, to, bias=False), nn.BatchNorm1d(to)]  # whose own bias would take any other away

        self.projector = nn.Sequential(*layer(dim, wide), nn.ReLU(), *layer(wide, wide), nn.ReLU(), *layer(wide, wide))
        self.predictor = nn.Sequential(*layer(wide, narrow), nn.ReLU(), nn.Linear(narrow, wide))

    def forward(self, image1: Tensor, image2: Tensor) -> Tensor:
        """Embeddings [b, dim], not normalised -> minus the mean cosine, a scalar from -1 to 1. BatchNorm sees each of
        the two by itself."""
        z1, z2 = self.projector(image1), self.projector(image2)
        p1, p2 = self.predictor(z1), self.predictor(z2)
        cosines = [F.cosine_similarity(p, z.detach(), dim=-1) for p, z in ((p1, z2), (p2, z1))]
        return -torch.cat(cosines).mean()


class Heads(nn.Module):
    """What the terms of one run need; None for a term of weight 0."""

    def __init__(self, net: CxrClip, config: RunConfig) -> None:
        super().__init__()
        loss, text = config.loss, net.text_tower
        self.queue = TextQueue(loss.queue, config.dim) if loss.nn_weight else None
        self.simsiam = SimSiam(config.dim) if loss.simsiam_weight else None
        self.words = None
        if loss.mlm_weight:
            self.words = MaskedWords(text.width, text.model.get_input_embeddings())

    def parts(self) -> dict[str, nn.Module | None]:
        """What each term of the history needs, by the term's name."""
        return {"nn": self.queue, "simsiam": self.simsiam, "mlm": self.words}

    def terms(
        self,
        images: tuple[Tensor, ...],
        missed: Tensor,
        mine: Embeddings,
        scale: Tensor,
        weights: Loss,
        rank: int,
        world: int,
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Name, weight and value of each term, over this process's studies: the mean over processes is the batch's.

        Args:
            images: embeddings before they get unit norm, [b, dim] each.
            missed: sum of -log p over this process's words that were taken out, over their number in the whole batch.
            mine: embeddings of this process.
        """
        if self.queue is not None:
            yield "nn", weights.nn_weight, neighbour_loss(mine, self.queue, scale, weights, rank, world)
        if self.simsiam is not None:
            with torch.autocast(images[0].device.type, enabled=False):
                value = self.simsiam(*(at_least_float32(image) for image in images))
            yield "simsiam", weights.simsiam_weight, value
        if self.words is not None:
            yield "mlm", weights.mlm_weight, missed * world

    def remember(self, everyone: Embeddings, world: int) -> None:
        """Put the first texts of a step in the queue, in the order of the batch: of w processes number r holds studies
        r, r + w, ..."""
        if self.queue is not None:
            self.queue.push(everyone.text1.unflatten(0, (world, -1)).transpose(0, 1).flatten(0, 1))


def neighbour_loss(e: Embeddings, queue: TextQueue, scale: Tensor, weights: Loss, rank: int, world: int) -> Tensor:
    """InfoNCE from images to the remembered texts nearest to their own, the mean over the image-text pairs; scalar.

    Candidates are the neighbours of the whole batch's texts. Nothing flows back into the queue, so the texts learn
    nothing from it.
    """
    target = torch.arange(len(e.text1), device=e.text1.device) + rank * len(e.text1)
    pairs = image_text_pairs(weights)
    near = {}
    for name in dict.fromkeys(text for _, text in pairs):
        own = queue.nearest(getattr(e, name))
        near[name] = gathered(own).flatten(0, 1) if world > 1 else own
    terms = [info_nce(getattr(e, i), near[t], scale, target, weights.label_smoothing) for i, t in pairs]
    return torch.stack(terms).mean()


class Learner(nn.Module):
    """A ``CxrClip`` and, beside it, what its training needs and nobody else."""

    def __init__(self, net: CxrClip, heads: Heads) -> None:
        super().__init__()
        self.net = net
        self.heads = heads

    def encode_image(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """As ``CxrClip.encode_image``, but before the embeddings get unit norm."""
        return at_least_float32(self.net.image_projection(self.net.image_tower(images, keys)))

    def encode_text(
        self, tokens: Tensor, mask: Tensor, keys: Tensor, words: Tensor | None = None, asked: Sequence[int] = ()
    ) -> Tensor:
        """As ``CxrClip.encode_text``, with one column more: the sum of -log p of the words that were taken out of a
        text; ``words`` and ``asked`` as in ``DeclipBatch``. [B, dim + 1]."""
        tower = self.net.text_tower
        hidden = tower.hidden(tokens, mask, keys)
        embeddings = unit(self.net.text_projection(tower.pooled(hidden, mask)))
        missed = embeddings.new_zeros(len(tokens))
        if self.heads.words is not None and words is not None:
            missed = self.heads.words(hidden, words, sum(asked), tower.model.get_input_embeddings().weight)
        return torch.cat([embeddings, missed.unsqueeze(1)], dim=1)

    def forward(
        self,
        images: Tensor,
        tokens: Sequence[Tensor],
        mask: Sequence[Tensor],
        image_keys: Tensor,
        text_keys: Tensor,
        *masked: Sequence[Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``encode_image`` and ``encode_text`` of all groups, and the scale; arguments as in ``CxrClip.forward``, then
        those of ``DeclipBatch.masked``."""
        keys = text_keys.split([len(t) for t in tokens])
        embedded = self.encode_image(images, image_keys)
        texts = [self.encode_text(*group) for group in zip(tokens, mask, keys, *masked, strict=True)]
        return embedded, torch.cat(texts), self.net.scale


def has_declip_terms(loss: Loss) -> bool:
    """Whether a run has any of these terms."""
    return bool(loss.nn_weight or loss.simsiam_weight or loss.mlm_weight)


@dataclass(frozen=True)
class DeclipBatch(Batch):
    """A ``Batch``, and its texts once more without some words; of a run without a term for them these are empty.

    Attributes:
        said, words: of each length group what ``WordMask.take_out`` gives of first texts, int64 [g, L_g]; all words of
            the second ones are left in.
        asked: how many words were taken out of each text, group by group.
    """

    said: tuple[Tensor, ...] = ()
    words: tuple[Tensor, ...] = ()
    asked: tuple[tuple[int, ...], ...] = ()

    @property
    def seen(self) -> tuple[Tensor, ...]:
        """The texts as the tower sees them in training."""
        return self.said or self.tokens

    @property
    def masked(self) -> tuple[Sequence[Any], ...]:
        """``words`` and ``asked``, if there are any."""
        return (self.words, self.asked) if self.words else ()


def collate_declip(
    samples: Sequence[StudyDraw], tokenizer: Tokenizer, groups: int, taker: WordMask | None
) -> DeclipBatch:
    """``collate``, and take words out; ``taker`` None: none."""
    batch = collate(samples, tokenizer, groups)
    if taker is None:
        return DeclipBatch(**vars(batch))
    text_of = torch.argsort(batch.order)  # of each row of the groups
    keys = row_keys(batch.keys, kind=2, samples=1)[text_of % batch.studies]
    sizes = [len(t) for t in batch.tokens]
    groups_of = zip(batch.tokens, batch.mask, keys.split(sizes), (text_of < batch.studies).split(sizes), strict=True)
    taken = [taker.take_out(tokens, mask * first.unsqueeze(1), key) for tokens, mask, key, first in groups_of]
    said, words = zip(*taken, strict=True)
    asked = tuple(tuple((w >= 0).sum(dim=1).tolist()) for w in words)
    return DeclipBatch(**vars(batch), said=said, words=words, asked=asked)


class DeclipMethod:
    """See ``pipeline.training.method.Method``; a batch is a ``DeclipBatch``. Validation is by contrastive terms alone,
    on whole texts."""

    def __init__(self, learner: Learner, tokenizer: Tokenizer, config: RunConfig, process: Process) -> None:
        """``learner``: untrained, on any device."""
        self.config = config
        self.process = process
        self.net = learner.net
        self.learner = made_ready(learner, learner.net, config.train, process)
        self.module = distributed_module(learner, process)
        self.state: Mapping[str, Stateful] = {"heads": learner.heads}
        self.terms = (*TERMS, *(name for name, part in learner.heads.parts().items() if part is not None))
        taker = WordMask.of(tokenizer, config.loss.mlm_rate) if config.loss.mlm_weight else None
        self.collate: Collate[DeclipBatch] = partial(
            collate_declip, tokenizer=tokenizer, groups=config.train.length_groups, taker=taker
        )

    @classmethod
    def build(cls, config: RunConfig, tokenizer: Tokenizer, process: Process) -> DeclipMethod:
        """With the untrained model that a run's parameters describe.

        Raises:
            ParamsError: the tokenizer has no [MASK].
        """
        net = CxrClip(config, len(tokenizer))
        if config.loss.mlm_weight and tokenizer.tokenizer.mask_token_id is None:
            raise ParamsError("loss.mlm_weight: the tokenizer of model.text_encoder has no [MASK]; set 0")
        return cls(Learner(net, Heads(net, config)), tokenizer, config, process)

    def loss(self, batch: DeclipBatch) -> Terms:
        """Embed a batch in one pass and compare it with the batches of all processes; see ``Method.gradients``."""
        batch = batch.to(self.process.device)
        with autocast(self.config.train, self.process.device):
            images, texts, scale = self.module(
                batch.images, batch.seen, batch.mask, *dropout_keys(batch), *batch.masked
            )
        return self._compare(images, texts, scale, batch)

    def gradients(self, batch: DeclipBatch, scaled: Scaled) -> Terms:
        """As ``CxrClipMethod.gradients``; the heads see the embeddings of the whole batch, once."""
        if not 0 < self.config.train.micro_batch < batch.studies:
            loss, parts = self.loss(batch)
            scaled(loss).backward()
            return loss, parts
        on = batch.to(self.process.device)
        groups = text_groups(replace(on, tokens=on.seen), *on.masked)

        def compare(images: Tensor, texts: Tensor) -> Terms:
            return self._compare(images, texts, self.net.scale, on)

        encoders = self.learner.encode_image, self.learner.encode_text
        terms = gradients_in_pieces(self.net, on, groups, *encoders, compare, scaled, self.config.train)
        average_gradients(self.learner, self.process.world)
        return terms

    def validation_loss(self, batch: DeclipBatch) -> Tensor:
        """See ``Method``."""
        return contrast_alone(self.net, batch, self.config, self.process)

    def finite(self, batch: DeclipBatch) -> Tensor:
        """See ``Method``."""
        return finite_studies(self.net, batch, self.config, self.process)

    def meter(self) -> Callable[[DeclipBatch], float]:
        """See ``Method``; the heads are not counted."""
        return meter_of(self.net, self.config, self.process)

    def _compare(self, images: Tensor, texts: Tensor, scale: Tensor, batch: DeclipBatch) -> Terms:
        """All terms of this process's studies, from what ``Learner`` encodes: [n * b, D] and [m * b, D + 1], texts in
        the order of the groups."""
        rank, world, heads = self.process.rank, self.process.world, self.learner.heads
        texts, missed = texts[:, :-1], texts[:, -1].sum()
        asked = texts.new_full((), sum(map(sum, batch.asked)), dtype=torch.int64)
        if world > 1:
            dist.all_reduce(asked)
        loss, parts, mine, everyone = contrast(unit(images), texts, scale, batch, self.config, self.process)
        views = images.unflatten(0, (-1, batch.studies)).unbind()
        missed = missed / asked.clamp(min=1)
        for name, weight, value in heads.terms(views, missed, mine, scale, self.config.loss, rank, world):
            parts[name] = value
            loss = loss + weight * value
        heads.remember(everyone, world)
        return loss, parts
