"""Small models with random weights in the file formats of other projects, and the modules they were made of."""

import sys
import types
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "no",
    "find",
    "##ing",
    "##s",
    "of",
    "edema",
    "heart",
    "clear",
    "lung",
]
TEXTS = ["Edema", "no edema", "findings of lung", "Heart clear no findings of edema lungs"]
IDS = [  # of TEXTS, by hand
    [2, 10, 3],
    [2, 5, 10, 3],
    [2, 6, 7, 8, 9, 13, 3],
    [2, 11, 12, 5, 6, 7, 8, 9, 10, 13, 8, 3],
]


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    coarse = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((26, 31), (37, 24))]
    return [picture.repeat(10, axis=0).repeat(10, axis=1) for picture in coarse]


def shake(module: nn.Module, seed: int) -> nn.Module:
    """Weights and statistics that no module starts with, so that one left out shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        fan = value[0].numel() if value.dim() > 1 else 1
        with torch.no_grad():
            if value.dim() > 1:
                value.copy_(noise * (1.5 / fan) ** 0.5)
            else:
                value.copy_(1 + 0.2 * noise.abs() if "var" in name or name.endswith("weight") else 0.1 * noise)
    return module.eval()


@cache
def resnet(seed: int = 1) -> nn.Module:
    net = ResNet(Bottleneck, [1, 1, 1, 1])
    net.fc = nn.Identity()
    return shake(net, seed)


@cache
def swin(seed: int = 2) -> nn.Module:
    config = transformers.SwinConfig(embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=7, drop_path_rate=0.0)
    return shake(transformers.SwinModel(config), seed)


def swin_tensors(net: nn.Module) -> dict[str, torch.Tensor]:
    """Under the keys that transformers gave them when the checkpoints were published, with the buffer of those days."""
    renamed = (
        *(
            (f"attention.{new}_proj", f"attention.self.{old}")
            for new, old in (("q", "query"), ("k", "key"), ("v", "value"))
        ),
        ("attention.relative_position_bias.", "attention.self."),
        ("attention.o_proj", "attention.output.dense"),
        ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )
    found = {}
    for key, value in net.state_dict().items():
        for new, old in renamed:
            key = key.replace(new, old)
        found[key] = value
    places = [(y, x) for y in range(7) for x in range(7)]
    index = torch.tensor([[(y - v + 6) * 13 + x - w + 6 for v, w in places] for y, x in places])
    for key in [k for k in found if k.endswith("relative_position_bias_table")]:
        found[key.replace("bias_table", "index")] = index
    return found


@cache
def bert(seed: int = 3, hidden: int = 128, layers: int = 4, pooler: bool = True) -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=48,
        max_position_embeddings=512,
    )
    return shake(transformers.BertModel(config, add_pooling_layer=pooler), seed)


def hidden_states(model: nn.Module, ids: list[int]) -> list[torch.Tensor]:
    """Every layer's output for one text by itself, each [L, hidden]."""
    out = model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return [h[0] for h in out.hidden_states]


def prefixed(prefix: str, module) -> dict[str, torch.Tensor]:
    tensors = module if isinstance(module, dict) else module.state_dict()
    return {prefix + key: value for key, value in tensors.items()}


def old_bert(prefix: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """With the positions that transformers used to keep."""
    return prefixed(prefix, module) | {f"{prefix}embeddings.position_ids": torch.arange(512)[None]}


def vocabulary(folder) -> None:
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS) + "\n")


@contextmanager
def stranger(qualified: str, base: type = object):
    """A class of a package that is not there, for the time of writing a checkpoint that holds it."""
    module, _, name = qualified.rpartition(".")
    parts = module.split(".")
    added = [".".join(parts[: i + 1]) for i in range(len(parts))]
    new = [m for m in added if m not in sys.modules]
    for m in new:
        sys.modules[m] = types.ModuleType(m)
    cls = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, cls)
    try:
        yield cls
    finally:
        for m in new:
            del sys.modules[m]


def openai_names(model) -> dict[str, torch.Tensor]:
    """A CLIP of transformers -> OpenAI's keys."""
    state, found = model.state_dict(), {}
    renamed = (
        *(("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("self_attn.out_proj", "attn.out_proj")),
        *(("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"), ("encoder.layers.", "transformer.resblocks.")),
        *(("vision_model.", "visual."), ("text_model.", ""), ("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")),
        *(("final_layer_norm", "ln_final"), ("embeddings.token_embedding", "token_embedding")),
        *(("embeddings.position_embedding.weight", "positional_embedding"), ("embeddings.patch_embedding", "conv1")),
        *(("embeddings.class_embedding", "class_embedding"), ("visual_projection.weight", "visual.proj")),
        ("text_projection.weight", "text_projection"),
    )
    for key, value in state.items():
        if "q_proj" in key:
            parts = [state[key.replace("q_proj", f"{p}_proj")] for p in "qkv"]
            key, value = key.replace("self_attn.q_proj.", "attn.in_proj_"), torch.cat(parts)
        elif "k_proj" in key or "v_proj" in key:
            continue
        for old, new in renamed:
            key = key.replace(old, new)
        found[key] = value.T.contiguous() if key in ("visual.proj", "text_projection") else value
    return found


def clip_member(seed: int) -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406},
        vision_config={**sizes, "image_size": 64, "patch_size": 16, "num_hidden_layers": 2},
        projection_dim=32,
    )
    return shake(transformers.CLIPModel(config), seed)


def chexzero(folder, members: int = 2) -> list[nn.Module]:
    """Its .pt files; gives the models of transformers they were made of."""
    folder.mkdir(exist_ok=True)
    made = [clip_member(seed) for seed in range(20, 20 + members)]
    for i, model in enumerate(made):
        torch.save(openai_names(model), folder / f"best_{i}.pt")
    return made


def chexzero_input(picture: np.ndarray) -> torch.Tensor:
    """uint8 [H, W] -> what its project makes of it, [1, 3, 64, 64]."""
    h, w = picture.shape
    ratio = 320 / max(h, w)
    square = Image.new("L", (320, 320))
    small = Image.fromarray(picture).resize((int(w * ratio), int(h * ratio)), Image.Resampling.LANCZOS)
    square.paste(small, ((320 - small.width) // 2, (320 - small.height) // 2))
    x = torch.from_numpy((np.asarray(square, dtype=np.float32) - 101.48761) / 83.43944).expand(1, 3, -1, -1)
    return F.interpolate(x, size=(64, 64), mode="bicubic")
