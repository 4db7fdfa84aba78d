"""Files of weights of other people, read without running anything they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.storage.torch_archive import check_archive


class _Inert:
    """Replaces a class of settings in a training checkpoint; takes anything, does nothing, and is thrown away."""

    def __init__(self, *args: Any, **values: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _table(*args: Any) -> dict[Any, Any]:
    """Replaces ``collections.defaultdict``, whose factory would be called on a missing key."""
    return {}


# Settings that CXR-CLIP's .tar and Lightning's .ckpt files hold beside the tensors. The names are read as _Inert: the
# classes themselves are never imported.
_OMEGACONF = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "String", "Integer", "Float", "Boolean", "Bytes", "Path")),
    *("omegaconf.nodes.InterpolationResultNode", "typing.Any"),
)
_LIGHTNING = (
    *("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "argparse.Namespace"),
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)
_NUMBERS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "_codecs.encode")
_PLAIN = ("builtins.dict", "builtins.list", "builtins.int", "builtins.str", "builtins.float", "builtins.bool")
HARMLESS: dict[str, Callable[..., Any]] = dict.fromkeys((*_OMEGACONF, *_LIGHTNING, *_NUMBERS, *_PLAIN), _Inert)
# Kinds of dict become plain ones.
HARMLESS |= {"pytorch_lightning.utilities.parsing.AttributeDict": dict, "collections.defaultdict": _table}


def read_weights(path: Path) -> dict[str, Any]:
    """What a .safetensors file or a torch checkpoint of any extension holds, on the CPU.

    Only tensors, plain containers and numbers come out of a torch checkpoint; objects of the classes in ``HARMLESS``
    come out empty, and anything else makes the whole file refused. No code of the file runs.

    Raises:
        ValueError: one line: the file is refused, or is none.
    """
    if path.suffix == ".safetensors":
        try:
            return dict(load_file(path))
        except Exception as error:  # safetensors' own class; its text is about bytes
            raise ValueError(f"{path}: not a safetensors file ({type(error).__name__}); download it again") from None
    check_archive(path, HARMLESS)
    try:
        with torch.serialization.safe_globals([(cls, name) for name, cls in HARMLESS.items()]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's text may quote the file, and advises to switch the check off
        raise ValueError(f"{path}: not a checkpoint of torch ({type(error).__name__}); download it again") from None
    if not isinstance(found, Mapping):
        raise ValueError(f"{path}: holds no table of tensors")
    return dict(found)
