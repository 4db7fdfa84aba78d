"""Embeddings of test images, candidate texts and evaluation prompts, once a model (form: docs/results.md)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.config.settings import EmbedOtherSettings, EmbedSettings
from pipeline.evaluation.candidates import candidate_texts
from pipeline.evaluation.device import evaluation_autocast
from pipeline.evaluation.embedder import Embedder
from pipeline.evaluation.protocols import RetrievalSet, first_protocol, prompt_texts, retrieval_sets
from pipeline.evaluation.store import write_missing
from pipeline.models.checkpoint import Net, load_model
from pipeline.storage.atomic import emptied, replacing
from pipeline.storage.evaluation_crop import evaluation_crop
from pipeline.storage.index import read_studies
from pipeline.storage.shards import load_view
from pipeline.study import POSITIVE, View
from pipeline.text.tokenizer import Tokenizer

MAPS = 6  # examples of where an image agrees with a prompt
NOT_ALIGNED = "not aligned: no pair in training"  # of a mixed run, which then has no zero-shot and no retrieval


def from_checkpoint(folder: Path, device: torch.device | str = "cpu", batch_size: int = 256) -> Embedder:
    """One of our own checkpoints (``pipeline.models.checkpoint.save_model``): the evaluation crop as uint8 [S, S];
    a linear probe is trained on the pooled features before the projection.

    Raises:
        ValueError: the folder holds no checkpoint of this version.
    """
    net, tokenizer, run = load_model(folder, device)
    return embedder_of(net, tokenizer, run.image_size, batch_size)


def embedder_of(net: Net, tokenizer: Tokenizer, image_size: int, batch_size: int = 256) -> Embedder:
    """A model in memory, in eval mode, as an ``Embedder`` on the device it is on, under ``evaluation_autocast``."""
    device = net.log_scale.device

    def encode_texts(texts: list[str]) -> Tensor:
        tokens, mask = tokenizer(texts)
        with evaluation_autocast(device):
            return net.encode_text(tokens.to(device), mask.to(device))

    def encode_images(images: Tensor) -> Tensor:
        with evaluation_autocast(device):
            return net.encode_image(images)

    def features(images: Tensor) -> Tensor:
        with evaluation_autocast(device):
            pooled: Tensor = net.image_tower(images)
        return pooled

    return Embedder(
        prepare=partial(evaluation_crop, size=image_size),  # which, unlike a lambda, reaches spawned processes
        encode_images=encode_images,
        encode_texts=encode_texts,
        features=features,
        size=image_size,
        scale=float(net.scale.detach()),
        device=device,
        batch_size=batch_size,
    )


def embed_run(
    model: Path,
    settings: EmbedSettings,
    index: Path,
    out: Path,
    device: torch.device,
    batch_size: int,
    workers: int = 0,
) -> dict[str, int]:
    """Write the embeddings and similarity maps of one of our checkpoints; the counts of ``write_embeddings``.

    A model whose two modalities training never brought together gets missing.json instead: its cells show —.
    """
    net, tokenizer, run = load_model(model, device)
    if not run.aligned:
        write_missing(out, NOT_ALIGNED)
        return {}
    embedder = replace(embedder_of(net, tokenizer, run.image_size, batch_size), workers=workers)
    first = first_protocol(settings.protocols, settings.own)
    sets = retrieval_sets(first, settings.sources).values()
    counts = write_embeddings(
        embedder, prompt_texts(settings.protocols, settings.own), sets, settings.test_sets, index, out
    )
    classes = {t.rule.dataset: {c: texts[0] for c, texts in t.positive.items()} for t in first.tasks.values()}
    shown = {d: classes[d] for d in settings.map_sets if d in classes}
    write_maps(net, embedder, run.image_size, shown, settings.test_sets, index, out)
    return counts


def embed_other(embedder: Embedder, settings: EmbedOtherSettings, index: Path, out: Path) -> dict[str, int]:
    """Write the embeddings of somebody else's model; the counts of ``write_embeddings``."""
    sets = retrieval_sets(first_protocol(settings.protocols, settings.own), settings.sources).values()
    return write_embeddings(
        embedder, prompt_texts(settings.protocols, settings.own), sets, settings.test_sets, index, out
    )


def write_embeddings(
    embedder: Embedder,
    prompts: Sequence[str],
    sets: Iterable[RetrievalSet],
    datasets: Collection[str],
    index: Path,
    out: Path,
) -> dict[str, int]:
    """Write ``out``/<dataset>.npz of every test set of ``datasets``, and ``out``/prompts.npz.

    A data set's file holds ``images`` float32 [N, D] (one evaluation view a test study, in index order); where it is a
    retrieval set ``texts`` [M, D] (the distinct candidate texts, in the order of ``candidates.candidates``); and where
    the model has local scores ``local`` [N, P], one for each prompt. prompts.npz holds ``texts`` [P], their
    ``embeddings`` float32 [P, D], and ``scale``. ``out`` is emptied first.

    Args:
        prompts: distinct evaluation prompts.
        sets: retrieval sets, at most one a data set.
        index: folder of <dataset>.parquet.

    Returns:
        Number of test images per data set.
    """
    emptied(out)  # nothing of an earlier run stays
    counts: dict[str, int] = {}
    rules = {rule.dataset: rule for rule in sets}
    for dataset in datasets:
        studies = read_studies(index / f"{dataset}.parquet", ("test",))  # CheXpert's test split is CheXpert5x200
        if not studies:
            continue
        views = [s.first_frontal for s in studies]
        arrays = {"images": embedder.embed_images(views, dataset)}
        if dataset in rules and (texts := candidate_texts(studies, rules[dataset]).texts):
            arrays["texts"] = embedder.embed_texts(texts)
        if embedder.local_scores and prompts:
            arrays["local"] = embedder.embed_local(views, prompts, dataset)
        _save(out / f"{dataset}.npz", arrays)
        counts[dataset] = len(studies)
    if prompts:
        rows = embedder.embed_texts(prompts)
        _save(out / "prompts.npz", {"texts": np.array(prompts), "embeddings": rows, "scale": np.array(embedder.scale)})
    return counts


def write_maps(
    net: Net,
    embedder: Embedder,
    image_size: int,
    classes: Mapping[str, Mapping[str, str]],
    datasets: Collection[str],
    index: Path,
    out: Path,
) -> int:
    """Write ``out``/maps.npz: similarity maps of up to ``MAPS`` test images with the prompt of a class they have.

    ``maps`` float32 [n, h, w] (cosines), ``dataset`` [n], ``position`` int64 [n] (of the test study in index order) and
    ``text`` [n] (the prompt).

    Args:
        classes: data set -> class -> its prompt. Data sets take turns, each with the first test study that is positive
            for its next class and not taken yet.

    Returns:
        n; 0 where the image encoder has no map.
    """
    chosen = _examples(classes, datasets, index)
    maps = []
    if chosen:
        inputs = np.stack([evaluation_crop(load_view(view), image_size) for _, _, view, _ in chosen])
        with torch.inference_mode():
            places = net.encode_places(torch.from_numpy(inputs).to(embedder.device))
        if places is not None:
            prompts = torch.from_numpy(embedder.embed_texts([text for *_, text in chosen])).to(places.device)
            maps = list(torch.einsum("nhwd,nd->nhw", places, prompts).cpu().numpy())
    kept = chosen[: len(maps)]
    _save(
        out / "maps.npz",
        {
            "maps": np.array(maps, dtype=np.float32) if maps else np.zeros((0, 1, 1), dtype=np.float32),
            "dataset": np.array([dataset for dataset, *_ in kept], dtype=np.str_),
            "position": np.array([position for _, position, _, _ in kept], dtype=np.int64),
            "text": np.array([text for *_, text in kept], dtype=np.str_),
        },
    )
    return len(maps)


def _examples(
    classes: Mapping[str, Mapping[str, str]], datasets: Collection[str], index: Path
) -> list[tuple[str, int, View, str]]:
    """Data set, position among its test studies, view and prompt of up to ``MAPS`` examples."""
    wanted = {d: list(prompts.items()) for d, prompts in classes.items() if d in datasets}
    studies = {d: read_studies(index / f"{d}.parquet", ("test",)) for d in wanted}
    taken: dict[str, set[int]] = {d: set() for d in wanted}
    found: list[tuple[str, int, View, str]] = []
    while len(found) < MAPS and any(wanted.values()):
        for dataset in wanted:
            while wanted[dataset] and len(found) < MAPS:
                cls, text = wanted[dataset].pop(0)
                positions = [i for i, s in enumerate(studies[dataset]) if s.labels.get(cls) == POSITIVE]
                free = [i for i in positions if i not in taken[dataset]]
                if free:
                    taken[dataset].add(free[0])
                    found.append((dataset, free[0], studies[dataset][free[0]].first_frontal, text))
                    break
    return found


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
