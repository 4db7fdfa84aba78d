"""Encoders that several projects share, built from the shapes in their checkpoints and filled to the last tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.adapters.weights import MissingWeights, fill
from pipeline.storage.model_folder import as_data, json_table, one_line
from pipeline.text.tokenizer import Tokenizer, tried

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]


def resnet50(tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """torchvision's ResNet of bottlenecks without its classifier: [B, 3, H, W] -> [B, 2048] after the global average
    pool. As many blocks as the checkpoint has."""
    from torchvision.models.resnet import Bottleneck, ResNet

    net = ResNet(Bottleneck, [_count(tensors, rf"layer{stage}\.(\d+)\.", where) for stage in (1, 2, 3, 4)])
    net.fc = nn.Identity()
    fill(net, tensors, where)
    return net.eval()


def resnet_maps(net: nn.Module, inputs: Tensor, stages: int = 4) -> Tensor:
    """The feature map after the given number of stages of ``resnet50``: [B, 3, H, W] -> [B, C, h, w]."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(inputs))))  # type: ignore[operator]
    for stage in range(1, stages + 1):
        x = getattr(net, f"layer{stage}")(x)
    return x


class Swin(nn.Module):
    """Hugging Face's Swin Transformer as its checkpoints lay it out, in timm's implementation of it.

    Names of modules in transformers change with its versions, those of published files do not.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__()
        from timm.models.swin_transformer import SwinTransformer

        depths = [0] * _count(tensors, r"encoder\.layers\.(\d+)\.", where)
        for stage in range(len(depths)):
            depths[stage] = _count(tensors, rf"encoder\.layers\.{stage}\.blocks\.(\d+)\.", where)
        bias = "encoder.layers.{}.blocks.0.attention.self.relative_position_bias_table"
        tables = [_tensor(tensors, bias.format(stage), where) for stage in range(len(depths))]
        patch = _tensor(tensors, "embeddings.patch_embeddings.projection.weight", where)
        window = (round(tables[0].shape[0] ** 0.5) + 1) // 2
        self.model = SwinTransformer(
            img_size=224,
            patch_size=patch.shape[-1],
            embed_dim=patch.shape[0],
            depths=tuple(depths),
            num_heads=tuple(table.shape[1] for table in tables),
            window_size=window,
            num_classes=0,
        )
        fill(self.model, _timm_names(tensors, where), where)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> tokens of the last map after the final norm, row by row: [B, places, C]."""
        return self.model.forward_features(inputs).flatten(1, 2)


def _timm_names(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The keys of Hugging Face's Swin -> timm's; what is not known keeps its name, so that ``fill`` complains."""
    rules = (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^layernorm\.", "norm."),
        (r"^encoder\.layers\.", "layers."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.self\.relative_position_bias_table$", ".attn.relative_position_bias_table"),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
    )
    named: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if match := re.search(r"^encoder\.layers\.(\d+)\.downsample\.(.+)$", key):
            # merging of patches ends a stage there and begins the next one here
            named[f"layers.{int(match[1]) + 1}.downsample.{match[2]}"] = value
        elif match := re.search(r"^(.+)\.attention\.self\.query\.(weight|bias)$", key):
            parts = [
                _tensor(tensors, f"{match[1]}.attention.self.{p}.{match[2]}", where) for p in ("query", "key", "value")
            ]
            named[f"{match[1].removeprefix('encoder.')}.attn.qkv.{match[2]}"] = torch.cat(parts)
        elif re.search(r"\.attention\.self\.(key|value)\.(weight|bias)$", key):
            continue
        elif key.endswith(".attention.self.relative_position_index"):
            _check_index(value, tensors, key, where)
        else:
            for pattern, ours in rules:
                key = re.sub(pattern, ours, key)
            named[key] = value
    return named


def _check_index(index: Tensor, tensors: Mapping[str, Tensor], key: str, where: str) -> None:
    """A buffer that follows from the window's size, and must be what follows.

    Raises:
        ValueError: it is not.
    """
    from timm.models.swin_transformer import get_relative_position_index

    side = round(index.shape[0] ** 0.5)
    if not torch.equal(index.cpu(), get_relative_position_index(side, side)):
        raise ValueError(f"{where}{key}: is not the index of a window of {side} x {side}")


class Bert(nn.Module):
    """A BERT of transformers with the sizes of its checkpoint; heads of 64, as every published BERT has."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        words = _tensor(tensors, "embeddings.word_embeddings.weight", where)
        hidden = words.shape[1]
        config = BertConfig(
            vocab_size=words.shape[0],
            hidden_size=hidden,
            num_hidden_layers=_count(tensors, r"encoder\.layer\.(\d+)\.", where),
            num_attention_heads=max(1, hidden // 64),
            intermediate_size=_tensor(tensors, "encoder.layer.0.intermediate.dense.weight", where).shape[0],
            max_position_embeddings=_tensor(tensors, "embeddings.position_embeddings.weight", where).shape[0],
            type_vocab_size=_tensor(tensors, "embeddings.token_type_embeddings.weight", where).shape[0],
        )
        self.model = BertModel(config, add_pooling_layer="pooler.dense.weight" in tensors)
        self.vocabulary: int = words.shape[0]
        fill(self.model, tensors, where)
        self.eval()

    def forward(self, tokens: Tensor, mask: Tensor) -> list[Tensor]:
        """int64 [B, L] -> the embedding layer's and every layer's output, each [B, L, hidden]."""
        found = self.model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
        return list(found.hidden_states)


def wordpieces(folder: Path, bert: Bert, max_tokens: int) -> Tokenizer:
    """The tokenizer in ``folder``/tokenizer: vocab.txt (lower-casing unless tokenizer_config.json says otherwise, which
    is what transformers does where that file is missing), or else tokenizer.json.

    Raises:
        MissingWeights: there is neither.
        ValueError: it has another number of words than the checkpoint.
    """
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    at = folder / "tokenizer"
    config = at / "tokenizer_config.json"
    with_words = (at / "vocab.txt").is_file()
    if not with_words and not (at / "tokenizer.json").is_file():
        raise MissingWeights(
            f"{at}/vocab.txt: not there; the checkpoint does not hold its words, put its BERT's vocab.txt there"
        )
    with one_line("", f"{at}: not a tokenizer", "; put its BERT's vocab.txt there"):
        if with_words:
            # Only this key is read, so the file may ask for code that nobody runs.
            lower = json_table(config).get("do_lower_case", True) if config.is_file() else True
            words = (at / "vocab.txt").read_text(encoding="utf-8").split("\n")
            ids = {word: i for i, word in enumerate(words) if word}
            fast = PreTrainedTokenizerFast(
                tokenizer_object=BertWordPieceTokenizer(ids, lowercase=bool(lower))._tokenizer,
                **{f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")},
            )
        else:
            with as_data(at) as clean:
                fast = PreTrainedTokenizerFast.from_pretrained(clean, trust_remote_code=False, local_files_only=True)
        tried(fast)
    if len(fast) != bert.vocabulary:
        raise ValueError(
            f"{at}: has {len(fast)} words where the checkpoint has {bert.vocabulary}; it is another BERT's"
        )
    return Tokenizer(fast, max_tokens)


def linear(tensors: Mapping[str, Tensor], where: str) -> nn.Linear:
    """A linear layer with the shape of its weight, with a bias where there is one."""
    weight = _tensor(tensors, "weight", where)
    if weight.dim() != 2:
        raise ValueError(f"{where}weight: {list(weight.shape)} is not a matrix")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
    fill(layer, tensors, where)
    return layer.eval()


def normalise_input(inputs: Tensor, statistics: Statistics) -> Tensor:
    """Grey uint8 [B, S, S] -> float32 [B, 3, S, S]: grey in [0, 1] three times, less the mean, over the deviation."""
    mean, std = (torch.tensor(s, device=inputs.device).view(1, 3, 1, 1) for s in statistics)
    return (inputs.float().div(255).unsqueeze(1) - mean) / std


def short_side(picture: Image.Image, size: int, crop: int) -> Image.Image:
    """torchvision's Resize and CenterCrop, which most projects use: short side to ``size``, bilinear; the centre."""
    from torchvision.transforms.functional import center_crop, resize

    return center_crop(resize(picture, [size]), [crop])


def _count(tensors: Mapping[str, Tensor], pattern: str, where: str) -> int:
    """How many different numbers a pattern finds in the beginnings of keys."""
    numbers = {match[1] for key in tensors if (match := re.match(pattern, key))}
    if not numbers:
        raise ValueError(f"{where}: lacks keys like {re.sub(r'[(]?.d[+][)]?', '0', pattern).replace(chr(92), '')}")
    return len(numbers)


def _tensor(tensors: Mapping[str, Tensor], key: str, where: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"{where}{key}: missing")
    return tensors[key]
