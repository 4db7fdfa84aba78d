"""Texts to token ids (paper section 3.2): each distinct word goes through the tokenizer once in a process.

The memo is ours, because transformers' fast tokenizer, given whole batches, takes 10 times as long: 0.5 ms a study.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config.params import TextEncoder
from pipeline.config.records import ParamsError
from pipeline.storage.model_folder import as_data, fetched, one_line

NO_TEXT_ENCODER = (
    "; give a local folder with config.json, model.safetensors and vocab.txt, or allow access to the Hugging Face hub "
    "once"
)
MAX_WORDS = 1 << 17  # remembered by a process, some 30 MB; few archives have as many
MIN_PATIENTS = 5  # whose reports have a word that a vocabulary is learnt from
MAX_TEXTS = 1 << 13  # where a tokenizer wants texts whole


class Tokenizer:
    """A fast tokenizer of transformers that remembers.

    Tokenizers of BERT's kind look at no two letters that a space parts, so the ids of a text are those of its words,
    one after the other. Only words not seen before reach such a tokenizer; any other one is given whole texts. The ids
    are the tokenizer's own in either case.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """``max_tokens`` is the length of the longest row, [CLS] and [SEP] included.

        Raises:
            ParamsError: it leaves no room for text.
        """
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        (empty,) = self._own([""], True, None)
        if max_tokens <= len(empty):
            raise ParamsError(
                f"model.text_encoder.max_tokens: {max_tokens} leaves no room for text; set more than {len(empty)}"
            )
        self._frame = _frame(tokenizer) if _cuts_at_spaces(tokenizer) else None
        self._known: dict[str, bytes] = {}  # ids as int64, which are put together faster than whole numbers

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, L], padded on the right; L the longest text's length and at most ``max_tokens``."""
        rows = self.encode(texts)
        tokens = np.full((len(rows), max(map(len, rows))), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros_like(tokens)
        for i, row in enumerate(rows):
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = 1
        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as int64 [L], between [CLS] and [SEP], cut to ``max_tokens``; nothing is padded. They are
        not to be written to."""
        if self._frame is None:
            return self._found([[text] for text in texts], MAX_TEXTS, self.max_tokens)
        return self._found([text.split(" ") for text in texts], MAX_WORDS, None)

    def _found(self, texts: list[list[str]], limit: int, max_tokens: int | None) -> list[np.ndarray]:
        """Rows of texts in pieces: words (``max_tokens`` None) or wholes. All pieces are forgotten when they would be
        more than ``limit``."""
        try:
            return self._joined(texts)
        except KeyError:
            known, pieces = self._known, dict.fromkeys(chain.from_iterable(texts))
        missing = [piece for piece in pieces if piece not in known]
        if len(known) + len(missing) > limit:
            known.clear()
            missing = list(pieces)
        ids = self._own(missing, max_tokens is not None, max_tokens)
        known.update(zip(missing, (np.array(row, dtype=np.int64).tobytes() for row in ids), strict=True))
        return self._joined(texts)

    def _joined(self, texts: list[list[str]]) -> list[np.ndarray]:
        first, last = (np.array(ids, dtype=np.int64).tobytes() for ids in self._frame or ([], []))
        end, look_up = 8 * self.max_tokens - len(last), self._known.__getitem__
        bodies = (b"".join([first, *map(look_up, text)])[:end] + last for text in texts)
        return [np.frombuffer(body, dtype=np.int64) for body in bodies]

    def _own(self, texts: list[str], framed: bool, max_tokens: int | None) -> list[list[int]]:
        out = self.tokenizer(
            texts,
            add_special_tokens=framed,
            truncation=max_tokens is not None,
            max_length=max_tokens,
            verbose=False,
        )
        return list(out["input_ids"])

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, max_tokens: int) -> Tokenizer:
        """Read what ``save`` wrote.

        Raises:
            Refused: a file of the folder asks for something else; one line.
        """
        from transformers import PreTrainedTokenizerFast

        with as_data(folder) as clean:
            read = PreTrainedTokenizerFast.from_pretrained(clean, trust_remote_code=False, local_files_only=True)
        return cls(_unmarked(read, True), max_tokens)

    @classmethod
    def build(
        cls, options: TextEncoder, sentences: Iterable[str], reports: Iterable[tuple[str, str]] = ()
    ) -> Tokenizer:
        """The hub's tokenizer of ``options.name``, or (empty name) a lower-casing WordPiece trained on texts.

        A word of reports is learnt from only if ``MIN_PATIENTS`` or more have it: the vocabulary is part of the model,
        and rarer words may be names. Their letters are known to it, as are those of all words.

        Args:
            sentences: texts that are nobody's, such as prompts.
            reports: whose a text is, and the text.

        Training is deterministic. The trainer breaks ties between pairs by their pieces' numbers, and would number the
        pieces "##x" in the order of a hash table; so they are listed up front. Texts are framed as [CLS] ... [SEP].
        """
        if options.name:
            from transformers import AutoTokenizer

            load = lambda folder, **local: tried(AutoTokenizer.from_pretrained(folder, **local))  # noqa: E731
            return cls(from_hub(load, options.name), options.max_tokens)
        from tokenizers import BertWordPieceTokenizer
        from transformers import PreTrainedTokenizerFast

        trained = BertWordPieceTokenizer(lowercase=True)
        letters, counts = _learnt_from(trained, sentences, reports)
        first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{letter}" for letter in letters)]
        trained.train_from_iterator(
            (f"{word} " * count for word, count in counts.items()),
            vocab_size=options.vocabulary,
            min_frequency=2,
            special_tokens=first,
            initial_alphabet=letters,
            show_progress=False,
        )
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=BertWordPieceTokenizer(trained.get_vocab(), lowercase=True)._tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            mask_token="[MASK]",
        )
        return cls(wrapped, options.max_tokens)


def _learnt_from(
    tokenizer: Any, sentences: Iterable[str], reports: Iterable[tuple[str, str]]
) -> tuple[list[str], dict[str, int]]:
    """All letters of the texts, sorted, and how often the words are said that sentences or enough patients have.

    Texts are cut at spaces first, and what is between them goes through the tokenizer's own steps once.
    """
    said = Counter(chain.from_iterable(text.split() for text in sentences))
    public = set(said)
    patients: dict[str, set[str]] = defaultdict(set)  # of a piece; no more of them than are needed
    for patient, text in reports:
        pieces = text.split()
        said.update(pieces)
        for piece in pieces:
            if len(patients[piece]) < MIN_PATIENTS:
                patients[piece].add(patient)
    counts: Counter[str] = Counter()
    whose: dict[str, set[str]] = defaultdict(set)
    common = set()
    split = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str
    for piece in sorted(said):
        for word, _ in split(tokenizer.normalize(piece)):
            counts[word] += said[piece]
            whose[word] |= patients[piece]
            if piece in public or len(whose[word]) >= MIN_PATIENTS:
                common.add(word)
    return sorted(set(chain.from_iterable(counts))), {word: n for word, n in counts.items() if word in common}


def _cuts_at_spaces(tokenizer: Any) -> bool:
    """Whether the ids of a text are certain to be those of its words in turn, a word being what is between spaces."""
    if not tokenizer.is_fast or tokenizer.truncation_side != "right":
        return False
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kinds = [(parts[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    return (
        kinds in (["BertNormalizer", "BertPreTokenizer", "WordPiece"], [None, "BertPreTokenizer", "WordPiece"])
        and not any(" " in token["content"] for token in parts["added_tokens"])
        and _frame(tokenizer) is not None
    )


def _frame(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The ids that the tokenizer puts before and after those of a text; None if it does something else to them."""
    (nothing, framed), bare = tokenizer(["", "a"])["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for i in range(len(nothing) + 1):
        if [*nothing[:i], *bare, *nothing[i:]] == framed:
            return nothing[:i], nothing[i:]
    return None


def tried(tokenizer: Any) -> Any:
    """A tokenizer of transformers as it is; some that are damaged fail only where they are given a text, with an error
    of any class."""
    tokenizer(["", "a word"])
    return tokenizer


def _unmarked(found: Any, local: bool) -> Any:
    """A tokenizer, or anything else as it is. ``save`` writes how it was read, by which a run knows it again: by its
    own name (``local``: a folder's), not from a temporary folder and offline."""
    if "local_files_only" in getattr(found, "init_kwargs", ()):
        found.init_kwargs |= {"is_local": local, "local_files_only": False}
    return found


def from_hub(load: Any, name: str, weights: bool = False, **args: Any) -> Any:
    """Load a text encoder (``weights``), its configuration or its tokenizer by hub name or local folder; what either
    holds is read as data (``pipeline.storage.model_folder``).

    Raises:
        ParamsError: one clear line on what is missing or refused.
    """
    with one_line("model.text_encoder.name: ", f"{name!r} could not be loaded", NO_TEXT_ENCODER, ParamsError):
        folder = fetched(name, weights)
        with as_data(folder, weights) as clean:
            return _unmarked(load(clean, trust_remote_code=False, local_files_only=True, **args), folder == Path(name))
