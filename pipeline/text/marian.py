"""A text there and back between two languages by MarianMT, sampled so that the result follows from seed and text."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pipeline.config.devices import cuda_device
from pipeline.config.params import BackTranslation
from pipeline.config.records import ParamsError
from pipeline.storage.model_folder import as_data, fetched, one_line
from pipeline.text.sentences import split_sentences

NO_TRANSLATOR = (
    "; give a local folder with config.json, model.safetensors, source.spm, target.spm and vocab.json, or allow access "
    "to the Hugging Face hub once"
)
RECIPE = 1  # to be raised when a text is cut or sampled in another way: what was translated before no longer holds
TOP_K = 50  # candidates of a beam's step: transformers' default, which whoever names beams and temperature alone gets
# Why a text has no translation.
UNCHANGED, ENDLESS, WORDLESS = "unchanged", "endless", "wordless"


class TranslationError(ValueError):
    """Models or a text that cannot be worked with; one line without any word of a report."""


class RoundTrip:
    """English -> another language -> English.

    A text is translated sentence by sentence, as these models were trained to, and its sentences are a batch of their
    own: no other text shares it, and each text starts the random numbers again. So a translation depends on seed and
    text (and, in the last bits of a sum, on the kind of device) alone.
    """

    def __init__(self, options: BackTranslation, seed: int, device: torch.device) -> None:
        """Load both models.

        Raises:
            ParamsError: one of them cannot be had, lacks weights, or is too small for ``max_tokens``.
            TranslationError: the package sentencepiece is not installed.
        """
        self.seed = seed
        self.there = Translator("forward", options.forward, options, device)
        self.back = Translator("back", options.back, options, device)
        recipe = {**asdict(options), "forward": self.there.digest, "back": self.back.digest, "seed": seed}
        del recipe["workers"]
        # Like batch_size, the kind of device decides the order of sums, and with it a draw once in a long while.
        recipe |= {"recipe": RECIPE, "top_k": TOP_K, "device": device.type}
        self.fingerprint = hashlib.blake2b(json.dumps(recipe, sort_keys=True).encode(), digest_size=8).hexdigest()

    def __call__(self, text: str) -> tuple[str | None, str]:
        """The text in other words and "", or None and the reason: ``UNCHANGED`` (it came back as it was), ``ENDLESS``
        (a sentence found no end within the limit: nothing cut off is kept), ``WORDLESS`` (no word in it, or none left
        of one of its sentences).

        Raises:
            TranslationError: a library failed; its message is not passed on, since it may quote the text.
        """
        try:
            said = text
            for step, translator in enumerate((self.there, self.back)):
                seed = int.from_bytes(hashlib.blake2b(f"{self.seed}/{step}/{text}".encode(), digest_size=7).digest())
                translated, reason = translator(said, seed)
                if translated is None:
                    return None, reason
                said = translated
        except Exception as error:
            memory = "; lower back_translation.batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
            raise TranslationError(
                f"a text of {len(text)} characters could not be translated ({type(error).__name__}){memory}"
            ) from None
        return (None, UNCHANGED) if said.split() == text.split() else (said, "")


class Translator:
    """One direction: a MarianMT model with its tokenizer, by hub name or local folder."""

    def __init__(self, key: str, name: str, options: BackTranslation, device: torch.device) -> None:
        """``key``: of ``back_translation`` in params.yaml, for messages. Raises as ``RoundTrip`` does."""
        self.device = device
        self.options = options
        self.model, self.tokenizer, self.digest = _load(f"back_translation.{key}", name)
        self.model.to(device).eval()
        positions = self.model.config.max_position_embeddings
        if options.max_tokens > positions:
            raise ParamsError(f"back_translation.max_tokens: {name} takes {positions} tokens at most")
        self.most = positions - 1  # new tokens, beside the one that starts decoding
        from transformers import GenerationConfig

        tokens = self.model.config
        self.model.generation_config = GenerationConfig(
            num_beams=options.beams,
            do_sample=True,
            temperature=options.temperature,
            top_k=TOP_K,
            renormalize_logits=True,  # a temperature leaves scores that are no probabilities, and beams add them up
            decoder_start_token_id=tokens.decoder_start_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            suppress_tokens=[self.tokenizer.pad_token_id],
        )

    def __call__(self, text: str, seed: int) -> tuple[str | None, str]:
        """The translation, sentences joined by a space, and ""; or None and the reason, as for ``RoundTrip``. A
        sentence without a letter ("1.", "___") stays as it is."""
        torch.manual_seed(seed)
        parts = cut_at_words(text, self._length, self.options.max_tokens)
        spoken = [i for i, part in enumerate(parts) if _has_words(part)]
        if not spoken:
            return None, WORDLESS
        for start in range(0, len(spoken), self.options.batch_size):
            places = spoken[start : start + self.options.batch_size]
            translated = self._batch([parts[i] for i in places])
            if translated is None:
                return None, ENDLESS
            if not all(map(_has_words, translated)):
                return None, WORDLESS
            for i, said in zip(places, translated, strict=True):
                parts[i] = said
        return " ".join(" ".join(parts).split()), ""

    @torch.inference_mode()
    def _batch(self, parts: list[str]) -> list[str] | None:
        inputs = self._encode(parts, padding=True, return_tensors="pt").to(self.device)
        limit = min(2 * inputs["input_ids"].shape[1] + 20, self.most)
        out = self.model.generate(**inputs, max_new_tokens=limit)
        ends = (out[:, 1:limit] == self.tokenizer.eos_token_id).any(dim=1)  # at the limit itself an end may be forced
        if not ends.all():
            return None
        said: list[str] = self.tokenizer.batch_decode(out, skip_special_tokens=True, use_source_tokenizer=False)
        return said

    def _length(self, part: str) -> int:
        return len(self._encode(part)["input_ids"])

    def _encode(self, text: str | list[str], **options: Any) -> Any:
        return self.tokenizer(text, split_special_tokens=True, verbose=False, **options)  # "</s>" in a report is text


def cut_at_words(text: str, length: Callable[[str], int], limit: int) -> list[str]:
    """The sentences of a text, those longer than ``limit`` cut between words, and a word longer than that within it.

    Args:
        length: number of tokens of a piece of text.
        limit: tokens of a piece.
    """
    pieces: list[str] = []
    for sentence in split_sentences(text):
        if length(sentence) <= limit:
            pieces.append(sentence)
            continue
        held = ""
        for word in sentence.split():
            for part in _halved(word, length, limit):
                if held and length(f"{held} {part}") > limit:
                    pieces.append(held)
                    held = ""
                held = f"{held} {part}".lstrip()
        pieces.append(held)
    return pieces


def choose_device(wanted: str, number: int = 0) -> torch.device:
    """``cpu``, or the CUDA device whose turn it is for process ``number``.

    Raises:
        ParamsError: cuda was asked for, and there is none; or torch cannot use it (``cuda_device``).
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not count:
        raise ParamsError("back_translation.device: cuda was asked for, but torch sees no CUDA device; set auto or cpu")
    if wanted == "cpu" or not count:
        return torch.device("cpu")
    return cuda_device(number % count, "back_translation.device")


def _halved(word: str, length: Callable[[str], int], limit: int) -> list[str]:
    if length(word) <= limit or len(word) == 1:
        return [word]
    half = len(word) // 2
    return [*_halved(word[:half], length, limit), *_halved(word[half:], length, limit)]


def _has_words(text: str) -> bool:
    return any(letter.isalpha() for letter in text)


def _load(key: str, name: str) -> tuple[Any, Any, str]:
    """Model, tokenizer and digest of both. What the folder or the hub holds is read as data."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        import sentencepiece  # noqa: F401
    except ImportError:
        raise TranslationError("MarianMT needs the package sentencepiece: make .venv/ready") from None
    from transformers import MarianMTModel, MarianTokenizer

    local = {"trust_remote_code": False, "local_files_only": True}
    with one_line(f"{key}: ", f"{name!r} could not be loaded", NO_TRANSLATOR, ParamsError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on another package
        with as_data(fetched(name, weights=True), weights=True) as folder:
            tokenizer = MarianTokenizer.from_pretrained(folder, **local)
            model, found = MarianMTModel.from_pretrained(
                folder, weights_only=True, dtype=torch.float32, output_loading_info=True, **local
            )
            digest = _digest(model, tokenizer)
    if found["missing_keys"] or found["mismatched_keys"]:
        raise ParamsError(f"{key}: {name!r} does not hold all weights of a MarianMT model")
    # Some machines have the package that tidies punctuation and some do not; the words must not depend on it.
    tokenizer.punc_normalizer = str
    return model, tokenizer, digest


def _digest(model: Any, tokenizer: Any) -> str:
    """blake2b of weights and vocabulary: a name may stand for other weights tomorrow."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    for file in tokenizer.spm_files:
        digest.update(Path(file).read_bytes())
    digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    return digest.hexdigest()
