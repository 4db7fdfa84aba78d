"""Study-level sampling (paper section 3.1): from studies in shards to batches of images and token ids.

Every draw is decided by (seed, epoch, data set, study) alone, so it is the same on any number of processes and workers.
Which studies make a batch is decided by seed, epoch, batch size and number of studies: all data sets of a run are one
list in random order, so each has exactly its share of every epoch, and on average its share of every batch.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.config.run_config import RunConfig
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.memory import AHEAD, allow_many_files, check_shared_memory, keep_memory
from pipeline.storage.pictures import Grey
from pipeline.storage.shards import SAMPLED, load_view
from pipeline.study import Study, View
from pipeline.study_keys import study_key
from pipeline.text.prompts import PromptSentences
from pipeline.text.tokenizer import Tokenizer
from pipeline.text.translations import Translations
from pipeline.training.augment import augment_view
from pipeline.training.losses import samples_needed
from pipeline.training.sampling import draw_texts, draw_views, generator, label_key, speaks, validation_texts

B = TypeVar("B")  # a batch of some method
Collate = Callable[[Sequence["StudyDraw"]], B]  # draws to a batch; unlike a lambda a partial reaches spawned workers


class StudyDraw(NamedTuple):
    """One draw of one study: its n images (uint8 [S, S]) and m texts, n and m 1 or 2 (0 of what a mixed run's study has
    not); its place in its set; the key
    from which all that is random about it is drawn, dropout included (see ``study_key``); and that of its labels
    (see ``label_key``), 0 where no term of the loss asks."""

    images: list[np.ndarray]
    texts: list[str]
    place: int
    key: int
    labels: int = 0


@dataclass(frozen=True)
class Tensors:
    """What the batch of any method can do: its fields are tensors, tuples of them, and what stays in Python."""

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With every tensor changed."""

        def changed(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(changed, value))
            return change(value) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})

    def to(self, device: torch.device) -> Self:
        """A copy on a device; from pinned memory it is made while the device computes."""
        return self.each(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """A copy in pinned memory; torch's loader calls this where it was told to pin."""
        return self.each(torch.Tensor.pin_memory)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        values = [getattr(self, f.name) for f in fields(self)]
        flat = chain.from_iterable(value if isinstance(value, tuple) else (value,) for value in values)
        return sum(x.nbytes for x in flat if isinstance(x, Tensor))


@dataclass(frozen=True)
class Batch(Tensors):
    """B draws of studies, all first samples before all second ones.

    Texts are sorted by length and cut in groups, each padded to its own longest.

    Attributes:
        images: grey uint8 [n * B, S, S].
        tokens, mask: int64 [g, L_g] for each group; together m * B rows.
        order: int64 [m * B], the row of the concatenated groups that holds text k.
        places: int64 [B], index of each study in its set.
        keys: int64 [B], of each draw.
        labels: int64 [B], of each study.
        studies: B.
    """

    images: Tensor
    tokens: tuple[Tensor, ...]
    mask: tuple[Tensor, ...]
    order: Tensor
    places: Tensor
    keys: Tensor
    labels: Tensor
    studies: int


class TrainingSet(Dataset[StudyDraw]):
    """Draws of training studies, addressed by (epoch, index)."""

    def __init__(
        self,
        studies: Sequence[Study],
        prompts: dict[str, PromptSentences],
        config: RunConfig,
        translations: Translations | None = None,
    ) -> None:
        """``texts_of[i]`` is the study whose texts study i gets: itself, or another one in the shuffled control."""
        self.studies = studies
        self.prompts = prompts
        self.translations = translations
        self.config = config
        self.counts = samples_needed(config.loss)
        self.texts_of = shuffled(len(studies), config)

    def __len__(self) -> int:
        """Number of studies."""
        return len(self.studies)

    def __getitem__(self, draw: Sequence[int] | np.ndarray) -> StudyDraw:
        """The draw of one study in one epoch: ``draw`` is (epoch, index)."""
        epoch, index = map(int, draw)
        study, partner = self.studies[index], int(self.texts_of[index])
        other = study if partner == index else self.studies[partner]
        key = study_key(study, self.config.seed, epoch)
        rng = generator(key)
        if not study.views:
            views = []
        elif self.config.sampling.unit == "image":
            views = draw_views(study, 1, rng) * self.counts[0]
        else:
            views = draw_views(study, self.counts[0], rng)
        load: Callable[[View, int], Grey] = partial(load_view, every=SAMPLED)
        if len(set(map(id, views))) < len(views):
            load = cache(load)  # one drawn twice is read once
        images = [augment_view(v, self.config.image_size, self.config.augment, rng, load) for v in views]
        prompts = self.prompts.get(other.dataset)
        texts = []
        if speaks(other):
            texts = draw_texts(other, self.counts[1], prompts, self.config, rng, self.translations)
        return StudyDraw(images, texts, index, key, label_key(study) if self.config.loss.label_positives else 0)


class ValidationSet(Dataset[StudyDraw]):
    """The one fixed view of validation studies: no augmentation, sections in order, positive prompts only."""

    def __init__(self, studies: Sequence[Study], prompts: dict[str, PromptSentences], config: RunConfig) -> None:
        self.studies = studies
        self.prompts = prompts
        self.config = config
        self.counts = samples_needed(config.loss)
        self.texts_of = shuffled(len(studies), config)

    def __len__(self) -> int:
        """Number of studies."""
        return len(self.studies)

    def __getitem__(self, index: int) -> StudyDraw:
        """The first frontal view and another position's first view, the findings and the impression, as they exist
        (with ``sampling.unit: image`` one view and the whole report, twice). The key is the same every time: nothing is
        dropped out in validation, but a method may hide something."""
        study, other = self.studies[index], self.studies[self.texts_of[index]]
        views = []
        if study.views:
            first = study.first_frontal
            second = next((v for v in study.views if v.position != first.position), first)
            if self.config.sampling.unit == "image":
                second = first
            views = [first, second][: self.counts[0]]
        load = cache(lambda view: evaluation_crop(load_view(view), self.config.image_size))  # one shown twice: once
        images = [load(v) for v in views]
        texts = []
        if speaks(other):
            texts = validation_texts(other, self.prompts.get(other.dataset), self.config)[: self.counts[1]]
        key = study_key(study, 0, 0)
        return StudyDraw(images, texts, index, key, label_key(study) if self.config.loss.label_positives else 0)


def shuffled(count: int, config: RunConfig) -> np.ndarray:
    """Whose texts each study gets, int64 [count]: its own, or with ``train.shuffle_pairs`` a random other's."""
    if not config.train.shuffle_pairs:
        return np.arange(count)
    order = np.random.default_rng([config.seed, count]).permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, 1)  # one cycle through all studies: nobody keeps their own
    return partner


def steps_before(count: int, batch: int, epoch: int) -> int:
    """Steps that are done when an epoch begins, or (``epoch`` the number of epochs) the steps of a whole training: a
    step for every full batch of the studies seen until then."""
    return epoch * count // batch


def epoch_draws(count: int, batch: int, seed: int, epoch: int) -> np.ndarray:
    """The draws of an epoch, int64 [K, batch, 2]: K steps, of each the epoch and the place of ``batch`` studies.

    Every epoch is a fresh permutation of all studies, and the epochs follow each other without a gap: what fills no
    whole batch at the end of one is carried into the first batch of the next, still as its own epoch's draw. So each
    study is drawn once an epoch, and a training leaves out less than one batch, at its very end. Such a first batch
    takes no study that was carried into it, since nobody is their own negative.

    Raises:
        ValueError: fewer studies than a batch.
    """
    if count < batch:
        raise ValueError(f"train.batch_size: {batch} studies a step, but the corpus holds only {count}; lower it")
    draws = np.empty((0, 2), dtype=np.int64)
    # Rearranging the first batch leaves the last one as it is, unless there are fewer than two.
    start = max(0, epoch - 1) if count >= 2 * batch else 0
    for now in range(start, epoch + 1):
        order = np.random.default_rng([seed, now]).permutation(count)
        carried = draws[len(draws) - now * count % batch :]
        again = np.isin(order[:batch], carried[:, 1])
        order[:batch] = np.concatenate([order[:batch][~again], order[:batch][again]])
        draws = np.concatenate([carried, np.stack([np.full(count, now), order], axis=1)])
    return draws[: len(draws) // batch * batch].reshape(-1, batch, 2)


def collate(samples: Sequence[StudyDraw], tokenizer: Tokenizer, groups: int) -> Batch:
    """Stack the draws of B studies, all first images (texts) before all second ones.

    Args:
        groups: how many length groups the texts are cut in at most (``length_groups``). Which studies are in a batch
            never depends on length.
    """
    images = [image for k in range(len(samples[0].images)) for image in (s.images[k] for s in samples)]
    texts = [text for k in range(len(samples[0].texts)) for text in (s.texts[k] for s in samples)]
    ids = tokenizer.encode(texts)
    lengths = np.array([len(row) for row in ids])
    by_length = np.argsort(lengths, kind="stable")
    parts = np.split(by_length, length_groups(lengths[by_length], groups))
    grouped = [padded([ids[i] for i in part]) for part in parts]
    return Batch(
        images=torch.from_numpy(np.stack(images)),
        tokens=tuple(tokens for tokens, _ in grouped),
        mask=tuple(mask for _, mask in grouped),
        order=torch.from_numpy(np.argsort(by_length)),
        places=torch.tensor([s.place for s in samples]),
        keys=torch.tensor([s.key for s in samples]),
        labels=torch.tensor([s.labels for s in samples]),
        studies=len(samples),
    )


def length_groups(lengths: np.ndarray, groups: int) -> list[int]:
    """Where to cut texts into groups, each padded to its longest, so that the fewest tokens are computed.

    Args:
        lengths: int64 [M], in ascending order.
        groups: at most so many; fewer where there are fewer lengths.

    Returns:
        The places of the first texts of all groups but the first.
    """
    values, counts = np.unique(lengths, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])  # texts of smaller lengths
    ends = np.arange(len(values))
    # tokens[i, j]: of a group of the lengths i to j
    tokens = np.where(ends[:, None] <= ends, (before[1:] - before[:-1, None]) * values, np.iinfo(np.int64).max // 2)
    least, starts = tokens[0], []  # of all texts up to length j in the groups so far; where the last of them starts
    for _ in range(min(groups, len(values)) - 1):
        total = np.concatenate([least[:1] + tokens[:1], least[:-1, None] + tokens[1:]])
        starts.append(total.argmin(axis=0))
        least = total.min(axis=0)
    cuts: list[int] = []
    last = len(values) - 1
    for start in reversed(starts):
        first = int(start[last])
        if first > 0:
            cuts.append(int(before[first]))
            last = first - 1
    return cuts[::-1]


def padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, L], L the longest row's length. The pad is 0, whatever the vocabulary calls it: the mask
    keeps it from having any effect."""
    lengths = np.array([len(row) for row in rows])
    there = np.arange(lengths.max()) < lengths[:, None]
    tokens = np.zeros(there.shape, dtype=np.int64)
    tokens[there] = np.concatenate(rows)
    return torch.from_numpy(tokens), torch.from_numpy(there.astype(np.int64))


def collator(tokenizer: Tokenizer, config: RunConfig) -> Collate[Batch]:
    """``collate`` as a run has it."""
    return partial(collate, tokenizer=tokenizer, groups=config.train.length_groups)


def training_batches(
    data: TrainingSet, collate: Collate[B], epoch: int, rank: int, world: int, workers: int, start: int = 0
) -> Iterator[B]:
    """This rank's share of every step of an epoch from ``start`` on: rank r of w takes studies r, r + w, ... of the
    global batch. From now on this process keeps the memory it frees (see ``keep_memory``), and so do its workers.
    """
    keep_memory()
    steps = epoch_draws(len(data), data.config.train.batch_size, data.config.seed, epoch)[start:]
    pin = data.config.train.device != "cpu" and torch.cuda.is_available()
    return batches_of(data, [step[rank::world] for step in steps], collate, data.config, workers, pin)


def batches_of(
    data: Dataset[StudyDraw],
    parts: Sequence[Sequence[Any]],
    collate: Collate[B],
    config: RunConfig,
    workers: int,
    pin: bool = False,
) -> Iterator[B]:
    """A batch of the draws in each part, in order, on the CPU.

    Args:
        workers: processes that read them; 0: this one.
        pin: in pinned memory.

    Raises:
        ParamsError: what the processes hold ready does not fit shared memory.
    """
    check_shared_memory(workers, batch_bytes(config, max(map(len, parts), default=0)), "train.workers")
    allow_many_files()
    loader: DataLoader[B] = DataLoader(
        data,  # type: ignore[arg-type]  # of draws, which ``collate`` makes batches of
        batch_sampler=parts,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=AHEAD if workers else None,
        pin_memory=pin,
        worker_init_fn=serve_to_the_end,
    )
    with torch.random.fork_rng(devices=[]):  # a new loader draws a number that nothing needs
        return iter(loader)


def batch_bytes(config: RunConfig, studies: int) -> int:
    """Bytes of a batch of so many studies at most: pictures in uint8; four numbers in int64 for each token of the
    longest texts (id and mask; of masked language modelling the id that is seen, and the one asked for)."""
    images, texts = samples_needed(config.loss)
    return studies * (images * config.image_size**2 + 32 * texts * config.text_encoder.max_tokens)


def serve_to_the_end(worker: int) -> None:
    """A signal to the whole process group asks the trainer to stop, which needs its workers for the step in hand; they
    end when it does."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def validation_parts(count: int, size: int) -> list[np.ndarray]:
    """Places of the studies of each validation batch: fixed batches in a fixed order, mixed over ``count`` studies by
    one permutation, ``size`` in each; a last one of a single study is left out, since it has nothing to be told apart
    from."""
    order = np.random.default_rng(0).permutation(count)
    parts = [order[start : start + size] for start in range(0, count, size)]
    return [part for part in parts if len(part) > 1]
