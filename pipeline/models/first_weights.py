"""The first weights of an image encoder, from a file: every tensor of the encoder, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pipeline.storage.foreign_weights import read_weights
from pipeline.storage.torch_archive import Refused

FILES = ("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.pth", "*.pt", "*.bin")  # of a folder, in order
WRAPPED = ("state_dict", "model_state_dict", "model")  # where trainings keep the weights beside other things
PREFIXES = ("module.", "model.", "backbone.", "encoder.")  # before all names, as of DataParallel's wrapper
# Tables that a model makes itself, which files of older timm hold.
MADE = ("relative_position_index", "attn_mask", "num_batches_tracked")


def load_first_weights(model: nn.Module, place: Path) -> str:
    """Fill a timm model without a classifier from a file, or from the one file of a folder; what was used, as words.

    Weights of a classifier may be left over; nothing else may, and none may be missing or of another shape.

    Raises:
        ValueError: one line that names the file and tensors.
    """
    path = _file(place)
    found: Mapping[str, Any] = read_weights(path)
    for key in WRAPPED:
        if isinstance(inner := found.get(key), Mapping):
            found = inner
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    own = model.state_dict()
    for prefix in PREFIXES:
        if tensors and not tensors.keys() & own.keys() and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    heads = _heads(model)
    extra = [n for n in tensors if n not in own and not n.startswith(heads) and not n.endswith(MADE)]
    missing = [n for n in own if n not in tensors and not n.endswith(MADE)]
    other = [n for n in own if n in tensors and tensors[n].shape != own[n].shape]
    if extra or missing or other:
        used = sum(name in tensors and tensors[name].shape == own[name].shape for name in own)
        said = (("missing", missing), ("not of this encoder", extra), ("of another shape", other))
        wrong = "; ".join(f"{what}: {', '.join(names[:2])} ({len(names)})" for what, names in said if names)
        raise Refused(f"{path}: {used} of the encoder's {len(own)} tensors are in it; {wrong}")
    model.load_state_dict({name: tensors.get(name, own[name]) for name in own})
    left = sum(name.startswith(heads) for name in tensors)
    return f"{len(own)} of {len(own)} tensors from {path.name}" + (f", {left} of a classifier left out" if left else "")


def _file(place: Path) -> Path:
    if not place.is_dir():
        if not place.is_file():
            raise Refused(f"{place}: not found")
        return place
    for pattern in FILES:
        if found := sorted(place.glob(pattern)):
            if len(found) > 1:
                raise Refused(
                    f"{place}: several files could be meant ({', '.join(p.name for p in found[:3])}); name one"
                )
            return found[0]
    raise Refused(f"{place}: holds no file of weights ({', '.join(FILES)})")


def _heads(model: nn.Module) -> tuple[str, ...]:
    """What names of a classifier's tensors begin with, as timm says."""
    stated = getattr(model, "default_cfg", {}).get("classifier", ())
    names = (stated,) if isinstance(stated, str) else tuple(stated or ())
    return tuple(f"{name}." for name in names) or ("classifier.",)
