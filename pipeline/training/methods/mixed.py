"""Mixed runs (after arXiv 2103.16022): pairs, lone images and lone texts side by side, each study with what it has.

Each term is over the items of the whole batch that have a part in it:

    regeneration  an image's hidden regions at every scale; from the image alone, or beside the words of its pair
    mlm           words taken out of a text; from the text alone, or beside the visible regions of its pair
    alignment     the whole image and the whole text of a pair, each embedded by itself: CLIP's loss over all pairs

A pair is masked jointly or each half by itself, by a coin. The coin, the hidden cells and the words that are taken out
follow from the study's draw alone, so they are the same in any batch and on any number of processes. What goes where is
decided on the CPU, in the loader's processes, so that a step never waits for the device to learn it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.params import Loss
from pipeline.config.run_config import RunConfig
from pipeline.models.hidden_cells import hidden_cells
from pipeline.models.keyed_random import keyed_mask, row_keys, stream_seeds
from pipeline.models.masked_tokens import WordMask
from pipeline.models.mixed import MixedNet, build_mixed
from pipeline.models.vectors import at_least_float32
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.batches import Collate, StudyDraw, Tensors, padded
from pipeline.training.distributed import Process, gathered
from pipeline.training.losses import clip_loss
from pipeline.training.method import Scaled, Stateful, Terms
from pipeline.training.step import FORWARD, autocast, average_gradients, made_ready


@dataclass(frozen=True)
class MixedBatch(Tensors):
    """B draws of studies with I images and T texts, each study with one of each at most; both in order of the studies.

    Attributes:
        images: grey uint8 [I, S, S]; ``image_of``: int64 [I], the study of each, by its number in the batch.
        tokens, mask: int64 [T, L]; ``text_of``: int64 [T], the study of each.
        said, words: what ``WordMask.take_out`` gives of the texts, int64 [T, L].
        masked: rows of the images and of the texts that are masked by themselves, then those that are masked jointly,
            int64 [i], [t], [j], [j]; the last two belong together row by row.
        asked: number of words that were taken out of the texts that are masked by themselves, and jointly.
        pairs: rows of the images and of the texts that are in pairs, int64 [p], [p], row by row the same studies.
        places: int64 [B], index of each study in its set.
        keys: int64 [B], of each draw.
    """

    images: Tensor
    image_of: Tensor
    tokens: Tensor
    mask: Tensor
    text_of: Tensor
    said: Tensor
    words: Tensor
    masked: tuple[Tensor, Tensor, Tensor, Tensor]
    asked: tuple[int, int]
    pairs: tuple[Tensor, Tensor]
    places: Tensor
    keys: Tensor

    @property
    def studies(self) -> int:
        """B."""
        return len(self.keys)

    def pieces(self, size: int) -> list[MixedBatch]:
        """Batches of ``size`` studies, the last one of fewer; of a batch on the CPU."""
        return [self._part(start, start + size) for start in range(0, self.studies, size)]

    def _part(self, start: int, stop: int) -> MixedBatch:
        i, t = ((of >= start) & (of < stop) for of in (self.image_of, self.text_of))
        return _with_rows(
            images=self.images[i],
            image_of=self.image_of[i] - start,
            tokens=self.tokens[t],
            mask=self.mask[t],
            text_of=self.text_of[t] - start,
            said=self.said[t],
            words=self.words[t],
            places=self.places[start:stop],
            keys=self.keys[start:stop],
        )


def collate_mixed(
    samples: Sequence[StudyDraw], tokenizer: Tokenizer, size: int, taker: WordMask | None = None
) -> MixedBatch:
    """Stack the draws of B studies. ``size``: S, which a batch without images cannot tell; ``taker``: of words, None:
    none is taken out."""
    images = [s.images[0] for s in samples if s.images]
    ids = tokenizer.encode([s.texts[0] for s in samples if s.texts])
    tokens, mask = padded(ids) if ids else (torch.zeros(0, 1, dtype=torch.int64),) * 2
    text_of = torch.tensor([i for i, s in enumerate(samples) if s.texts], dtype=torch.int64)
    keys = torch.tensor([s.key for s in samples])
    said, words = tokens, torch.full_like(tokens, -1)
    if taker is not None and ids:
        said, words = taker.take_out(tokens, mask, row_keys(keys, kind=2, samples=1)[text_of])
    return _with_rows(
        images=torch.from_numpy(np.stack(images) if images else np.empty((0, size, size), dtype=np.uint8)),
        image_of=torch.tensor([i for i, s in enumerate(samples) if s.images], dtype=torch.int64),
        tokens=tokens,
        mask=mask,
        text_of=text_of,
        said=said,
        words=words,
        places=torch.tensor([s.place for s in samples]),
        keys=keys,
    )


def _with_rows(*, image_of: Tensor, text_of: Tensor, words: Tensor, keys: Tensor, **given: Tensor) -> MixedBatch:
    """The batch of these fields; its other fields follow from them."""
    image_paired, text_paired = torch.isin(image_of, text_of), torch.isin(text_of, image_of)
    jointly = joint(keys)
    image_joint, text_joint = jointly[image_of] & image_paired, jointly[text_of] & text_paired
    image_alone, text_alone = ~image_joint, ~text_joint

    def rows(which: Tensor) -> Tensor:
        return which.nonzero().flatten()

    return MixedBatch(
        **given,
        image_of=image_of,
        text_of=text_of,
        words=words,
        keys=keys,
        masked=(rows(image_alone), rows(text_alone), rows(image_joint), rows(text_joint)),
        asked=(int((words[text_alone] >= 0).sum()), int((words[text_joint] >= 0).sum())),
        pairs=(rows(image_paired), rows(text_paired)),
    )


class MixedMethod:
    """See ``pipeline.training.method.Method``; a batch is a ``MixedBatch``. It is trained in one pass, and without DDP:
    a process may hold no image, or no text, and then has no gradient for a part of the model."""

    def __init__(self, net: MixedNet, tokenizer: Tokenizer, config: RunConfig, process: Process) -> None:
        """``net``: untrained, on any device."""
        self.config = config
        self.process = process
        self.net = self.learner = made_ready(net, net, config.train, process)
        self.state: Mapping[str, Stateful] = {}
        names = ("mlm", "regeneration", "alignment")
        self.terms = tuple(name for name in names if getattr(config.loss, f"{name}_weight"))
        taker = WordMask.of(tokenizer, config.loss.mlm_rate) if config.loss.mlm_weight else None
        self.collate: Collate[MixedBatch] = partial(
            collate_mixed, tokenizer=tokenizer, size=config.image_size, taker=taker
        )

    @classmethod
    def build(cls, config: RunConfig, tokenizer: Tokenizer, process: Process) -> MixedMethod:
        """With the untrained model that a run's parameters describe.

        Raises:
            ParamsError: the tokenizer has no [MASK].
        """
        return cls(build_mixed(config, tokenizer), tokenizer, config, process)

    def gradients(self, batch: MixedBatch, scaled: Scaled) -> Terms:
        """See ``Method``."""
        loss, parts = self.loss(batch)
        if loss.requires_grad:
            scaled(loss).backward()
        for p in self.net.parameters():  # without a part in this step; the optimizer's moments decay all the same
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        average_gradients(self.net, self.process.world)
        return loss, parts

    def loss(self, batch: MixedBatch) -> Terms:
        """All terms of this process's share of a batch; see ``mixed_objective``."""
        return self._objective(batch, self.process.world)

    def validation_loss(self, batch: MixedBatch) -> Tensor:
        """See ``Method``."""
        return self._objective(batch, world=1, piece=FORWARD)[0]

    def _objective(self, batch: MixedBatch, world: int, piece: int = 0) -> Terms:
        with autocast(self.config.train, self.process.device):
            return mixed_objective(self.net, batch, self.config.loss, self.process.device, world, piece)

    @torch.no_grad()
    def finite(self, batch: MixedBatch) -> Tensor:
        """See ``Method``."""
        on = batch.to(self.process.device)
        found = torch.ones_like(on.keys, dtype=torch.bool)
        with autocast(self.config.train, self.process.device):
            if len(on.images):
                found[on.image_of] &= self.net.encode_image(on.images).isfinite().all(1)
            if len(on.tokens):
                found[on.text_of] &= self.net.encode_text(on.tokens, on.mask).isfinite().all(1)
        return found

    def meter(self) -> Callable[[MixedBatch], float] | None:
        """None: what a step costs is not counted."""
        return None


def mixed_objective(
    net: MixedNet, batch: MixedBatch, weights: Loss, device: torch.device, world: int, piece: int = 0
) -> Terms:
    """All terms of this process's share of a batch.

    Args:
        batch: this process's studies, on the CPU if there are pieces.
        weights: a term of weight 0 is not computed, and what only it asks for is neither hidden nor taken out.
        piece: studies that go through the network at a time; 0 = all.

    Returns:
        The weighted sum, and the terms by name. A term is the sum over this process's items over their number in the
        whole batch, times ``world``: the mean over processes is the term of the whole batch. One without items is 0.
    """
    pieces = batch.pieces(piece) if piece else [batch]
    on = [each.to(device) for each in pieces]
    sums = [_masked(net, each, weights) for each in on]
    regenerated, missed = (torch.stack(values).sum(dim=0) for values in zip(*sums, strict=True))
    images, words, pairs = _of_all([len(batch.image_of), sum(batch.asked), len(batch.pairs[0])], world)
    parts: dict[str, Tensor] = {}
    if weights.regeneration_weight:
        parts["regeneration"] = regenerated / max(sum(images), 1) * world
    if weights.mlm_weight:
        parts["mlm"] = missed / max(sum(words), 1) * world
    if weights.alignment_weight:
        rows = torch.cat([_pair_rows(net, each) for each in on], dim=1)
        parts["alignment"] = alignment(net, rows, weights.label_smoothing, pairs)
    loss = sum((getattr(weights, f"{name}_weight") * value for name, value in parts.items()), torch.zeros_like(missed))
    return loss, parts


def _masked(net: MixedNet, batch: MixedBatch, weights: Loss) -> tuple[Tensor, Tensor]:
    """Of this process's images the sum of ``regeneration``, of its masked tokens the sum of -log p."""
    missed = regenerated = net.log_scale.new_zeros(())
    hidden = None
    if weights.regeneration_weight:
        keys = row_keys(batch.keys, kind=3, samples=1)[batch.image_of]
        hidden = hidden_cells(keys, net.grid, net.mask_ratio)
    image, text, joint_image, joint_text = batch.masked
    none = image[:0]
    # Images alone, texts alone, both together: rows of the batch's images and of its texts, words taken out of these.
    for i, t, asked in ((image, none, 0), (none, text, batch.asked[0]), (joint_image, joint_text, batch.asked[1])):
        if not ((len(i) and weights.regeneration_weight) or (len(t) and weights.mlm_weight)):
            continue
        images = batch.images[i] if len(i) else None
        covered = hidden[i] if len(i) and hidden is not None else None
        said = (batch.said[t], batch.mask[t]) if len(t) else (None, None)
        image_states, text_states = net(images, covered, *said)
        if images is not None and covered is not None:
            regenerated = regenerated + regeneration(net, image_states, images, covered).sum()
        if len(t) and weights.mlm_weight:
            missed = missed + net.words(text_states, batch.words[t], asked, net.word_embeddings.weight).sum()
    return regenerated, missed


def _pair_rows(net: MixedNet, batch: MixedBatch) -> Tensor:
    """Unit-norm embeddings of this process's pairs, [2, p, D]: images, then texts."""
    i, t = batch.pairs
    if not len(i):  # takes part in the gather and in its gradient
        return net.log_scale.new_zeros(2, 0, net.image_projection.out_features).requires_grad_()
    return torch.stack([net.encode_image(batch.images[i]), net.encode_text(batch.tokens[t], batch.mask[t])])


def joint(keys: Tensor) -> Tensor:
    """Whether the draw of a pair is masked jointly: int64 [B] -> bool [B], half of all keys."""
    return keyed_mask(stream_seeds(row_keys(keys, kind=4, samples=1)), (), 0.5)


def _of_all(mine: list[int], world: int) -> list[list[int]]:
    """Each of these numbers on every process, in order of rank. It goes from CPU to CPU: a step cuts its tensors by
    them."""
    if world == 1:
        return [[number] for number in mine]
    rows = torch.empty(world, len(mine), dtype=torch.int64)
    dist.all_gather_into_tensor(rows.flatten(), torch.tensor(mine))
    return rows.T.tolist()


def regeneration(net: MixedNet, states: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """The error of each image, float32 [B]: the mean over scales of the mean squared difference over hidden pixels, in
    the units of ``MixedNet.pieces``.

    Args:
        states: of the images [B, N, width]; ``images``: uint8 [B, S, S]; ``hidden``: bool [B, G, G].
    """
    errors = []
    for guess, truth, covered in zip(net.guess(states), net.pieces(images), net.covered(hidden), strict=True):
        off = (at_least_float32(guess) - truth).square().mean(dim=2)
        errors.append((off * covered).sum(dim=1) / covered.sum(dim=1))
    return torch.stack(errors).mean(dim=0)


def alignment(net: MixedNet, mine: Tensor, label_smoothing: float, pairs: Sequence[int]) -> Tensor:
    """CLIP's loss over the pairs of all processes: this one's rows, over the number of all rows, times the processes.

    Processes hold different numbers of pairs: each sends as many rows as the one that has most, and those that are
    filled up are left out again.

    Args:
        mine: unit-norm embeddings of this process's pairs, [2, p, D]: images, then texts.
        pairs: how many each process has; this one p.
    """
    own, total, most, world = mine.shape[1], sum(pairs), max(pairs), len(pairs)
    if not total:
        return net.log_scale.new_zeros(())
    rank = dist.get_rank() if world > 1 else 0
    everyone = mine
    if world > 1:
        sent = gathered(F.pad(mine, (0, 0, 0, most - own)))  # [world, 2, most, dim]
        everyone = torch.cat([rows[:, :count] for rows, count in zip(sent, pairs, strict=True)], dim=1)
    if not own:
        return everyone.sum() * 0
    own_place = torch.arange(own, device=mine.device) + sum(pairs[:rank])
    alike = own_place.unsqueeze(1) == torch.arange(total, device=mine.device)
    loss = clip_loss(mine[0], mine[1], net.scale, label_smoothing, everyone[0], everyone[1], alike=alike)
    return loss * own / total * world
