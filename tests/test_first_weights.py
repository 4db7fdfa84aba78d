"""The first weights of an image encoder from a file: all of them, or an error that names what is wrong."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from pipeline.config.params import ImageEncoder
from pipeline.config.records import ParamsError
from pipeline.models.encoders import ImageTower

ARGS = {"layers": [1] * 4, "channels": [8, 8, 16, 16], "stem_type": "deep", "stem_width": 4}


@pytest.fixture(scope="module")
def whole():
    """A model with its classifier, as timm saves one."""
    torch.manual_seed(3)
    return timm.create_model("resnet50", pretrained=False, num_classes=5, **ARGS).state_dict()


def tower(place):
    return ImageTower(ImageEncoder("resnet50", False, args=ARGS, weights=str(place)), 32, True)


def same(made, whole):
    own = made.model.state_dict()
    return all(torch.equal(value, whole[name]) for name, value in own.items()) and len(own) == len(whole) - 2


WRAPS = {
    "safetensors": lambda w, p: save_file(w, p / "w.safetensors"),
    "torch": lambda w, p: torch.save(w, p / "w.pth"),
    "old torch": lambda w, p: torch.save(w, p / "w.pt", _use_new_zipfile_serialization=False),
    "beside other things": lambda w, p: torch.save({"state_dict": w, "epoch": 3}, p / "w.pth"),
    "of DataParallel": lambda w, p: torch.save({f"module.{n}": v for n, v in w.items()}, p / "w.pth"),
    "a whole model's": lambda w, p: torch.save({"model": {f"backbone.{n}": v for n, v in w.items()}}, p / "w.pth"),
}


@pytest.mark.parametrize("form", WRAPS)
@pytest.mark.parametrize("folder", [True, False])
def test_every_tensor_is_used_and_counted(tmp_path, capsys, whole, form, folder):
    WRAPS[form](whole, tmp_path)
    made = tower(tmp_path if folder else next(tmp_path.iterdir()))
    count, out = len(whole) - 2, capsys.readouterr().out
    assert same(made, whole)
    said = rf"image encoder resnet50: {count} of {count} tensors from w\.\w+, 2 of a classifier left out\n"
    assert re.fullmatch(said, out)


CHANGES = {
    "names of another library": (lambda w: {f"features.{n}": v for n, v in w.items()}, "0 of the encoder's"),
    "a tensor missing": (lambda w: {n: v for n, v in w.items() if n != "bn1.weight"}, "missing: bn1.weight (1)"),
    "a tensor too many": (lambda w: {**w, "extra.weight": torch.ones(2)}, "not of this encoder: extra.weight (1)"),
    "another shape": (lambda w: {**w, "bn1.bias": torch.ones(3, 3)}, "of another shape: bn1.bias (1)"),
    "nothing": (lambda w: {}, "0 of the encoder's"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_of_other_tensors_is_an_error_that_names_them(tmp_path, whole, change):
    make, said = CHANGES[change]
    torch.save(make(whole), tmp_path / "w.pth")
    with pytest.raises(ParamsError) as error:
        tower(tmp_path / "w.pth")
    text = str(error.value)
    assert "\n" not in text and text.startswith("model.image_encoders: resnet50: weights: ") and said in text


def test_what_is_no_file_of_weights_is_one_line(tmp_path, whole):
    for n in "ab":
        torch.save(whole, tmp_path / f"{n}.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.pt").write_bytes(b"no weights")
    (tmp_path / "bad.bin").write_bytes(b"no weights")
    for name, says in (
        ("none.pth", "not found"),
        ("empty", "holds no file of weights"),
        ("bad.pt", "not a checkpoint of torch"),
        ("bad.bin", "not a checkpoint of torch"),
        (".", r"several files could be meant \(a.pth, b.pth\)"),
    ):
        with pytest.raises(ParamsError, match=says) as error:
            tower(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_checkpoint_needs_the_file_no_more(tmp_path):
    """As where a trained model is read back."""
    options = ImageEncoder("resnet50", False, args=ARGS, weights=str(tmp_path / "gone.pth"))
    assert ImageTower(options, 32, False).width == 64
