"""Embeddings of every test image, candidate text and evaluation prompt, computed once a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline.augment import evaluation_image
from pipeline.model import CxrClip
from pipeline.params import BINARY_DATASETS
from pipeline.retrieval import RETRIEVAL_SETS, candidates
from pipeline.shards import load_view
from pipeline.study import View, read_studies
from pipeline.tokens import Tokenizer

EVALUATED = (*RETRIEVAL_SETS, *BINARY_DATASETS)


@torch.inference_mode()
def encode_views(
    views: Sequence[View],
    encode: Callable[[torch.Tensor], torch.Tensor],
    prepare: Callable[[np.ndarray, int], np.ndarray],
    batch_size: int,
    device: torch.device,
    label: str,
) -> np.ndarray:
    """Encode images in order.

    Args:
        encode: uint8 [B, S, S] on ``device`` -> [B, D].
        prepare: (decoded uint8 [H, W], position in ``views``) -> uint8 [S, S].

    Returns:
        float32 [N, D].
    """
    parts = []
    for start in tqdm(range(0, len(views), batch_size), desc=label, unit="batch", mininterval=1, leave=False):
        images = [prepare(load_view(v), start + i) for i, v in enumerate(views[start : start + batch_size])]
        parts.append(encode(torch.from_numpy(np.stack(images)).to(device)).float().cpu().numpy())
    return np.concatenate(parts)


@torch.inference_mode()
def encode_texts(
    model: CxrClip, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int, device: torch.device
) -> np.ndarray:
    """Unit-norm embeddings of texts in order, float32 [N, dim]; batched by length so that little is padding."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = np.empty((len(texts), model.text_projection.out_features), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tokens, mask = tokenizer([texts[i] for i in part])
        out[part] = model.encode_text(tokens.to(device), mask.to(device)).cpu().numpy()
    return out


def embed(
    model: CxrClip,
    tokenizer: Tokenizer,
    image_size: int,
    sources: Iterable[str],
    index: Path,
    prompts: Sequence[str],
    batch_size: int,
    device: torch.device,
    out: Path,
) -> dict[str, int]:
    """Write ``out``/<dataset>.npz with ``images`` float32 [N, dim] (one evaluation view a test study, in index order)
    and, where the data set is a retrieval one, ``texts`` [M, dim] (distinct candidate texts); and ``out``/prompts.npz.

    prompts.npz holds ``texts`` (the prompts, distinct), ``embeddings`` float32 [P, dim] and the model's ``scale``.

    Returns:
        Number of test images per data set.
    """
    out.mkdir(parents=True, exist_ok=True)

    def prepare(image: np.ndarray, _: int) -> np.ndarray:
        return evaluation_image(image, image_size)

    counts: dict[str, int] = {}
    present = [d for d in EVALUATED if d in set(sources)]
    for dataset in present:
        studies = read_studies(index / f"{dataset}.parquet", ("test",))  # CheXpert's test split is CheXpert5x200
        if not studies:
            continue
        views = [s.first_frontal for s in studies]
        arrays = {"images": encode_views(views, model.encode_image, prepare, batch_size, device, dataset)}
        if dataset in RETRIEVAL_SETS and (texts := candidates(studies).texts):
            arrays["texts"] = encode_texts(model, tokenizer, texts, batch_size, device)
        _save(out / f"{dataset}.npz", arrays)
        counts[dataset] = len(studies)
    embeddings = encode_texts(model, tokenizer, prompts, batch_size, device)
    scale = np.array(model.scale.item())
    _save(out / "prompts.npz", {"texts": np.array(prompts), "embeddings": embeddings, "scale": scale})
    return counts


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    np.savez(path, allow_pickle=False, **arrays)
