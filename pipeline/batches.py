"""Study-level sampling (paper section 3.1): from studies in shards to batches of images and token ids.

Every draw is decided by (seed, epoch, data set, study) alone, so it is the same on any number of processes and workers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.augment import augment_image, evaluation_image, swap_sentences
from pipeline.encoders import Tokenizer
from pipeline.losses import samples_needed
from pipeline.params import RunConfig
from pipeline.prompts import Prompts, caption, validation_caption
from pipeline.shards import load_view
from pipeline.study import Study, View


@dataclass(frozen=True)
class Batch:
    """B studies: grey uint8 images [n * B, S, S] and token ids/masks int64 [m * B, L], all first samples first;
    n and m are 1 or 2."""

    images: Tensor
    tokens: Tensor
    mask: Tensor
    studies: int


def draw_views(study: Study, count: int, rng: Generator) -> list[View]:
    """``count`` (1 or 2) views: of two distinct positions where the study has them, else two images, else one twice."""
    first = study.views[rng.integers(len(study.views))]
    if count == 1:
        return [first]
    others = [v for v in study.views if v.position != first.position] or [v for v in study.views if v is not first]
    return [first, others[rng.integers(len(others))] if others else first]


def draw_texts(study: Study, count: int, prompts: Prompts | None, config: RunConfig, rng: Generator) -> list[str]:
    """``count`` (1 or 2) texts of a study.

    A report gives findings and impression in random order, without replacement; where only one section exists the
    second text is its sentences in another order. Labels give captions drawn independently from the prompts. With
    ``sampling.unit: image`` the text is the whole report, both sections in their order.
    """
    if study.labels and prompts is not None:
        negatives = config.sampling.negatives if study.dataset == "chestxray14" else None
        return [_said(caption(study.labels, prompts, rng, negatives), study) for _ in range(count)]
    sections = [text for text in (study.findings, study.impression) if text]
    if config.sampling.unit == "image":
        sections = [" ".join(sections)]
    picked = [sections[i] for i in rng.permutation(len(sections))[:count]]
    if config.augment.text:
        picked = [swap_sentences(text, rng) if rng.random() < 0.5 else text for text in picked]
    if len(picked) < count:
        picked.append(swap_sentences(picked[0], rng) if config.augment.text else picked[0])
    return picked


class TrainingSet(Dataset[tuple[list[np.ndarray], list[str]]]):
    """Draws of training studies, addressed by (epoch, index)."""

    def __init__(self, studies: Sequence[Study], prompts: dict[str, Prompts], config: RunConfig) -> None:
        """``texts_of[i]`` is the study whose texts study i gets: itself, or another one in the shuffled control."""
        self.studies = studies
        self.prompts = prompts
        self.config = config
        self.counts = samples_needed(config.loss)
        self.texts_of = shuffled(len(studies), config)

    def __len__(self) -> int:
        """Number of studies."""
        return len(self.studies)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[np.ndarray], list[str]]:
        """One draw of one study in one epoch: its images (uint8 [S, S]) and texts."""
        epoch, index = key
        study, other = self.studies[index], self.studies[self.texts_of[index]]
        name = f"{study.dataset}/{study.patient}/{study.study}".encode()
        rng = np.random.default_rng([self.config.seed, epoch, zlib.crc32(name)])
        if self.config.sampling.unit == "image":
            views = draw_views(study, 1, rng) * self.counts[0]
        else:
            views = draw_views(study, self.counts[0], rng)
        images = [augment_image(load_view(v), self.config.image_size, self.config.augment, rng) for v in views]
        return images, draw_texts(other, self.counts[1], self.prompts.get(other.dataset), self.config, rng)


class ValidationSet(Dataset[tuple[list[np.ndarray], list[str]]]):
    """The one fixed view of validation studies: no augmentation, sections in order, positive prompts only."""

    def __init__(self, studies: Sequence[Study], prompts: dict[str, Prompts], config: RunConfig) -> None:
        self.studies = studies
        self.prompts = prompts
        self.config = config
        self.counts = samples_needed(config.loss)
        self.texts_of = shuffled(len(studies), config)

    def __len__(self) -> int:
        """Number of studies."""
        return len(self.studies)

    def __getitem__(self, index: int) -> tuple[list[np.ndarray], list[str]]:
        """The first frontal view and another position's first view, the findings and the impression, as they exist."""
        study, other = self.studies[index], self.studies[self.texts_of[index]]
        first = study.first_frontal
        second = next((v for v in study.views if v.position != first.position), first)
        views = [first, second][: self.counts[0]]
        images = [evaluation_image(load_view(v), self.config.image_size) for v in views]
        return images, validation_texts(other, self.prompts.get(other.dataset), self.config)[: self.counts[1]]


def validation_texts(study: Study, prompts: Prompts | None, config: RunConfig) -> list[str]:
    """Two fixed texts of a study, equal where there is only one."""
    if study.labels and prompts is not None:
        return [_said(validation_caption(study.labels, prompts), study)] * 2
    sections = [text for text in (study.findings, study.impression) if text]
    if config.sampling.unit == "image":
        sections = [" ".join(sections)]
    return [sections[0], sections[-1]]


def _said(text: str | None, study: Study) -> str:
    if text is None:  # ``corpus`` leaves such studies out
        raise ValueError(f"{study.dataset}: a study of the corpus has labels that no prompt puts into words")
    return text


def shuffled(count: int, config: RunConfig) -> np.ndarray:
    """Whose texts each study gets, int64 [count]: its own, or with ``train.shuffle_pairs`` a random other's."""
    if not config.train.shuffle_pairs:
        return np.arange(count)
    order = np.random.default_rng([config.seed, count]).permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, 1)  # one cycle through all studies: nobody keeps their own
    return partner


def epoch_order(count: int, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The studies of each step of an epoch: a fresh permutation cut into full batches; the remainder waits its turn.

    Raises:
        ValueError: fewer studies than a batch.
    """
    if count < batch:
        raise ValueError(f"train.batch_size: {batch} studies a step, but the corpus holds only {count}; lower it")
    order = np.random.default_rng([seed, epoch]).permutation(count)
    return list(order[: count // batch * batch].reshape(-1, batch))


def collate(samples: list[tuple[list[np.ndarray], list[str]]], tokenizer: Tokenizer) -> Batch:
    """Stack the samples of B studies, all first images (texts) before all second ones."""
    images = [image for k in range(len(samples[0][0])) for image in (s[0][k] for s in samples)]
    texts = [text for k in range(len(samples[0][1])) for text in (s[1][k] for s in samples)]
    tokens, mask = tokenizer(texts)
    return Batch(torch.from_numpy(np.stack(images)), tokens, mask, len(samples))


def training_batches(
    data: TrainingSet, tokenizer: Tokenizer, epoch: int, rank: int, world: int, workers: int
) -> Iterator[Batch]:
    """This rank's share of every step of an epoch: rank r of w takes studies r, r + w, ... of the global batch."""
    steps = epoch_order(len(data), data.config.train.batch_size, data.config.seed, epoch)
    mine = [[(epoch, int(i)) for i in step[rank::world]] for step in steps]
    loader: DataLoader[Batch] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=mine,
        num_workers=workers,
        collate_fn=partial(collate, tokenizer=tokenizer),  # unlike a lambda it reaches spawned workers
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


def validation_batches(data: ValidationSet, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Fixed batches in a fixed order, mixed over studies by one permutation; a last one of a single study is left out,
    since it has nothing to be told apart from."""
    order = np.random.default_rng(0).permutation(len(data))
    size = data.config.train.batch_size
    for start in range(0, len(order), size):
        part = order[start : start + size]
        if len(part) > 1:
            yield collate([data[int(i)] for i in part], tokenizer)
