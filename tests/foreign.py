"""Small folders with models of other people, and what is asked of reading them; the guard is in ``conftest``."""

import json
import zipfile

import numpy as np
import open_clip
import pytest
import torch
import transformers
from checkpoints import TEXTS, WORDS, pictures
from safetensors.torch import save_file

from pipeline import adapters
from pipeline.config.params import Other
from tests.test_adapters import fast_tokenizer

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
TOKENIZER_MAP = {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}
VISION = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
BIOMED = {"hf_model_name": "nobody/nothing", "hf_tokenizer_name": "nobody/nothing", "hf_proj_type": "mlp"}
BIOMED |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 12}


def change(path, **keys):
    table = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**table, **keys}))


def load(adapter, folder):
    return adapters.load_other(Other(adapter, str(folder), "X"), "cpu")


def rows(embedder):
    with torch.inference_mode():
        inputs = torch.from_numpy(np.stack([embedder.prepare(p) for p in pictures()]))
        return embedder.encode_images(inputs), torch.from_numpy(embedder.embed_texts(TEXTS))


def one_line(call, *said, error=ValueError):
    with pytest.raises(error) as found:
        call()
    text = str(found.value)
    assert "\n" not in text and len(text) < 400 and all(word in text for word in said), text


def clip_folder(folder):
    text = {**SIZES, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(folder)
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**crop).save_pretrained(folder)
    fast_tokenizer().save_pretrained(folder)
    return folder


def nested(path, part, **keys):
    change(path, **{part: {**json.loads(path.read_text())[part], **keys}})


def open_clip_folder(folder):
    """Of BiomedCLIP's kind, with a small vision transformer."""
    transformers.BertConfig(vocab_size=len(WORDS), **SIZES).save_pretrained(folder / "text")
    fast_tokenizer().save_pretrained(folder)
    here = {**BIOMED, "hf_model_name": str(folder / "text"), "hf_model_pretrained": False}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(24, open_clip.CLIPVisionCfg(**VISION), here)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": BIOMED}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def bert_folder(folder):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **SIZES), add_pooling_layer=False)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    change(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    return model


def deflated(path, size=1 << 26):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))
