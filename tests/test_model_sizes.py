"""Models that are larger than their weights, or not theirs: refused in one line before they fill the memory."""

import json
import resource
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from checkpoints import WORDS
from safetensors.torch import save_file

from pipeline.config.params import ImageEncoder, Loss, MixedModel, TextEncoder
from pipeline.config.records import ParamsError
from pipeline.models.encoders import ImageTower, TextTower
from pipeline.models.mixed import MixedNet
from pipeline.storage.torch_archive import Refused
from tests.foreign import (
    SIZES,
    bert_folder,
    change,
    clip_folder,
    load,
    nested,
    one_line,
    open_clip_folder,
)

pytestmark = pytest.mark.usefixtures("guard")


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


@pytest.mark.parametrize("args", [{"depths": [1, 1, 3000]}, {"depths": [1, 40, 1], "embed_dim": 1 << 12}])
def test_an_image_encoder_is_no_larger_than_any(args):
    sizes = {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2, 4], "window_size": 4}
    options = ImageEncoder("swin_tiny_patch4_window7_224", False, args=sizes | args)
    before = memory()
    one_line(lambda: ImageTower(options, 64, False), "args: states a larger model than can be", error=ParamsError)
    assert memory() - before < 5 << 30


@pytest.mark.parametrize("shape", [{"width": 1 << 20, "heads": 4}, {"layers": 1000, "width": 1 << 12}])
def test_a_mixed_model_is_no_larger_than_any(shape):
    config = SimpleNamespace(
        mixed=MixedModel(patch=8, scales=1, **shape), temperature=0.1, loss=Loss(), image_size=32, name="a"
    )
    one_line(lambda: MixedNet(config, 100), "model.mixed: its sizes are a model of", error=ParamsError)


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
