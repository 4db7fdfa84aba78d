"""The two encoders (paper section 3.2): timm for images, a BERT of transformers for text."""

from __future__ import annotations

import os
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config.params import ImageEncoder, TextEncoder
from pipeline.config.records import ParamsError
from pipeline.models.first_weights import load_first_weights
from pipeline.models.keyed_dropout import draw_by_study
from pipeline.storage.model_folder import MOST_NUMBERS, bounded, check_size, configuration, one_line
from pipeline.storage.torch_archive import Refused
from pipeline.text.tokenizer import from_hub

# Arguments of timm.create_model that read files or change how code is compiled; so do those named pretrained*.
OF_FILES = frozenset(("checkpoint_path", "cache_dir", "scriptable", "exportable", "no_jit"))


def is_architecture(name: str) -> bool:
    """Whether timm itself has a model of this name, which then can be no path and no name of a hub."""
    import timm

    return re.fullmatch(r"[A-Za-z0-9_.-]+", name) is not None and timm.is_model(name)


class ImageTower(nn.Module):
    """A timm model up to its global average pool (the paper pools ResNet and Swin alike)."""

    mean: Tensor
    std: Tensor

    def __init__(self, options: ImageEncoder, image_size: int, load_weights: bool) -> None:
        """``load_weights`` False builds the architecture alone, to be filled from a checkpoint."""
        super().__init__()
        import timm

        if not is_architecture(options.name):
            raise ParamsError(f"model.image_encoders: timm cannot build {options.name}: it has no such architecture")
        if named := sorted(key for key in options.args if key.startswith("pretrained") or key in OF_FILES):
            raise ParamsError(f"model.image_encoders: {options.name}: args: {named[0]} is no part of an architecture")
        args = dict(options.args)
        if "swin" in options.name:
            args.setdefault("img_size", image_size)
        pretrained = options.pretrained and load_weights
        try:
            with bounded(MOST_NUMBERS, "args") if options.args else nullcontext():
                self.model = timm.create_model(options.name, pretrained=pretrained, num_classes=0, **args)
            if options.args:
                _check_rows(self.model, image_size)
        except Exception as error:  # of any class: arguments reach all parts of an architecture
            if pretrained:
                raise ParamsError(
                    f"model.image_encoders: weights of {options.name} could not be loaded ({type(error).__name__}); "
                    "they come from the Hugging Face hub: allow network access once, or set pretrained: false"
                ) from None
            reason = " ".join(str(error).split())[:200]
            raise ParamsError(f"model.image_encoders: timm cannot build {options.name}: {reason}") from None
        if options.weights and load_weights:
            with one_line(f"model.image_encoders: {options.name}: weights: ", "could not be loaded", kind=ParamsError):
                used = load_first_weights(self.model, Path(options.weights))
            if os.environ.get("RANK", "0") == "0":  # of several processes one says so
                print(f"image encoder {options.name}: {used}", flush=True)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.rows = draw_by_study(self.model, f"model.image_encoders: {options.name}")
        self.width: int = self.model.num_features
        self.register_buffer("mean", torch.tensor(options.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(options.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Grey uint8 [B, S, S] -> pooled features [B, width].

        ``keys``, int64 [B], decide what stochastic depth drops in training (see ``pipeline.models.keyed_dropout``).
        """
        self.rows.are(keys)
        return self.model(self.normalise(images))

    def places(self, images: Tensor) -> Tensor | None:
        """Grey uint8 [B, S, S] -> the last feature map [B, h, w, width]; None where the model has no map."""
        found = self.model.forward_features(self.normalise(images))
        if found.dim() != 4:
            return None
        return found.permute(0, 2, 3, 1) if getattr(self.model, "output_fmt", "NCHW") == "NCHW" else found

    def normalise(self, images: Tensor) -> Tensor:
        """Grey uint8 [B, S, S] -> the model's input [B, 3, S, S]: grey in [0, 1], less mean, over deviation."""
        factor, offset = 1 / (255 * self.std), -self.mean / self.std
        grey = images.to(factor.dtype).unsqueeze(-1)
        x = torch.addcmul(offset.view(3), grey, factor.view(3))  # [B, S, S, 3]
        return x.permute(0, 3, 1, 2)  # which in torch's terms is channels-last


@torch.no_grad()
def _check_rows(model: Any, size: int) -> None:
    """Raise an error of any class unless the model turns pictures of ``size`` x ``size`` into rows of its width."""
    found = model.eval()(torch.zeros(1, 3, size, size))
    if found.shape != (1, model.num_features):
        raise ValueError("args: with these it does not give one row a picture")
    model.train()


class TextTower(nn.Module):
    """A BERT, pooled at the last non-padding token ([SEP] is the paper's [EOS])."""

    def __init__(self, options: TextEncoder, vocabulary: int, load_weights: bool) -> None:
        super().__init__()
        self.named = bool(options.name)  # else its architecture is in the run's parameters
        if options.name:
            self.model = from_hub(partial(_bert, options.name, load_weights), options.name, weights=load_weights)
        else:
            self.model = _random(options, vocabulary)
            if hasattr(self.model, "pooler"):
                self.model.pooler = None  # never used: DDP would wait for its gradients
        self.rows = draw_by_study(self.model, "model.text_encoder")
        self.width: int = self.model.config.hidden_size

    def forward(self, tokens: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """Token ids and attention mask, int64 [B, L], padded on the right -> features [B, width].

        ``keys``, int64 [B], decide what dropout drops in training (see ``pipeline.models.keyed_dropout``).
        """
        return self.pooled(self.hidden(tokens, mask, keys), mask)

    def hidden(self, tokens: Tensor, mask: Tensor, keys: Tensor | None = None) -> Tensor:
        """The last layer's states, [B, L, width]; arguments as in ``forward``."""
        self.rows.are(keys)
        return self.model(input_ids=tokens, attention_mask=mask).last_hidden_state

    def pooled(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Of [B, L, width] the state at the last token of each row, [B, width]."""
        last = mask.sum(dim=1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _bert(name: str, load_weights: bool, folder: Path, **local: bool) -> Any:
    """The BERT of a folder, or (``load_weights`` False) one of its sizes.

    Raises:
        Refused: it is another model, or weights are missing.
    """
    from transformers import BertConfig, BertModel

    kind = BertConfig.get_config_dict(folder, **local)[0].get("model_type", "bert")  # old files do not say
    if kind != "bert":
        raise Refused(f"{name!r} is a {kind}; the text encoder has to be a bert")
    if not load_weights:
        config = BertConfig.from_pretrained(folder, **local)
        check_size(lambda: BertModel(config, add_pooling_layer=False), MOST_NUMBERS, "config.json")
        return BertModel(config, add_pooling_layer=False)
    model, found = BertModel.from_pretrained(
        folder,
        add_pooling_layer=False,
        dtype=torch.float32,  # whatever width it was saved in: autocast decides what is computed in half
        weights_only=True,
        output_loading_info=True,
        **local,
    )
    if missing := sorted(map(str, found["missing_keys"])):
        raise Refused(f"{name!r}: its weights are of another model: {missing[0]} is missing ({len(missing)} in all)")
    return model


def _random(options: TextEncoder, vocabulary: int) -> Any:
    """The text encoder of ``model.text_encoder.args``, with random weights.

    Raises:
        ParamsError: one of them is no part of an architecture of transformers, or none can be made of them.
    """
    from transformers import AutoConfig, AutoModel

    sizes = {"model_type": "roformer", "max_position_embeddings": options.max_tokens, **options.args}
    key, kind = "model.text_encoder.args: ", sizes["model_type"]
    with one_line("", key + "not an architecture", kind=ParamsError):
        kept = configuration(sizes, key.removesuffix(": "))
    known = {"model_type", *vars(AutoConfig.for_model(kind)), *AutoConfig.for_model(kind).attribute_map}
    if lost := sorted(set(sizes) - (set(kept) & known)):
        raise ParamsError(f"{key}{lost[0]}: {kind} has no such key")
    with one_line(key, f"{kind} cannot be built of them", kind=ParamsError):
        config = AutoConfig.for_model(vocab_size=vocabulary, **sizes)
        build = partial(AutoModel.from_config, config, trust_remote_code=False)
        check_size(build, MOST_NUMBERS, kind)
        model = build()
        with torch.no_grad():  # some models find only then that their sizes do not go together
            model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long), attention_mask=torch.ones(1, 2))
        return model.train()
