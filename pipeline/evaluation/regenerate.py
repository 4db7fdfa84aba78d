"""Regeneration of hidden regions: how near the model's guess comes with the matching report, with none, with another.

Regions are cells of the model's coarsest grid, the same ones for every way of guessing, and those of a smaller mask
ratio are among those of a larger one. Everything is measured on hidden pixels alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pipeline.config.params import Bootstrap
from pipeline.evaluation.candidates import candidate_texts
from pipeline.evaluation.image_quality import averaged, psnr, ssim, without_model
from pipeline.evaluation.metric_key import WITH_TEXT, MetricKey, of_clean
from pipeline.evaluation.metrics import mean_with_interval, resamples
from pipeline.evaluation.protocols import RetrievalSet
from pipeline.models.hidden_cells import hidden_cells
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.index import read_studies
from pipeline.storage.shards import load_view
from pipeline.study import Study
from pipeline.study_keys import study_key
from pipeline.text.tokenizer import Tokenizer

PICTURES = 2  # of a test set and mask ratio


class Regenerator(Protocol):
    """A model that guesses what hidden regions look like."""

    @property
    def grid(self) -> int:
        """Cells a side of the coarsest scale."""
        ...

    def regenerate_scales(self, images: Tensor, mask: Tensor, texts: list[str] | None) -> list[Tensor]:
        """Pictures with hidden cells filled, the finest scale first.

        Args:
            images: uint8 [B, S, S]; ``mask``: bool [B, grid, grid], True where a cell is hidden.
            texts: of each image; None: from the image alone.

        Returns:
            Of scale k, grey in [0, 1], float [B, S / 2**k, S / 2**k].
        """
        ...


@runtime_checkable
class Network(Protocol):
    """What ``OfNetwork`` needs of a model: as ``Regenerator``, with tokens for texts."""

    grid: int

    def regenerate_scales(
        self, images: Tensor, mask: Tensor, tokens: Tensor | None = None, text_mask: Tensor | None = None
    ) -> list[Tensor]:
        """As in ``Regenerator``; tokens and their mask are int64 [B, L]."""
        ...


@dataclass(frozen=True)
class OfNetwork:
    """A ``Regenerator`` of one of our mixed models, in eval mode, and its tokenizer."""

    network: Network
    tokenizer: Tokenizer
    device: torch.device

    @property
    def grid(self) -> int:
        """Cells a side of the coarsest scale."""
        return self.network.grid

    @torch.inference_mode()
    def regenerate_scales(self, images: Tensor, mask: Tensor, texts: list[str] | None) -> list[Tensor]:
        """See ``Regenerator``; tensors come from the CPU and return there."""
        tokens, text_mask = (None, None) if texts is None else (t.to(self.device) for t in self.tokenizer(texts))
        found = self.network.regenerate_scales(images.to(self.device), mask.to(self.device), tokens, text_mask)
        return [picture.float().cpu() for picture in found]


def of_network(network: object, tokenizer: Tokenizer, device: torch.device) -> OfNetwork:
    """A trained model as a ``Regenerator``.

    Raises:
        ValueError: it is no mixed run's.
    """
    if not isinstance(network, Network):
        raise ValueError("no mixed run: it regenerates nothing; take it from evaluate.regeneration.runs")
    return OfNetwork(network, tokenizer, device)


# ---- what is hidden, and whose report is whose


def cells_to_hide(studies: Sequence[Study], grid: int, ratio: float, seed: int) -> np.ndarray:
    """Cells to hide of each study's image, bool [N, grid, grid]: see ``hidden_cells``. Which ones depends on the seed
    and the study's ids alone."""
    keys = torch.tensor([study_key(study, seed, "hidden") for study in studies])
    return hidden_cells(keys, grid, ratio).numpy()


def pixels_of(cells: np.ndarray, size: int) -> np.ndarray:
    """Hidden cells bool [B, G, G] as pixels, bool [B, size, size]."""
    side = size // cells.shape[1]
    return np.asarray(cells.repeat(side, axis=1).repeat(side, axis=2))


def derangement(texts: Sequence[str], patients: Sequence[str], seed: int) -> np.ndarray:
    """Another study's report for each study: a seeded permutation, int64 [N], in which nobody gets a text equal to its
    own, or one of the same patient.

    Raises:
        ValueError: there is none to be found.
    """
    rng = np.random.default_rng([seed, len(texts)])
    order = rng.permutation(len(texts))

    def other(i: int, j: int) -> bool:
        return bool(texts[i] != texts[j] and patients[i] != patients[j])

    for i in range(len(order)):
        if other(i, order[i]):
            continue
        for j in rng.permutation(len(order)):
            if other(i, order[j]) and other(int(j), order[i]):
                order[i], order[j] = order[j], order[i]
                break
        else:
            raise ValueError("regeneration: reports cannot be shuffled, too many are the same or of one patient")
    return order


# ---- all of it


@dataclass(frozen=True)
class RegenerationSample:
    """Test studies with a frontal image and a report; ``others`` are the reports in another order."""

    dataset: str
    studies: list[Study]
    positions: list[int]  # among the test studies, in index order
    texts: list[str]
    others: list[str]

    def said(self, way: str, part: slice) -> list[str] | None:
        """The texts that go with some of the images."""
        return {"matching": self.texts[part], "none": None, "shuffled": self.others[part]}[way]


def rules(sets: Mapping[str, RetrievalSet], datasets: Collection[str]) -> list[RetrievalSet]:
    """The retrieval sets of a protocol whose data sets are among ``datasets``: it says which report an image has."""
    return [rule for rule in sets.values() if rule.dataset in datasets]


def read_sample(index: Path, rule: RetrievalSet, most: int, seed: int) -> RegenerationSample | None:
    """At most so many (0: all) test studies of a data set, a seeded draw in index order; None where there are not two.

    Raises:
        ValueError: their reports cannot be shuffled.
    """
    tests = read_studies(index / f"{rule.dataset}.parquet", (rule.split,))
    found = candidate_texts(tests, rule)
    places = np.arange(len(found.queries))
    if most and len(places) > most:
        places = np.sort(np.random.default_rng([seed, len(places)]).permutation(places)[:most])
    if len(places) < 2:
        return None
    positions = [found.queries[i] for i in places]
    texts = [found.texts[found.targets[i]] for i in places]
    studies = [tests[i] for i in positions]
    try:
        order = derangement(texts, [s.patient for s in studies], seed)
    except ValueError as error:
        raise ValueError(f"{rule.dataset}: {error}") from None
    return RegenerationSample(rule.dataset, studies, positions, texts, [texts[i] for i in order])


def measure(
    model: Regenerator, sample: RegenerationSample, size: int, ratio: float, seed: int, batch_size: int
) -> dict[MetricKey, np.ndarray]:
    """Every metric of each image at one mask ratio, float64 [N].

    PSNR and SSIM of the ways ``WITH_TEXT`` and ``BASELINES``; of the coarser scales PSNR, against the picture averaged
    as they are; and what the matching report adds to none and to another's, ``gain_none`` and ``gain_shuffled``.

    Raises:
        ValueError: a guess is not finite.
    """
    cells = cells_to_hide(sample.studies, model.grid, ratio, seed)
    quantities = {
        name: MetricKey(sample.dataset, "regeneration", name, percent=round(100 * ratio), way="none")
        for name in ("psnr", "ssim")
    }
    parts: dict[MetricKey, list[np.ndarray]] = {}
    for start in range(0, len(sample.studies), batch_size):
        part = slice(start, start + batch_size)
        images = _images(sample.studies[part], size)
        hidden, truth = pixels_of(cells[part], size), images / 255.0
        guesses = {way: [fill] for way, fill in without_model(images, hidden).items()}
        for way in WITH_TEXT:
            given = torch.from_numpy(images), torch.from_numpy(cells[part])
            guesses[way] = [picture.numpy() for picture in model.regenerate_scales(*given, sample.said(way, part))]
            if not all(np.isfinite(picture).all() for picture in guesses[way]):
                raise ValueError(f"{sample.dataset}: a regenerated pixel is not finite; the model is broken")
        for way, scales in guesses.items():
            keys = {name: replace(key, way=way) for name, key in quantities.items()}
            parts.setdefault(keys["psnr"], []).append(psnr(truth, scales[0], hidden))
            parts.setdefault(keys["ssim"], []).append(ssim(truth, scales[0], hidden))
            for k, guess in enumerate(scales[1:], 1):
                values = psnr(averaged(truth, k), guess, averaged(hidden, k) > 0.5)
                parts.setdefault(replace(keys["psnr"], scale=k), []).append(values)
    found = {key: np.concatenate(values) for key, values in parts.items()}
    for key in quantities.values():
        own = found[replace(key, way="matching")]
        for way in ("none", "shuffled"):
            found[replace(key, way=f"gain_{way}")] = own - found[replace(key, way=way)]
    return found


def evaluate_regeneration(
    model: Regenerator,
    size: int,
    batch_size: int,
    index: Path,
    sets: Sequence[RetrievalSet],
    ratios: Sequence[float],
    most: int,
    bootstrap: Bootstrap,
    seed: int,
    clean_of: Callable[[str, Sequence[Study]], np.ndarray],
) -> dict[str, Any]:
    """All measures as means with intervals over patients (docs/results.md).

    Args:
        size: side of the model's images in pixels.
        index: folder of <dataset>.parquet; ``sets``: see ``rules``.
        ratios: shares of the cells to hide; ``most``: images of a test set, 0 = all.
        clean_of: data set, studies -> bool [N], which images training has not shown.
    """
    result: dict[str, Any] = {name: {} for name in ("metrics", "removed")}
    result["notes"] = []
    for rule in sets:
        dataset, sample = rule.dataset, read_sample(index, rule, most, seed)
        if sample is None:
            result["notes"].append(f"{dataset}: fewer than two test images with a report")
            continue
        weights = resamples([s.patient for s in sample.studies], bootstrap, seed)
        unseen = clean_of(dataset, sample.studies)
        result["removed"][dataset] = int((~unseen).sum())
        if not unseen.any():
            result["notes"].append(f"{dataset}: no test image is clean")
        for ratio in ratios:
            values = measure(model, sample, size, ratio, seed, batch_size)
            for key, rows in values.items():
                result["metrics"][key] = mean_with_interval(rows, weights, bootstrap)
                if unseen.any() and not unseen.all():
                    clean = mean_with_interval(rows[unseen], weights[:, unseen], bootstrap)
                    result["metrics"][of_clean(key)] = clean
    return result


def regeneration_examples(
    model: Regenerator,
    size: int,
    index: Path,
    sets: Sequence[RetrievalSet],
    ratios: Sequence[float],
    most: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Examples for the page: the first images of each sample at every mask ratio.

    ``input``, ``masked`` (hidden pixels black), ``without`` and ``with`` (the matching report), uint8 [n, S, S];
    ``difference`` int16 [n, S, S], ``with`` less ``input``; ``dataset`` [n], ``position`` int64 [n] (of the test study
    in index order), ``ratio`` float64 [n], ``text`` [n], the matching report.

    Args:
        sets: those that may be shown; n is 0 where there is none. ``ratios``, ``most``: see ``evaluate``.
    """
    rows: dict[str, list[Any]] = {
        name: []
        for name in ("input", "masked", "without", "with", "difference", "dataset", "position", "ratio", "text")
    }
    for rule in sets:
        sample = read_sample(index, rule, most, seed)
        if sample is None:
            continue
        part = slice(0, PICTURES)
        images = _images(sample.studies[part], size)
        for ratio in ratios:
            cells = cells_to_hide(sample.studies[part], model.grid, ratio, seed)
            hidden = pixels_of(cells, size)
            given = torch.from_numpy(images), torch.from_numpy(cells)
            without, helped = (
                np.where(hidden, np.rint(255 * model.regenerate_scales(*given, texts)[0].numpy().clip(0, 1)), images)
                for texts in (None, sample.texts[part])
            )
            rows["input"] += list(images)
            rows["masked"] += list(np.where(hidden, 0, images))
            rows["without"] += list(without)
            rows["with"] += list(helped)
            rows["difference"] += list(helped.astype(np.int16) - images)
            rows["dataset"] += [rule.dataset] * len(images)
            rows["position"] += sample.positions[part]
            rows["ratio"] += [ratio] * len(images)
            rows["text"] += sample.texts[part]
    flat: dict[str, Any] = {
        **{"difference": np.int16, "dataset": np.str_, "position": np.int64, "ratio": np.float64, "text": np.str_}
    }
    found = {name: np.array(values, dtype=flat.get(name, np.uint8)) for name, values in rows.items()}
    return found if rows["dataset"] else {name: a.reshape(0, *_shape(name, size)) for name, a in found.items()}


def may_be_shown(index: Path, sets: Sequence[RetrievalSet], patients: bool) -> list[RetrievalSet]:
    """Those whose images may appear on the page: phantoms, and with ``patients`` all."""

    def phantom(rule: RetrievalSet) -> bool:
        return bool(json.loads((index / f"{rule.dataset}.json").read_text(encoding="utf-8"))["phantom"])

    return [rule for rule in sets if patients or phantom(rule)]


def regeneration_lines(found: dict[str, Any]) -> list[str]:
    """What ``evaluate`` found in a few lines: the finest scale's means and what the report adds; the notes."""
    metrics, lines = found["metrics"], []
    for key in (k for k in metrics if k.way == "matching" and not k.scale and not k.clean):
        gains = [(way, metrics[replace(key, way=f"gain_{way}")]) for way in ("none", "shuffled")]
        against = ", ".join(f"{m.value:+.3f} [{m.low:+.3f}, {m.high:+.3f}] against {way}" for way, m in gains)
        lines.append(f"{key.name} {metrics[key].value:.3f} ({against})")
    return [*lines, *(f"note: {note}" for note in found["notes"])]


def _shape(name: str, size: int) -> tuple[int, ...]:
    return () if name in ("dataset", "position", "ratio", "text") else (size, size)


def _images(studies: Sequence[Study], size: int) -> np.ndarray:
    """The evaluation view of each study, uint8 [B, size, size]."""
    return np.stack([evaluation_crop(load_view(s.first_frontal), size) for s in studies])
