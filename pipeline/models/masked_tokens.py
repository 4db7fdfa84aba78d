"""Masked language modelling: words are taken out of a text, and a head on the encoder's states guesses them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.keyed_random import keyed_mask, keyed_numbers, stream_seeds
from pipeline.models.vectors import at_least_float32


class MaskedWords(nn.Module):
    """BERT's guess at words that were taken out of a text (Devlin et al., NAACL 2019).

    The head is BERT's: linear, GELU, LayerNorm, then the product with the tower's own word embeddings and a bias. Which
    words are taken out is decided by the study's draw alone, as dropout is (``pipeline.models.keyed_dropout``).
    """

    special: Tensor
    plain: Tensor

    def __init__(self, width: int, embedding: nn.Embedding, special: Sequence[int], mask_id: int, rate: float) -> None:
        """``width``: of the tower's states; ``special``: ids that are no words; ``rate``: share of words taken out."""
        super().__init__()
        vocabulary, size = embedding.weight.shape
        self.rate, self.mask_id = rate, mask_id
        self.transform = nn.Sequential(nn.Linear(width, size), nn.GELU(), nn.LayerNorm(size))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        is_special = torch.zeros(vocabulary, dtype=torch.bool)
        is_special[list(special)] = True
        self.register_buffer("special", is_special, persistent=False)
        self.register_buffer("plain", (~is_special).nonzero().flatten(), persistent=False)

    def take_out(self, tokens: Tensor, mask: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Of the tokens that are no special ones ``rate`` are asked for: 80 % of those become [MASK], 10 % another
        word (any, the same chance for each), 10 % stay.

        Args:
            tokens, mask: int64 [g, L].
            keys: int64 [g], one a text.

        Returns:
            Tokens as the tower sees them, and those asked for, -1 elsewhere; int64 [g, L].
        """
        shape = tokens.shape[1:]
        which, how, what = (stream_seeds(keys + stream) for stream in range(3))
        asked = keyed_mask(which, shape, self.rate) & mask.bool() & ~self.special[tokens]
        word = self.plain[keyed_numbers(what, shape).long() % len(self.plain)]
        said = torch.where(keyed_mask(how, shape, 0.9), word, tokens)
        said = said.masked_fill(keyed_mask(how, shape, 0.8), self.mask_id)
        return torch.where(asked, said, tokens), tokens.masked_fill(~asked, -1)

    def forward(self, hidden: Tensor, words: Tensor, embedding: Tensor) -> Tensor:
        """States [g, L, width], words asked for, int64 [g, L] (-1: none), and the tower's word embeddings -> the sum of
        -log p(word) of each text, float32 [g]."""
        row, place = (words >= 0).nonzero(as_tuple=True)
        guess = F.linear(self.transform(hidden[row, place]), embedding, self.bias)
        missed = F.cross_entropy(at_least_float32(guess), words[row, place], reduction="none")
        return missed.new_zeros(len(words)).index_add(0, row, missed)
