"""The remembering tokenizer against the tokenizer itself, which is never wrong about its own ids."""

import random

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, ByteLevelBPETokenizer
from transformers import AutoTokenizer, BertConfig, PreTrainedTokenizerFast

from pipeline.config.params import TextEncoder
from pipeline.config.records import ParamsError
from pipeline.text import tokenizer as module
from pipeline.text.tokenizer import Tokenizer

REPORTS = [
    *("There is a small left pleural effusion.", "The heart is mildly enlarged, unchanged.", "No pneumothorax."),
    *("Übergröße des Herzens; 3.5 cm.", "Opacités bilatérales (à gauche)?", "ΌΔΟΣ İstanbul straße"),
]
# Whatever has confused a tokenizer before: white space of all kinds, control and combining characters, letters whose
# case or accent is peculiar, scripts without spaces, special tokens as text, pieces of words, a word without end.
ODD = [
    *(" ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028"),
    *("\u202f", "\u3000", "\u200b", "\u200d", "\ufeff", "\x00", "\x07", "\x7f", "\x9b", "\ufffd", "\xad", "\ue000"),
    *(
        "\u0301",
        "e\u0301",
        "\u0345",
        "Å",
        "İ",
        "ß",
        "ﬁ",
        "Σ",
        "ς",
        "\u1e9e",
        "肺",
        "肺炎",
        "ア",
        "한",
        "ก",
        "👩‍⚕️",
        "\U00020000",
    ),
    *(
        "[SEP]",
        "[CLS]",
        "[MASK]",
        "[PAD]",
        "[UNK]",
        "[sep]",
        "[MASK",
        "##usion",
        "##",
        "'",
        "--",
        "...",
        "½",
        "1,000.5",
    ),
    *("x" * 99, "x" * 100, "x" * 101, "effusion" * 15, "_", "@", "$", "`", "“", "’s"),
]


def bert(folder, **changes):
    """A BERT tokenizer as the hub's come: vocab.txt and config.json in a folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(33, 127)), "##s", "##usion", "heart", "肺"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    BertConfig(vocab_size=len(words), hidden_size=8, num_attention_heads=2, intermediate_size=8).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, **changes)


def byte_pairs():
    """A tokenizer of another kind, to which a space belongs to the word that follows it."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(REPORTS, vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, pad_token="<pad>")


def with_token(tokenizer, token):
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    return tokenizer


def left_cut(tokenizer):
    tokenizer.truncation_side = "left"
    return tokenizer


MAKERS = {  # and whether words may stand for texts
    "trained": (lambda _: Tokenizer.build(TextEncoder("", 200), REPORTS * 3).tokenizer, True),
    "uncased": (lambda folder: bert(folder), True),
    "cased": (lambda folder: bert(folder, do_lower_case=False), True),
    "greedy special token": (
        lambda folder: with_token(bert(folder), AddedToken("[X]", lstrip=True, rstrip=True)),
        True,
    ),
    "whole word token": (lambda folder: with_token(bert(folder), AddedToken("heart", single_word=True)), True),
    "spaced token": (lambda folder: with_token(bert(folder), AddedToken("heart is")), False),
    "cut on the left": (lambda folder: left_cut(bert(folder)), False),
    "byte pairs": (lambda _: byte_pairs(), False),
}


@pytest.fixture(params=list(MAKERS))
def kind(request, tmp_path):
    make, by_word = MAKERS[request.param]
    return make(tmp_path / "bert"), by_word


def odd_texts(count, seed):
    """Odd things, words and spaces, one after the other."""
    draw = random.Random(seed)
    words = [*" ".join(REPORTS).split(" "), "heart is", "[X]"]
    for _ in range(count):
        yield "".join(draw.choice((draw.choice(ODD), draw.choice(words), " ")) for _ in range(draw.randrange(40)))


@pytest.mark.parametrize("max_tokens", [8, 40, 400])
def test_ids_are_the_tokenizers_own(kind, max_tokens):
    tokenizer, by_word = kind
    ours = Tokenizer(tokenizer, max_tokens)
    assert (ours._frame is not None) == by_word
    texts = ["", " ", "\x00", *ODD, *REPORTS, *odd_texts(400, max_tokens), "heart 1.5 " * 200]
    truth = tokenizer(texts, truncation=True, max_length=max_tokens)["input_ids"]
    assert any(len(ids) == max_tokens for ids in truth) and any(len(ids) < max_tokens for ids in truth)
    for start in range(0, len(texts), 50):
        rows = ours.encode(texts[start : start + 50])
        assert all(row.dtype == np.int64 and row.ndim == 1 for row in rows)
        assert [row.tolist() for row in rows] == truth[start : start + 50]
    assert [row.tolist() for row in ours.encode(texts)] == truth  # now that all are known


def test_every_single_character_is_the_tokenizers_own(tmp_path):
    """Between letters and beside spaces, wherever scripts have white space, marks and controls."""
    for name, changes in (("uncased", {}), ("cased", {"do_lower_case": False})):
        tokenizer = bert(tmp_path / name, **changes)
        codes = [*range(0x600), 0x1680, 0x180E, *range(0x2000, 0x2100), *range(0x3000, 0x3040), *range(0xFE00, 0x10000)]
        texts = [f"a{chr(c)}b {chr(c)} c{chr(c)} {chr(c)}d" for c in codes]
        own = tokenizer(texts, truncation=True, max_length=64)["input_ids"]
        assert [row.tolist() for row in Tokenizer(tokenizer, 64).encode(texts)] == own


def test_a_batch_is_padded_as_the_tokenizer_pads_it(kind):
    tokenizer, _ = kind
    texts = [*REPORTS, "", "heart"]
    truth = tokenizer(texts, padding="longest", truncation=True, max_length=12, return_tensors="pt")
    ids, mask = Tokenizer(tokenizer, 12)(texts)
    assert ids.dtype == mask.dtype == torch.int64
    assert torch.equal(ids, truth["input_ids"]) and torch.equal(mask, truth["attention_mask"])


class Counting:
    """A tokenizer that notes what it is asked."""

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        self.asked += [texts] if isinstance(texts, str) else texts
        return self.tokenizer(texts, **options)


def test_a_word_is_tokenised_once(tmp_path):
    counting = Counting(bert(tmp_path / "bert"))
    ours = Tokenizer(counting, 32)
    counting.asked.clear()
    ours.encode(["no effusion no scar", "a scar"])
    assert counting.asked == ["no", "effusion", "scar", "a"]
    ours(["a scar no", "no nodule"])
    assert counting.asked == ["no", "effusion", "scar", "a", "nodule"]


def test_a_tokenizer_of_another_kind_is_asked_for_a_text_once():
    counting = Counting(byte_pairs())
    ours = Tokenizer(counting, 32)
    counting.asked.clear()
    ours.encode(["no effusion", "a scar", "no effusion"])
    ours.encode(["a scar", "no effusion", "a"])
    assert counting.asked == ["no effusion", "a scar", "a"]


def test_memory_is_bounded(kind, monkeypatch):
    monkeypatch.setattr(module, "MAX_WORDS", 50)
    monkeypatch.setattr(module, "MAX_TEXTS", 3)
    tokenizer, by_word = kind
    ours = Tokenizer(tokenizer, 32)
    for start in range(60):
        texts = [f"heart {start} is {start + 1}", f"left {start + 2}", REPORTS[start % 6]]
        assert [r.tolist() for r in ours.encode(texts)] == tokenizer(texts, truncation=True, max_length=32)["input_ids"]
        assert len(ours._known) <= (50 if by_word else 3)


@pytest.mark.parametrize("max_tokens", [0, 1, 2])
def test_a_row_must_have_room_for_text(tmp_path, max_tokens):
    with pytest.raises(ParamsError, match=rf"max_tokens: {max_tokens} leaves no room for text; set more than 2"):
        Tokenizer(bert(tmp_path / "bert"), max_tokens)
