"""The two encoders and the tokenizer (paper section 3.2): timm for images, a BERT of transformers for text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.params import ImageEncoder, ParamsError, TextEncoder


class ImageTower(nn.Module):
    """A timm model up to its global average pool (the paper pools ResNet and Swin alike)."""

    mean: Tensor
    std: Tensor

    def __init__(self, options: ImageEncoder, image_size: int, load_weights: bool) -> None:
        """``load_weights`` False builds the architecture alone, to be filled from a checkpoint."""
        super().__init__()
        import timm

        args = dict(options.args)
        if "swin" in options.name:
            args.setdefault("img_size", image_size)
        pretrained = options.pretrained and load_weights
        try:
            self.model = timm.create_model(options.name, pretrained=pretrained, num_classes=0, **args)
        except (OSError, RuntimeError, TypeError) as error:
            if pretrained:
                raise ParamsError(
                    f"model.image_encoders: weights of {options.name} could not be had ({type(error).__name__}); they "
                    "come from the Hugging Face hub: allow network access once, or set pretrained: false"
                ) from None
            raise ParamsError(f"model.image_encoders: timm cannot build {options.name}: {error}") from None
        self.width: int = self.model.num_features
        self.register_buffer("mean", torch.tensor(options.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(options.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Grey uint8 [B, S, S] -> pooled features [B, width]."""
        x = images.unsqueeze(1).to(self.mean.dtype) / 255
        x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return self.model(x)


class TextTower(nn.Module):
    """A BERT, pooled at the last non-padding token ([SEP] stands for the paper's [EOS])."""

    def __init__(self, options: TextEncoder, vocabulary: int, load_weights: bool) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel, BertModel

        if options.name and load_weights:
            self.model = _from_hub(BertModel.from_pretrained, options.name, add_pooling_layer=False)
        elif options.name:
            self.model = BertModel(_from_hub(AutoConfig.from_pretrained, options.name), add_pooling_layer=False)
        else:
            sizes = {"model_type": "roformer", "max_position_embeddings": options.max_tokens, **options.args}
            self.model = AutoModel.from_config(AutoConfig.for_model(vocab_size=vocabulary, **sizes))
        self.width: int = self.model.config.hidden_size

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Token ids and attention mask, int64 [B, L], padded on the right -> features [B, width]."""
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        last = mask.sum(dim=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


class Tokenizer:
    """Texts to padded id tensors, through a fast tokenizer of transformers."""

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def __len__(self) -> int:
        """Number of ids."""
        return len(self.tokenizer)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask, int64 [B, L], L the longest text's length and at most ``max_tokens``."""
        out = self.tokenizer(
            list(texts), padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        return out["input_ids"], out["attention_mask"]

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into a folder."""
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path, max_tokens: int) -> Tokenizer:
        """Read what ``save`` wrote."""
        from transformers import PreTrainedTokenizerFast

        return cls(PreTrainedTokenizerFast.from_pretrained(folder), max_tokens)

    @classmethod
    def build(cls, options: TextEncoder, corpus: Iterable[str]) -> Tokenizer:
        """The hub's tokenizer of ``options.name``, or (empty name) a lower-casing WordPiece trained on the corpus.

        Training is deterministic. The trainer breaks ties between pairs by their pieces' numbers, and would number the
        pieces "##x" in the order of a hash table; so they are listed up front. Texts are framed as [CLS] ... [SEP].
        """
        if options.name:
            from transformers import AutoTokenizer

            return cls(_from_hub(AutoTokenizer.from_pretrained, options.name), options.max_tokens)
        from tokenizers import BertWordPieceTokenizer
        from transformers import PreTrainedTokenizerFast

        texts = list(corpus)
        trained = BertWordPieceTokenizer(lowercase=True)
        letters = sorted({letter for text in texts for letter in trained.normalize(text) if not letter.isspace()})
        first = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"##{letter}" for letter in letters)]
        trained.train_from_iterator(
            texts, vocab_size=options.vocabulary, min_frequency=2, special_tokens=first, show_progress=False
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


def _from_hub(load: Any, name: str, **args: Any) -> Any:
    """Load by hub name or local folder; what is missing becomes one clear line."""
    try:
        return load(name, trust_remote_code=False, **args)
    except (OSError, ValueError) as error:
        raise ParamsError(
            f"model.text_encoder.name: {name!r} could not be loaded ({type(error).__name__}); give a local folder with "
            "config.json, model.safetensors and vocab.txt, or allow access to the Hugging Face hub once"
        ) from None
