"""GLoRIA (Huang et al., ICCV 2021): image against sentence, and its words against regions (docs/models.md)."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.towers import HALF, Bert, linear, normalise_input, resnet50, resnet_maps, wordpieces
from pipeline.adapters.weights import Weights, fill, find_one
from pipeline.evaluation.embedder import Embedder
from pipeline.text.tokenizer import Tokenizer

OF_TRAINING = (
    *("epoch", "global_step", "pytorch-lightning_version", "callbacks", "optimizer_states", "lr_schedulers", "loops"),
    *("hparams_name", "hparams_type", "hyper_parameters", "native_amp_scaling_state", "amp_scaling_state"),
    *("checkpoint_callback_best_model_score", "checkpoint_callback_best_model_path", "checkpoint_callback_best"),
    *("early_stop_callback_wait", "early_stop_callback_patience"),
)
MAX_TOKENS = 97
SIDE = 256  # of a picture in pixels, before the centre is cut
LAYERS = 4  # of the BERT, the last ones, summed
ATTENTION, SHARPNESS, SCALE = 4.0, 5.0, 10.0  # temperatures of its losses: regions, words, global


def load_gloria(folder: Path, device: torch.device) -> Embedder:
    """The Lightning .ckpt of the folder, with BioClinicalBERT's words in ``tokenizer``.

    Keys in ``state_dict``: ``gloria.img_encoder.model.*`` (torchvision), ``.global_embedder.{weight,bias}``,
    ``.local_embedder.weight`` (a 1 x 1 convolution of the third stage), ``gloria.text_encoder.model.*``.
    """
    path = find_one(folder, "*.ckpt")
    weights = Weights.of(path, "state_dict", OF_TRAINING)
    at = "gloria.img_encoder."
    net = resnet50(weights.take(f"{at}model."), f"{path}: {at}model.").to(device)
    whole = linear(weights.take(f"{at}global_embedder."), f"{path}: {at}global_embedder.").to(device)
    kernel = weights.take(f"{at}local_embedder.")
    local = nn.Conv2d(1024, whole.out_features, 1, bias=False)
    fill(local, kernel, f"{path}: {at}local_embedder.")
    local = local.to(device)
    bert = Bert(weights.take("gloria.text_encoder.model."), f"{path}: gloria.text_encoder.model.").to(device)
    tokenizer = wordpieces(folder, bert, MAX_TOKENS)
    weights.finish()

    def features(inputs: Tensor) -> Tensor:
        return net(_enlarged(inputs))

    def words_of(texts: list[str]) -> tuple[Tensor, list[int]]:
        """Words' embeddings [B, 97, D], zeros behind the last, and how many word pieces each text has."""
        tokens, mask = tokenizer([gloria_words(text) for text in texts])
        layers = bert(tokens.to(device), mask.to(device))[-LAYERS:]
        return _by_word(sum(layers[1:], layers[0]), tokens, mask, tokenizer)

    def encode_texts(texts: list[str]) -> Tensor:
        # Its mean is over all 97 positions, zeros included: the direction is that of the sum
        return words_of(texts)[0].mean(dim=1)

    @lru_cache(maxsize=1)  # the same sentences are scored with every batch of images
    def remembered(texts: tuple[str, ...]) -> list[Tensor]:
        found = []
        for start in range(0, len(texts), 64):
            rows, pieces = words_of(list(texts[start : start + 64]))
            found += [row[1 : 1 + count].clone() for row, count in zip(rows, pieces, strict=True)]
        return found

    def local_scores(inputs: Tensor, texts: list[str]) -> Tensor:
        regions = local(resnet_maps(net, _enlarged(inputs), stages=3)).flatten(2)
        return torch.stack([_words_on_regions(words, regions) for words in remembered(tuple(texts))], dim=1)

    return Embedder(
        prepare=gloria_input,
        encode_images=lambda inputs: whole(features(inputs)),
        encode_texts=encode_texts,
        features=features,
        size=SIDE,
        scale=SCALE,
        device=device,
        local_scores=local_scores,
    )


def gloria_input(picture: np.ndarray) -> np.ndarray:
    """Grey uint8 [H, W] -> uint8 [224, 224]: long side to 256 by area, black to a square, centre."""
    height, width = picture.shape
    factor = SIDE / max(height, width)
    height, width = (SIDE, max(1, int(width * factor))) if height >= width else (max(1, int(height * factor)), SIDE)
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    square = np.zeros((SIDE, SIDE), dtype=np.uint8)
    y, x = (SIDE - height) // 2, (SIDE - width) // 2
    square[y : y + height, x : x + width] = resized
    return np.ascontiguousarray(square[16:240, 16:240])


def _enlarged(inputs: Tensor) -> Tensor:
    return F.interpolate(normalise_input(inputs, HALF), size=(299, 299), mode="bilinear", align_corners=True)


def gloria_words(text: str) -> str:
    """The words of a text in small ASCII letters without punctuation. Sentences of a single word are left out, as it
    does, unless nothing else is there: the name of a class is a prompt, too."""
    sentences = [
        [plain for word in re.findall(r"\w+", sentence.lower()) if (plain := word.encode("ascii", "ignore").decode())]
        for part in re.split(r"[0-9]+\.", text.replace("\n", " "))
        for sentence in part.split(".")
    ]
    longer = [words for words in sentences if len(words) > 1]
    return " ".join(word for words in longer or sentences for word in words)


def _by_word(pieces: Tensor, tokens: Tensor, mask: Tensor, tokenizer: Tokenizer) -> tuple[Tensor, list[int]]:
    """Word pieces [B, L, D] -> sums over the pieces of each word [B, 97, D], [CLS] first and [SEP] last, and the number
    of pieces of each text, [CLS] and [SEP] not counted."""
    out = pieces.new_zeros(len(tokens), MAX_TOKENS, pieces.shape[2])
    counts = []
    for i, (ids, length) in enumerate(zip(tokens.tolist(), mask.sum(dim=1).tolist(), strict=True)):
        names = tokenizer.tokenizer.convert_ids_to_tokens(ids[:length])
        starts = torch.tensor([not name.startswith("##") for name in names])
        out[i].index_add_(0, (starts.cumsum(0) - 1).to(pieces.device), pieces[i, :length])
        counts.append(sum(not name.startswith("[") for name in names))
    return out, counts


def _words_on_regions(words: Tensor, regions: Tensor) -> Tensor:
    """Local score of one sentence: each word attends to the regions, and the best word counts.

    Args:
        words: [W, D]. ``regions``: [B, D, R].

    Returns:
        [B]: 5 x the largest cosine of a word and what it attends to; 0 for a sentence without words.
    """
    if not len(words):
        return regions.new_zeros(len(regions))
    attention = torch.einsum("wd,bdr->bwr", words, regions).softmax(dim=1)  # over words ...
    attention = (ATTENTION * attention).softmax(dim=2)  # ... then over regions
    context = torch.einsum("bwr,bdr->bwd", attention, regions)
    return SHARPNESS * F.cosine_similarity(words, context, dim=2).amax(dim=1)
