"""Masked language modelling: words are taken out of a text, and a head on the encoder's states guesses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.keyed_random import keyed_mask, keyed_numbers, stream_seeds
from pipeline.models.vectors import at_least_float32
from pipeline.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class WordMask:
    """Which words are taken out of texts: decided by each study's draw alone, as dropout is
    (``pipeline.models.keyed_dropout``), and on the CPU, so that how many there are is known without asking a device.

    Attributes:
        special: bool [V], ids that are no words; ``words``: the other ids, int64.
        mask_id: the id of [MASK], one of them.
        rate: share of words taken out.
    """

    special: Tensor
    words: Tensor
    mask_id: int
    rate: float

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float) -> WordMask:
        """With the special ids of a tokenizer that has a [MASK]."""
        special = torch.zeros(len(tokenizer), dtype=torch.bool)
        special[list(tokenizer.tokenizer.all_special_ids)] = True
        return cls(special, (~special).nonzero().flatten(), tokenizer.tokenizer.mask_token_id, rate)

    def take_out(self, tokens: Tensor, mask: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens that are no special ones ``rate`` are asked for: 80 % of those become [MASK], 10 % another
        word (any, the same chance for each), 10 % stay (Devlin et al., NAACL 2019).

        Args:
            tokens, mask: int64 [g, L], on the CPU.
            keys: int64 [g], one a text.

        Returns:
            Tokens as the tower sees them, and those asked for, -1 elsewhere; int64 [g, L].
        """
        shape = tokens.shape[1:]
        which, how, what = (stream_seeds(keys + stream) for stream in range(3))
        asked = keyed_mask(which, shape, self.rate) & mask.bool() & ~self.special[tokens]
        word = self.words[keyed_numbers(what, shape).long() % len(self.words)]
        said = torch.where(keyed_mask(how, shape, 0.9), word, tokens)
        said = said.masked_fill(keyed_mask(how, shape, 0.8), self.mask_id)
        return torch.where(asked, said, tokens), tokens.masked_fill(~asked, -1)


class MaskedWords(nn.Module):
    """BERT's guess at words that were taken out of a text (Devlin et al., NAACL 2019).

    The head is BERT's: linear, GELU, LayerNorm, then the product with the tower's own word embeddings and a bias.
    """

    def __init__(self, width: int, embedding: nn.Embedding) -> None:
        """``width``: of the tower's states."""
        super().__init__()
        vocabulary, size = embedding.weight.shape
        self.transform = nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.LayerNorm(size))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, hidden: Tensor, words: Tensor, asked: int, embedding: Tensor) -> Tensor:
        """The sum of -log p(word) of each text, float32 [g].

        Args:
            hidden: states [g, L, width].
            words: those asked for, int64 [g, L] (-1: none); ``asked``: how many they are.
            embedding: the tower's word embeddings.
        """
        row, place = torch.nonzero_static(words >= 0, size=asked).unbind(1)
        guess = F.linear(self.transform(hidden[row, place]), embedding, self.bias)
        missed = F.cross_entropy(at_least_float32(guess), words[row, place], reduction="none")
        return missed.new_zeros(len(words)).index_add(0, row, missed)
