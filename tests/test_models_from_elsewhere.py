"""Folders with models of other people that want to run code, to ask a hub or to fill the memory: refused in one line.

Each test plants Python code beside the files it changes, and fails if it ran, if a question was asked or if a socket
was opened.
"""

import argparse
import base64
import builtins
import codecs
import io
import json
import pickle
import resource
import socket
import struct
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from checkpoints import TEXTS, WORDS, pictures
from safetensors.torch import load_file, save_file

from pipeline import adapters
from pipeline.adapters.open_clip import read_config
from pipeline.adapters.weights import Weights, read_weights
from pipeline.config.params import BackTranslation, ImageEncoder, Other, TextEncoder
from pipeline.config.records import ParamsError
from pipeline.models.encoders import ImageTower, TextTower
from pipeline.storage.model_folder import as_data, json_table, offline
from pipeline.storage.torch_archive import Refused, check_archive
from pipeline.text.marian import RoundTrip
from pipeline.text.tokenizer import Tokenizer
from tests.test_adapters import FORMATS, fast_tokenizer
from tests.test_back_translation import make_model

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
MAP = {f"Auto{kind}": "planted.Planted" for kind in ("Config", "Model", "ImageProcessor", "FeatureExtractor")}
TOKENIZER_MAP = {"AutoTokenizer": ["planted.Planted", "planted.Planted"]}
FAR = (
    "hf-hub:nobody/nothing",
    "hf_hub:nobody/nothing",
    "local-dir:/tmp",
    "nobody/nothing",
    "../elsewhere",
    "resnet18:x",
)


class Unread:
    """A standard input that nobody may read."""

    def __getattr__(self, name):
        raise AssertionError(f"stdin.{name}")


@pytest.fixture(autouse=True)
def guard(tmp_path, monkeypatch):
    """Writes code into the folder it gives; what must not happen fails the test even if somebody catches the error."""
    seen, marker = [], tmp_path / "ran"

    def noted(what):
        def call(*args, **values):
            seen.append(what)
            raise OSError(what)

        return call

    monkeypatch.setattr(socket.socket, "connect", noted("connect"))
    monkeypatch.setattr(socket, "getaddrinfo", noted("getaddrinfo"))
    monkeypatch.setattr(builtins, "input", noted("input"))
    monkeypatch.setattr(sys, "stdin", Unread())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as where nobody set the variable
    folder = tmp_path / "model"
    for place in (folder, folder / "text", folder / "tokenizer"):
        place.mkdir()
        (place / "planted.py").write_text(f"open({str(marker)!r}, 'w')\nPlanted = object\n")
    yield folder
    assert seen == [] and not marker.exists()


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


# ---- transformers' folders


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


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", {"auto_map": MAP}),
        ("config.json", {"auto_map": MAP, "model_type": "planted"}),
        ("config.json", {"auto_map": {"AutoConfig": "nobody/nothing--planted.Planted"}}),
        ("config.json", {"model_type": "timm_wrapper", "architecture": "hf-hub:nobody/nothing"}),
        ("config.json", {"model_type": "planted"}),
        ("config.json", {"model_type": "bert"}),
        ("config.json", {"backbone": "nobody/nothing", "use_pretrained_backbone": True}),
        ("config.json", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}),
        ("config.json", {"transformers_weights": "other.safetensors"}),
        ("config.json", {"dtype": "load"}),
        ("config.json", {"tokenizer_class": "AutoModel"}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP["AutoTokenizer"], "tokenizer_class": "PlantedTokenizer"}),
        ("tokenizer_config.json", {"trust_remote_code": True}),
        ("tokenizer_config.json", {"tokenizer_class": "planted.Planted"}),
        ("special_tokens_map.json", {"auto_map": TOKENIZER_MAP}),
        ("preprocessor_config.json", {"auto_map": MAP}),
        ("preprocessor_config.json", {"auto_map": MAP, "image_processor_type": "PlantedImageProcessor"}),
        ("preprocessor_config.json", {"image_processor_type": "pipeline"}),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "planted.Planted"}}),
    ],
)
def test_a_folder_of_transformers_that_asks_for_something_else_is_refused(guard, file, keys):
    change(clip_folder(guard) / file, **keys)
    says = [key for key in keys if key not in ("architecture", "use_pretrained_backbone")]
    with pytest.raises(Refused) as found:
        load("hf_clip", guard)
    text = str(found.value)
    assert text.startswith(f"{guard / file}: ") and any(key in text for key in says) and "\n" not in text
    assert "planted." not in text


def test_a_refused_key_is_found_at_any_depth(guard):
    nested(clip_folder(guard) / "config.json", "text_config", auto_map=MAP)
    one_line(lambda: load("hf_clip", guard), "config.json: text_config: auto_map")


def test_what_names_files_or_models_is_not_passed_on_and_the_model_is_the_same(guard):
    """Published files are full of such keys."""
    wanted = rows(load("hf_clip", clip_folder(guard)))
    nested(guard / "config.json", "text_config", _name_or_path="nobody/nothing", bad_words_ids=None, top_k=50)
    change(
        guard / "config.json", _name_or_path="nobody/nothing", _attn_implementation="nobody/kernel", torchscript=True
    )
    change(guard / "config.json", text_config_dict=json.loads((guard / "config.json").read_text())["text_config"])
    strange = {"tokenizer_file": "/etc/passwd", "vocab_file": "/etc/passwd", "name_or_path": "nobody/nothing"}
    strange |= {"fast_tokenizer_files": ["../tokenizer.4.0.json"], "init_inputs": ["/etc/passwd"]}
    change(guard / "tokenizer_config.json", **strange, chat_template="{{ ''.__class__.__mro__ }}")
    change(guard / "special_tokens_map.json", tokenizer_file="/etc/passwd", unk_token="[UNK]")
    (guard / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('touch ran') }}")
    (guard / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nobody/nothing"}))
    (guard / ".metadata").write_bytes(pickle.dumps(Planted(guard.parent / "ran")))
    (guard / "__0_0.distcp").write_bytes(b"x")
    for found, before in zip(rows(load("hf_clip", guard)), wanted, strict=True):
        assert torch.equal(found, before)


class Planted:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_weights_of_transformers_are_of_the_folder_and_tensors_alone(guard):
    tensors = load_file(clip_folder(guard) / "model.safetensors")
    wanted = rows(load("hf_clip", guard))
    (guard / "model.safetensors").rename(guard.parent / "outside.safetensors")
    index = guard / "model.safetensors.index.json"
    for away in ("../outside.safetensors", str(guard.parent / "outside.safetensors"), "planted.py", "..safetensors"):
        change(index, metadata={}, weight_map=dict.fromkeys(tensors, away))
        (guard / "model-00001-of-00001.safetensors").touch()
        one_line(lambda: load("hf_clip", guard), "model.safetensors.index.json: weight_map", error=Refused)
    (guard / "model-00001-of-00001.safetensors").unlink()
    (guard / "model-00001-of-00001.safetensors").symlink_to(
        guard.parent / "outside.safetensors"
    )  # as in the hub's cache
    change(index, weight_map=dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))
    assert all(map(torch.equal, rows(load("hf_clip", guard)), wanted))
    index.unlink()
    torch.save({**tensors, "more": Planted(guard.parent / "ran")}, guard / "pytorch_model.bin")
    one_line(lambda: load("hf_clip", guard), "pytorch_model.bin: holds io.open", error=Refused)
    deflated(guard / "pytorch_model.bin")
    one_line(lambda: load("hf_clip", guard), "pytorch_model.bin: has a compressed entry", error=Refused)
    torch.save(tensors, guard / "pytorch_model.bin")
    assert all(map(torch.equal, rows(load("hf_clip", guard)), wanted))


# ---- open_clip

VISION = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
BIOMED = {"hf_model_name": "nobody/nothing", "hf_tokenizer_name": "nobody/nothing", "hf_proj_type": "mlp"}
BIOMED |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 12}


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


@pytest.mark.parametrize(
    ("at", "key", "value"),
    [
        ("text_cfg", "tokenizer_kwargs", {"trust_remote_code": True}),
        ("text_cfg", "tokenizer_kwargs", {"reduction_mask": "syntax"}),
        ("text_cfg", "tokenizer_kwargs", {"tokenizer_file": "/etc/passwd"}),
        ("text_cfg", "act_kwargs", {"approximate": "planted"}),
        ("text_cfg", "hf_pooler_type", "planted.Planted"),
        ("text_cfg", "hf_model_name", ["nobody/nothing"]),
        ("text_cfg", "trust_remote_code", True),
        ("text_cfg", "pretrained_text_path", "/etc/passwd"),
        ("vision_cfg", "norm_kwargs", {"device": "meta"}),
        ("vision_cfg", "timm_pool", "planted"),
        ("vision_cfg", "width", "64"),
        *(("vision_cfg", "timm_model_name", name) for name in (*FAR, "planted", "", 3)),
        ("model_cfg", "multimodal_cfg", {}),
        ("model_cfg", "pretrained_image_path", "/etc/passwd"),
        ("preprocess_cfg", "interpolation", "planted"),
        ("", "auto_map", MAP),
    ],
)
def test_a_key_of_open_clips_configuration_that_is_not_known_is_named(guard, at, key, value):
    path = open_clip_folder(guard) / "open_clip_config.json"
    config = json.loads(path.read_text())
    {"": config, "model_cfg": config["model_cfg"], **config, **config["model_cfg"]}[at][key] = value
    path.write_text(json.dumps(config))
    inner = next(iter(value)) if isinstance(value, dict) and at != "" and value else key
    one_line(lambda: load("open_clip", guard), f"{path}: ", at, inner, error=Refused)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("text/config.json", {"auto_map": MAP}),
        ("text/config.json", {"model_type": "planted", "auto_map": MAP}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP, "tokenizer_class": "PlantedTokenizer"}),
        ("config.json", {"auto_map": MAP}),
    ],
)
def test_code_beside_open_clips_configuration_does_not_run(guard, file, keys):
    change(open_clip_folder(guard) / file, **keys)
    one_line(lambda: load("open_clip", guard), str(guard / file), "auto_map", error=Refused)
    path = guard / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    path.write_text(json.dumps(config))
    one_line(lambda: load("open_clip", guard), f"{path}: model_cfg: text_cfg: tokenizer_kwargs: trust_remote_code")


def test_a_folder_of_open_clip_loads_with_harmless_arguments(guard):
    wanted = rows(load("open_clip", open_clip_folder(guard)))
    path = guard / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"] |= {"tokenizer_kwargs": {"clean": "whitespace", "strip_sep_token": False}}
    config["model_cfg"]["vision_cfg"] |= {"timm_model_name": None, "act_kwargs": {"approximate": "none"}}
    path.write_text(json.dumps(config))
    assert all(map(torch.equal, rows(load("open_clip", guard)), wanted))


def test_every_configuration_that_open_clip_publishes_is_known(guard):
    """Except those with a third tower, which writes captions."""
    known = [name for name in open_clip.list_models() if "multimodal_cfg" not in open_clip.get_model_config(name)]
    assert len(known) > 100
    for name in known:
        path = guard / "open_clip_config.json"
        path.write_text(json.dumps({"model_cfg": open_clip.get_model_config(name)}))
        assert read_config(path)["model_cfg"] == json.loads(path.read_text())["model_cfg"]


# ---- every adapter


@pytest.mark.parametrize("adapter", [*FORMATS, "open_clip", "hf_clip"])
def test_no_hub_is_asked_and_none_for_a_missing_file(guard, adapter):
    {"open_clip": open_clip_folder, "hf_clip": clip_folder, **{k: v[0] for k, v in FORMATS.items()}}[adapter](guard)
    load(adapter, guard)
    small = [p for p in guard.rglob("*") if p.is_file() and p.stat().st_size < 1 << 20 and p.name != "planted.py"]
    for path in small:
        content = path.read_bytes()
        path.unlink()
        try:
            load(adapter, guard)
        except ValueError as error:
            assert "\n" not in str(error)
        path.write_bytes(content)


def test_a_tokenizer_json_for_words_is_read_as_data(guard):
    FORMATS["medclip"][0](guard)
    (guard / "tokenizer" / "vocab.txt").unlink()
    fast_tokenizer().save_pretrained(guard / "tokenizer")
    load("medclip", guard)
    change(guard / "tokenizer" / "tokenizer_config.json", auto_map=TOKENIZER_MAP)
    one_line(lambda: load("medclip", guard), "tokenizer_config.json: auto_map", error=Refused)


def test_offline_ends_with_its_block(guard):
    with pytest.raises(ZeroDivisionError), offline():
        assert huggingface_hub.is_offline_mode()
        with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
            huggingface_hub.HfApi().model_info("nobody/nothing")
        raise ZeroDivisionError
    assert not huggingface_hub.is_offline_mode()


def test_an_adapter_that_would_ask_the_hub_cannot(guard, monkeypatch):
    asks = lambda folder, device: huggingface_hub.HfApi().model_info("nobody/nothing")  # noqa: E731
    monkeypatch.setattr("pipeline.adapters.medclip.load_medclip", asks)
    with pytest.raises(huggingface_hub.errors.OfflineModeIsEnabled):
        load("medclip", guard)


def test_only_data_is_within_reach(guard):
    clip_folder(guard)
    with as_data(guard, weights=True) as clean:
        names = {p.name for p in clean.iterdir()}
    assert names == {
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
        "model.safetensors",
    }
    assert not clean.exists() and (guard / "tokenizer.json").exists()


def test_published_files_give_the_same_tokens_and_sizes_as_from_the_folder_itself(guard):
    """Of SigLIP's kind (sentencepiece) with keys of CLIP's oldest configuration; transformers alone is the truth."""
    import sentencepiece

    model = io.BytesIO()
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), model_writer=model, **options, **ids)
    (guard / "spiece.model").write_bytes(model.getvalue())
    end = {
        "content": "</s>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    change(
        guard / "tokenizer_config.json", added_tokens_decoder={"1": end}, additional_special_tokens=[], eos_token="</s>"
    )
    change(guard / "tokenizer_config.json", do_lower_case=True, model_input_names=["input_ids"], model_max_length=64)
    change(guard / "tokenizer_config.json", pad_token="</s>", processor_class="SiglipProcessor", sp_model_kwargs={})
    change(guard / "tokenizer_config.json", tokenizer_class="SiglipTokenizer", unk_token="<unk>")
    old = {
        "_name_or_path": "",
        "architectures": None,
        "bad_words_ids": None,
        "id2label": {"0": "LABEL_0"},
        "pruned_heads": {},
    }
    change(guard / "config.json", model_type="siglip", text_config={**old, "hidden_size": 48}, vision_config=old)
    with offline():
        wanted = transformers.AutoTokenizer.from_pretrained(guard), transformers.AutoConfig.from_pretrained(guard)
    with as_data(guard) as clean:
        found = transformers.AutoTokenizer.from_pretrained(clean), transformers.AutoConfig.from_pretrained(clean)
    assert type(found[0]) is type(wanted[0]) is transformers.SiglipTokenizer
    assert found[0](TEXTS)["input_ids"] == wanted[0](TEXTS)["input_ids"]
    assert found[0].special_tokens_map == wanted[0].special_tokens_map
    wanted[1].name_or_path = found[1].name_or_path
    assert found[1].to_dict() == wanted[1].to_dict() and found[1].text_config.hidden_size == 48


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a": 1' + b" " * (17 << 20) + b"}"])
def test_a_json_file_that_is_none_is_one_line(guard, content):
    (clip_folder(guard) / "tokenizer_config.json").write_bytes(content)
    one_line(lambda: load("hf_clip", guard), "tokenizer_config.json: ", error=Refused)


# ---- our own encoders and translators


def bert_folder(folder):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(WORDS), **SIZES), add_pooling_layer=False)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    change(folder / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    return model


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", {"auto_map": MAP}),
        ("config.json", {"auto_map": MAP, "model_type": "planted"}),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP, "tokenizer_class": "PlantedTokenizer"}),
    ],
)
def test_a_text_encoders_folder_is_read_as_data(guard, file, keys):
    model = bert_folder(guard)
    named = TextEncoder(str(guard), max_tokens=16)
    tower = TextTower(named, len(Tokenizer.build(named, [])), True)
    assert all(map(torch.equal, tower.model.state_dict().values(), model.state_dict().values()))
    change(guard / file, **keys)
    for call in (
        lambda: Tokenizer.build(named, []),
        lambda: Tokenizer.load(guard, 16),
        lambda: TextTower(named, len(WORDS), True),
        lambda: TextTower(named, len(WORDS), False),
    ):
        one_line(call, str(guard / file))


def test_a_model_of_the_hub_comes_without_its_code(guard, tmp_path, monkeypatch):
    """The hub's cache: a folder of links into another one."""
    repository = tmp_path / "cache" / "models--nobody--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "refs", repository / "blobs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    model = bert_folder(guard)
    for path in [p for p in guard.iterdir() if p.is_file()]:
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    named = TextEncoder("nobody/something", max_tokens=16)
    assert len(Tokenizer.build(named, [])) == len(WORDS)
    tower = TextTower(named, len(WORDS), True)
    assert all(map(torch.equal, tower.model.state_dict().values(), model.state_dict().values()))
    change(snapshot / "config.json", auto_map=MAP)
    one_line(lambda: TextTower(named, len(WORDS), True), "config.json: auto_map", error=ParamsError)


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("config.json", {"auto_map": MAP}),
        ("config.json", {"transformers_weights": "other.safetensors"}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP}),
    ],
)
def test_a_translators_folder_is_read_as_data(guard, tmp_path, file, keys):
    folder = make_model(tmp_path / "marian", 0)
    change(folder / "tokenizer_config.json", sp_model_kwargs={"model_file": "/etc/passwd"}, vocab="/etc/passwd")
    options = BackTranslation(str(folder), str(folder), max_tokens=32, device="cpu")
    RoundTrip(options, 0, torch.device("cpu"))
    change(folder / file, **keys)
    one_line(
        lambda: RoundTrip(options, 0, torch.device("cpu")), "back_translation.forward", str(folder / file), *list(keys)
    )


@pytest.mark.parametrize("name", [*FAR, "planted", "/tmp/resnet18"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_an_image_encoder_is_an_architecture_of_timm_and_nothing_else(name, pretrained):
    one_line(
        lambda: ImageTower(ImageEncoder(name, pretrained), 32, True), "model.image_encoders", name, error=ParamsError
    )


@pytest.mark.parametrize(
    "args",
    [
        {"pretrained_cfg": {"file": "x.pth"}},
        {"pretrained_cfg_overlay": {"hf_hub_id": "nobody/nothing"}},
        {"checkpoint_path": "x.pth"},
        {"cache_dir": "/tmp"},
        {"scriptable": True},
        {"pretrained_strict": False},
    ],
)
def test_arguments_of_an_image_encoder_name_no_file(args):
    made = lambda: ImageTower(ImageEncoder("resnet18", False, args=args), 32, False)  # noqa: E731
    one_line(made, "model.image_encoders: resnet18: args: ", *args, error=ParamsError)


@pytest.mark.parametrize(
    "args",
    [
        {"auto_map": MAP},
        {"model_type": "planted"},
        {"model_type": "timm_wrapper", "architecture": "hf-hub:nobody/nothing"},
        {"trust_remote_code": True},
        {"attn_implementation": "nobody/kernel"},
        {"_name_or_path": "nobody/nothing"},
    ],
)
def test_arguments_of_a_text_encoder_are_of_its_architecture(args):
    made = lambda: TextTower(TextEncoder("", 20, {**SIZES, **args}), 20, True)  # noqa: E731
    one_line(made, "model.text_encoder.args", next(iter(args)), error=ParamsError)


# ---- models that are larger than their weights, or not theirs


@pytest.mark.parametrize(
    ("part", "keys", "says"),
    [
        ("text_config", {"vocab_size": 1 << 22}, "larger model"),
        ("text_config", {"max_position_embeddings": 1 << 22}, "larger model"),
        ("text_config", {"num_hidden_layers": 1 << 14}, "larger model"),
        ("text_config", {"hidden_size": 1 << 14}, "larger model"),
        ("vision_config", {"image_size": 1 << 14, "patch_size": 1}, "larger model"),
        ("text_config", {"vocab_size": 1 << 40}, "number above"),
        ("vision_config", {"num_labels": 1 << 30}, "number above"),
    ],
)
def test_a_folder_of_transformers_states_no_larger_model_than_its_weights(guard, part, keys, says):
    nested(clip_folder(guard) / "config.json", part, **keys)
    before = memory()
    one_line(lambda: load("hf_clip", guard), str(guard / "config.json"), says, error=Refused)
    assert memory() - before < 1 << 28


@pytest.mark.parametrize(
    ("at", "keys", "says"),
    [
        ("text/config.json", {"vocab_size": 1 << 22}, "larger model"),
        ("vision_cfg", {"width": 1 << 14}, "larger model"),
        ("vision_cfg", {"layers": 1 << 20}, "larger model"),
        ("vision_cfg", {"image_size": 1 << 14, "patch_size": 1}, "larger model"),
        ("vision_cfg", {"image_size": 1 << 30}, "number above"),
    ],
)
def test_a_folder_of_open_clip_states_no_larger_model_than_its_weights(guard, at, keys, says):
    path = open_clip_folder(guard) / "open_clip_config.json"
    config = json.loads(path.read_text())
    if at == "text/config.json":
        change(guard / at, **keys)
        at = "text_cfg"
    config["model_cfg"][at] |= keys if at != "text_cfg" else {}
    path.write_text(json.dumps(config))
    before = memory()
    one_line(lambda: load("open_clip", guard), f"{path}: ", says, error=Refused)
    assert memory() - before < 1 << 28


def memory():
    """Bytes that this process has held at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("weights", [True, False])
def test_a_text_encoder_states_no_larger_model_than_can_be(guard, weights):
    bert_folder(guard)
    change(guard / "config.json", vocab_size=1 << 23, hidden_size=1 << 9)
    before = memory()
    made = lambda: TextTower(TextEncoder(str(guard), max_tokens=16), len(WORDS), weights)  # noqa: E731
    one_line(made, "model.text_encoder.name: ", "config.json: states a larger model", error=ParamsError)
    assert memory() - before < 1 << 28


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"vocabulary": 3}, "vocabulary: roformer has no such key"),
        ({"num_layers": 2}, "num_layers: roformer has no such key"),
        ({"num_labels": 3}, "num_labels: roformer has no such key"),
        ({"model_type": "bert", "rotary_value": True}, "rotary_value: bert has no such key"),
        ({"num_hidden_layers": 1 << 12}, "roformer: states a larger model"),
        ({"hidden_size": 1 << 15, "intermediate_size": 1 << 15}, "roformer: states a larger model"),
        ({"hidden_size": 1 << 40}, "number above"),
        ({"num_attention_heads": 7}, "roformer cannot be built of them (RuntimeError)"),
        ({"hidden_size": 64.5}, "roformer cannot be built of them"),
    ],
)
def test_arguments_of_a_text_encoder_make_one(args, says):
    before = memory()
    made = lambda: TextTower(TextEncoder("", 20, {**SIZES, **args}), 20, True)  # noqa: E731
    one_line(made, "model.text_encoder.args: ", says, error=ParamsError)
    assert memory() - before < 1 << 28


@pytest.mark.parametrize(
    "args",
    [
        *({"features_only": True}, {"norm_layer": 3}, {"in_chans": 1}, {"global_pool": ""}, {"num_classes": 3}),
        *({"block_args": 7}, {"no_such": 1}, {"output_stride": "x"}),
    ],
)
def test_arguments_of_an_image_encoder_make_one(args):
    made = lambda: ImageTower(ImageEncoder("resnet18", False, args=args), 32, False)  # noqa: E731
    one_line(made, "model.image_encoders: timm cannot build resnet18: ", error=ParamsError)


def test_arguments_of_an_image_encoder_change_nothing_else():
    torch.manual_seed(0)
    tower = ImageTower(ImageEncoder("resnet18", False, args={"drop_path_rate": 0.1}), 32, False)
    torch.manual_seed(0)
    wanted = timm.create_model("resnet18", num_classes=0, drop_path_rate=0.1)
    assert tower.model.training and all(
        map(torch.equal, tower.model.state_dict().values(), wanted.state_dict().values())
    )


def test_arguments_of_a_text_encoder_change_nothing_else():
    torch.manual_seed(0)
    tower = TextTower(TextEncoder("", args=SIZES, max_tokens=20), 20, True)
    torch.manual_seed(0)
    config = transformers.RoFormerConfig(vocab_size=20, max_position_embeddings=20, **SIZES)
    wanted = transformers.RoFormerModel(config).state_dict()
    found = tower.model.state_dict()
    assert tower.model.training and found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def other_weights(folder):
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=len(WORDS), **SIZES))
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})


def one_layer_more(folder):
    change(folder / "config.json", num_hidden_layers=2)


def another_model(folder):
    change(folder / "config.json", model_type="roberta")


def not_weights(folder):
    (folder / "model.safetensors").write_bytes(b"x" * (1 << 20))


def wider(folder):
    change(folder / "config.json", hidden_size=128)


def not_a_size(folder):
    change(folder / "config.json", hidden_size="64")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (other_weights, "its weights are of another model: embeddings."),
        (one_layer_more, "its weights are of another model: encoder.layer.1."),
        (another_model, "is a roberta; the text encoder has to be a bert"),
        (not_weights, "could not be loaded (SafetensorError)"),
        (wider, "could not be loaded (RuntimeError)"),
        (not_a_size, "could not be loaded (StrictDataclassFieldValidationError)"),
    ],
)
def test_weights_of_another_model_are_no_text_encoder(guard, harm, says):
    bert_folder(guard)
    harm(guard)
    made = lambda: TextTower(TextEncoder(str(guard), max_tokens=16), len(WORDS), True)  # noqa: E731
    one_line(made, f"model.text_encoder.name: {str(guard)!r}", says, error=ParamsError)


# ---- tokenizers


def replace(content, pattern="a"):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def compiled(*texts, trie=b"\0" * 4):
    """A table of letters as sentencepiece compiles it."""
    table = len(trie).to_bytes(4, "little") + trie + b"".join(text.encode() + b"\0" for text in texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


def sequence(*parts):
    return {"type": "Sequence", "normalizers": list(parts)}


def template(*names, ids=(2,)):
    single = [{"Sequence": {"id": name, "type_id": 0}} for name in names]
    tokens = {"[CLS]": {"id": "[CLS]", "ids": list(ids), "tokens": ["[CLS]"] * len(ids)}}
    first = {"SpecialToken": {"id": "[CLS]", "type_id": 0}}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": [first, *single], "pair": pair, "special_tokens": tokens}


@pytest.mark.parametrize(
    ("step", "value"),
    [
        ("normalizer", replace("b" * 5000)),
        ("normalizer", replace("b" * 100, "")),
        ("normalizer", sequence(*[replace("aa")] * 30)),
        ("normalizer", sequence(sequence(replace("a" * 9)), sequence(replace("a" * 9)))),
        ("normalizer", sequence(*[{"type": "Prepend", "prepend": "a" * 900}] * 1000)),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 5000}),
        ("normalizer", sequence(*[{"type": "ByteLevel"}] * 30)),
        ("normalizer", sequence(*[{**replace("a"), "pattern": {"Regex": "(?=.)"}}] * 30)),
        ("normalizer", sequence(*[replace("a", "")] * 30)),
        ("normalizer", sequence(*[{"pattern": {"String": "a"}, "content": "a" * 8}] * 30)),
        ("normalizer", sequence(*[compiled("b" * 30)] * 4)),
        ("normalizer", compiled("b" * 5000)),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "_" * 2000, "prepend_scheme": "always", "split": True}),
        ("post_processor", template("A", "A")),
        ("post_processor", {"type": "Sequence", "processors": [template("A", "A")] * 30}),
        ("post_processor", template("A", ids=[2] * 5000)),
        ("padding", {"strategy": {"Fixed": 1 << 30}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}),
    ],
)
def test_a_tokenizer_makes_no_long_text_of_a_short_one(guard, step, value):
    path = bert_folder_with(guard, **{step: value})
    for call in (
        lambda: Tokenizer.load(guard, 16),
        lambda: Tokenizer.build(TextEncoder(str(guard), max_tokens=16), []),
    ):
        one_line(call, f"{path}: its steps")


def bert_folder_with(folder, **steps):
    """A text encoder's folder with other steps in its tokenizer."""
    bert_folder(folder)
    (folder / "vocab.txt").unlink()
    fast_tokenizer().save_pretrained(folder)
    change(folder / "tokenizer.json", **steps)
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": sequence(replace("▁", " "), replace('"', "``"), {"type": "Prepend", "prepend": "▁"})},
        {"post_processor": {"type": "Sequence", "processors": [template("A"), template("A", ids=[2, 3])]}},
        {"padding": {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}},
        "sentencepiece",
    ],
)
def test_steps_of_published_tokenizers_are_read(guard, steps):
    if steps == "sentencepiece":
        steps = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": table_of_sentencepiece()}}
    else:
        steps.get("padding", {}).update(pad_type_id=0, pad_token="[PAD]")
    path = bert_folder_with(guard, **steps)
    wanted = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert Tokenizer.load(guard, 64).tokenizer(TEXTS)["input_ids"] == wanted(TEXTS)["input_ids"]


def table_of_sentencepiece():
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    model = io.BytesIO()
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS * 3), model_writer=model, **options)
    read = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    return base64.b64encode(read.normalizer_spec.precompiled_charsmap).decode()


@pytest.mark.parametrize("normalizer", [compiled(trie=b""), compiled("b")])
def test_a_damaged_tokenizer_is_one_line_though_its_library_panics(guard, normalizer, monkeypatch):
    """In the first case where it is read, in the second where it is given a text."""
    path = bert_folder_with(guard, normalizer=normalizer)
    named = TextEncoder(str(guard), max_tokens=16)
    says = "model.text_encoder.name: ", "could not be loaded (PanicException)"
    one_line(lambda: Tokenizer.build(named, []), *says, error=ParamsError)
    content = path.read_bytes()
    FORMATS["medclip"][0](guard)
    (guard / "tokenizer" / "vocab.txt").unlink()
    (guard / "tokenizer" / "tokenizer.json").write_bytes(content)
    one_line(lambda: load("medclip", guard), f"{guard / 'tokenizer'}: not a tokenizer (PanicException)")
    (clip_folder(guard) / "tokenizer.json").write_bytes(content)
    one_line(lambda: load("hf_clip", guard), f"{guard}: transformers cannot load this model (PanicException)")


def test_of_a_tokenizers_settings_only_what_is_read_is_checked(guard):
    FORMATS["medclip"][0](guard)
    change(guard / "tokenizer" / "tokenizer_config.json", auto_map=TOKENIZER_MAP, do_lower_case=True)
    load("medclip", guard)


def test_an_old_name_of_clips_processor_is_known(guard):
    wanted = rows(load("hf_clip", clip_folder(guard)))
    old = {"image_processor_type": "CLIPFeatureExtractor", "feature_extractor_type": "CLIPFeatureExtractor"}
    change(guard / "preprocessor_config.json", **old)
    assert all(map(torch.equal, rows(load("hf_clip", guard)), wanted))


# ---- small files that become large


def deflated(path, size=1 << 26):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(size))


def shared(path):
    """A hundred entries of the directory are the same bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
        archive.filelist += archive.filelist * 99


def large_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes((16 << 20) + 1))


def commented(path):
    """Two readers may find different ends of the directory."""
    torch.save({"w": torch.ones(1)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = path.read_bytes()[-22:] + b"."


def tar(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "pickle")


def no_directory(path):
    torch.save({"w": torch.ones(1)}, path)
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (deflated, "compressed entry"),
        (shared, "larger than the file"),
        (large_pickle, "its pickle is larger than 4 MB"),
        (commented, "not an archive as torch writes it"),
        (no_directory, "not an archive as torch writes it"),
        (tar, "a tar archive"),
    ],
)
def test_an_archive_that_promises_more_than_it_holds_is_refused_unread(tmp_path, make, says):
    path = tmp_path / "w.pt"
    make(path)
    tracemalloc.start()
    one_line(lambda: read_weights(path), f"{path}: ", says, error=Refused)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


class Calls:
    """Pickled, it is a call of a function, which torch's own check allows."""

    def __init__(self, function, *values):
        self.call = function, values

    def __reduce__(self):
        return self.call


def hexed(times):
    text = "a" * 1000
    for _ in range(times):
        text = Calls(codecs.encode, text, "hex_codec")
    return text


def repickled(path, change):
    """Put other bytes in the place of an archive's pickle."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, change(content) if name.endswith("/data.pkl") else content)


LARGE = 1 << 28
LETTERS = "ab" * (1 << 19)
CALLS = {
    "bytearray": (Calls(bytearray, LARGE), "holds builtins.bytearray"),
    "tensor": (Calls(torch.FloatTensor, LARGE), "holds torch.FloatTensor"),
    "storage": (Calls(torch.UntypedStorage, LARGE), "holds torch.storage.UntypedStorage"),
    "sparse": (torch.ones(2, 2).to_sparse(), "holds torch._utils._rebuild_sparse_tensor"),
    "meta": (torch.ones(2, device="meta"), "holds torch._utils._rebuild_meta_tensor_no_storage"),
    "wider": (
        Calls(torch._utils._rebuild_device_tensor_from_cpu_tensor, torch.ones(1), torch.double, "cpu", False),
        "",
    ),
    "kept as it is": (Calls(torch._tensor._rebuild_from_type_v2, dict, dict, (), {}), "holds torch._tensor."),
    "encoded": (hexed(14), "encodes a text"),
    "copies": ([Calls(set, LETTERS) for _ in range(20)], "copies the same part again and again"),
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", CALLS)
def test_a_pickle_that_makes_much_of_little_is_refused_unread(tmp_path, kind, new):
    """Each is a call that torch allows where it loads weights only."""
    value, says = CALLS[kind]
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(1), "more": value}, path, _use_new_zipfile_serialization=new)
    assert path.stat().st_size < 2 << 20
    tracemalloc.start()
    one_line(lambda: read_weights(path), f"{path}: ", says, "; refused", error=Refused)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 << 20


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(
    ("old", "changed", "says"),
    [
        (b"K\x07\x85", b"J\0\0\0\x10\x85", "larger than its storage"),  # its size
        (b"K\x07\x85", b"\x8a\x05\0\0\0\0\x10\x85", "larger than its storage"),
        (b"K\x01\x85", b"J\0\0\0\x10\x85", "larger than its storage"),  # its stride
        (b"QK\0", b"QM\0\x10", "larger than its storage"),  # where it begins
        (b"QK\0", b"QJ\xff\xff\xff\xff", "negative size"),
        (b"cpuq\x06K\x07", b"cpuq\x06J\0\0\0\x10", "states more numbers than it holds"),  # its storage
        (b"s.", b"Nbs.", "changes a tensor"),
        (b"s.", b"s\x96\0\0\0\x10\0\0\0\0.", "not a checkpoint of torch"),  # protocol 5: its number comes first
        (b"}q", b"cdatetime\ndate\n0}q", "holds datetime.date"),
    ],
)
def test_a_size_in_a_pickle_is_compared_with_what_the_file_holds(tmp_path, old, changed, says, new):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(7)}, path, _use_new_zipfile_serialization=new)

    def change(content):
        at = content.index(b"_rebuild_tensor_v2") - 30  # an old file's first table is of the machine
        cut = content.index(old, max(at, 0))
        return content[:cut] + changed + content[cut + len(old) :]

    if new:
        repickled(path, change)
    else:
        path.write_bytes(change(path.read_bytes()))
    one_line(lambda: read_weights(path), f"{path}: ", says, error=Refused)


def test_what_torch_writes_is_read(tmp_path):
    path = tmp_path / "w.pt"
    base = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
    tensors = {
        "w": torch.arange(5),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0),
        "none": torch.ones(0, 3).half(),
    }
    tensors |= {"turned": base.permute(2, 0, 1), "part": base[1:, ::2, 3:], "row": torch.ones(1, 4).expand(3, 4)}
    tensors |= {f"of {kind}": torch.ones(2, dtype=kind) for kind in (torch.bool, torch.bfloat16, torch.complex64)}
    tensors |= {"parameter": torch.nn.Parameter(base)}
    more = {"seed": 2**40, "lr": 1e-3, "sets": {1, 2}, "counts": Counter("aab"), "bytes": b"\xff\0", "none": None}
    more |= {"args": argparse.Namespace(lr=0.1), "table": defaultdict(list, a=[1]), "number": np.float32(2)}
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    more |= {"optimizer_states": [optimizer.state_dict()], "state_dict": model.state_dict(), "size": base.shape}
    for new in (True, False):
        torch.save({**tensors, "more": more}, path, _use_new_zipfile_serialization=new)
        found = read_weights(path)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        assert torch.equal(found["more"]["state_dict"]["weight"], model.weight)
        torch.save(tensors, path, _use_new_zipfile_serialization=new)
        check_archive(path)


def test_following_a_large_checkpoint_takes_no_time(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({f"layer.{i}.weight": torch.ones(2, 3) for i in range(3000)}, path)
    start = time.process_time()
    check_archive(path)
    assert time.process_time() - start < 5


def test_a_row_that_is_stated_to_repeat_is_not_a_tensor_of_that_size(tmp_path):
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "w.pt")
    one_line(lambda: Weights.of(tmp_path / "w.pt"), "w.pt: states more numbers than it holds: w")
    torch.save({"w": torch.ones(2, 2).to_sparse()}, tmp_path / "w.pt")
    one_line(lambda: Weights.of(tmp_path / "w.pt"), "w.pt: ")


def test_a_header_of_safetensors_is_no_larger_than_its_file(tmp_path):
    path = tmp_path / "w.safetensors"
    header = json.dumps({"w": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    for content in (struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", len(header)) + header):
        path.write_bytes(content)
        one_line(lambda: read_weights(path), f"{path}: not a safetensors file")


def number(value: int) -> bytes:
    """A step of a pickle that puts a whole number on the stack."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


NESTED = b")" + b"q\x00h\x00\x86" * 40  # a tuple in itself, forty times: to hash it has no end
KEYS = {
    "nested": b"\x80\x02}" + NESTED + b"K\x00s.",
    "of a set": b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nset\n(](" + NESTED + b"etRs.",
    "of a list of pairs": b"\x80\x02ccollections\nOrderedDict\n(](" + NESTED + b"K\x01\x86etR.",
    "that collide": b"\x80\x02}(" + b"".join(number(((1 << 61) - 1) * n) + b"N" for n in range(1, 9)) + b"u.",
    "of a storage": b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + NESTED
    + b"X\x03\x00\x00\x00cpuK\x01tQ.",
}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_that_is_never_computed_is_refused(tmp_path, kind):
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", KEYS[kind])
    one_line(lambda: read_weights(path), f"{path}: has a ", "refused", error=Refused)


def test_an_archive_of_two_directories_is_refused(tmp_path):
    """zipfile takes the one before the last record, torch the one where that record says."""
    kept, hidden, path = (tmp_path / f"{name}.pt" for name in ("kept", "hidden", "both"))
    torch.save({"w": torch.ones(3)}, kept)
    with zipfile.ZipFile(hidden, "w") as archive:
        archive.writestr(
            "archive/data.pkl", b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n" + number(1 << 40) + b"\x85Rs."
        )
    start = hidden.read_bytes()
    path.write_bytes(start + kept.read_bytes())
    one_line(lambda: read_weights(path), f"{path}: not an archive as torch writes it", error=Refused)


def test_a_checkpoint_of_several_pickles_is_refused(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"w": torch.ones(3)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("w/CONSTANTS.PKL", b"\x80\x02}.")
    one_line(lambda: read_weights(path), f"{path}: has several pickles", error=Refused)


def test_a_tensor_without_a_name_is_one_line(tmp_path):
    torch.save({1: torch.ones(3), "w": torch.ones(2)}, tmp_path / "w.pt")
    one_line(lambda: Weights.of(tmp_path / "w.pt"), "not tensors: 1")


def test_a_tokenizer_that_draws_is_refused(tmp_path):
    path = bert_folder_with(tmp_path, normalizer=None)
    table = json.loads(path.read_text())
    path.write_text(json.dumps({**table, "model": {**table["model"], "dropout": 0.5}}))
    one_line(lambda: Tokenizer.load(tmp_path, 16), f"{path}: model.dropout: ", error=Refused)


def test_a_file_of_brackets_is_refused_unread(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [' + "[]," * 2_000_001 + "0]}")
    one_line(lambda: json_table(tmp_path / "a.json"), "a.json: more lists and tables", error=Refused)
