"""Folders with models of other people that want to run code or to ask a hub: refused in one line.

Each test plants Python code beside the files it changes, and fails if it ran, if a question was asked or if a socket
was opened.
"""

import io
import json
import pickle
from pathlib import Path

import huggingface_hub.constants
import open_clip
import pytest
import torch
import transformers
from checkpoints import TEXTS, WORDS
from safetensors.torch import load_file

from pipeline.adapters.open_clip import read_config
from pipeline.config.params import BackTranslation, ImageEncoder, TextEncoder
from pipeline.config.records import ParamsError
from pipeline.models.encoders import ImageTower, TextTower
from pipeline.storage.model_folder import as_data, json_table, offline
from pipeline.storage.torch_archive import Refused
from pipeline.text.marian import RoundTrip
from pipeline.text.tokenizer import Tokenizer
from tests.foreign import (
    SIZES,
    TOKENIZER_MAP,
    bert_folder,
    change,
    clip_folder,
    deflated,
    load,
    nested,
    one_line,
    open_clip_folder,
    rows,
)
from tests.test_adapters import FORMATS, fast_tokenizer
from tests.test_back_translation import make_model

pytestmark = pytest.mark.usefixtures("guard")

MAP = {f"Auto{kind}": "planted.Planted" for kind in ("Config", "Model", "ImageProcessor", "FeatureExtractor")}
FAR = (
    "hf-hub:nobody/nothing",
    "hf_hub:nobody/nothing",
    "local-dir:/tmp",
    "nobody/nothing",
    "../elsewhere",
    "resnet18:x",
)


# ---- transformers' folders


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


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("preprocessor_config.json", {"resample": [0]}),
        ("preprocessor_config.json", {"rescale_factor": {}}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 1e-320}}),
        ("preprocessor_config.json", {"size": {"shortest_edge": {"longest_edge": 5}}}),
        ("preprocessor_config.json", {"crop_size": {"height": None, "width": None}}),
        ("preprocessor_config.json", {"crop_size": {"height": 64, "width": 64}}),
        ("preprocessor_config.json", {"crop_size": {"height": 8192, "width": 8192}}),
        ("preprocessor_config.json", {"image_mean": {"a": 1}}),
    ],
)
def test_values_of_another_form_are_one_line_before_anything_is_embedded(guard, file, keys):
    change(clip_folder(guard) / file, **keys)
    one_line(lambda: load("hf_clip", guard), str(guard))


@pytest.mark.parametrize(
    "values", [{"mean": {"a": 1}}, {"resize_mode": "longest", "fill_color": {"a": 1}}, {"size": 4096}]
)
def test_values_of_another_form_are_one_line_for_open_clip_too(guard, values):
    change(open_clip_folder(guard) / "open_clip_config.json", preprocess_cfg=values)
    one_line(lambda: load("open_clip", guard), str(guard))


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


def test_a_file_of_brackets_is_refused_unread(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [' + "[]," * 2_000_001 + "0]}")
    one_line(lambda: json_table(tmp_path / "a.json"), "a.json: more lists and tables", error=Refused)
