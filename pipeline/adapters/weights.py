"""Checkpoints of other people: read without running anything they hold, and used to the last tensor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.storage.foreign_weights import read_weights

# Old transformers kept the positions 0, 1, 2 ... as a buffer; the only tensor that may be left over.
POSITIONS = re.compile(r"(^|\.)embeddings\.position_ids$")


class MissingWeights(ValueError):
    """A file that a model needs is not in its folder; the message is one line on what goes where."""


def find(folder: Path, *patterns: str) -> list[Path]:
    """Files of a folder that the first fitting pattern matches, sorted.

    Raises:
        MissingWeights: nothing matches.
    """
    for pattern in patterns:
        if found := sorted(p for p in folder.glob(pattern) if p.is_file()):
            return found
    raise MissingWeights(f"{folder}/{patterns[0]}: not there; {_how_to_get(folder)}")


def find_one(folder: Path, *patterns: str) -> Path:
    """As ``find``, where there may be one file only.

    Raises:
        ValueError: the pattern matches several.
    """
    found = find(folder, *patterns)
    if len(found) > 1:
        raise ValueError(f"{folder}: several files could be meant ({', '.join(p.name for p in found[:3])}); leave one")
    return found[0]


def _how_to_get(folder: Path) -> str:
    note = folder / "README.md"
    return f"{note} says where to get it" if note.is_file() else "docs/models.md says which file goes where"


class Weights:
    """The tensors of a checkpoint, each of which has to be taken or named as ignored.

    Use: ``take`` the parts by prefix, then ``finish``.
    """

    def __init__(self, tensors: Mapping[str, Any], where: Path) -> None:
        """``where`` is for messages.

        Raises:
            ValueError: a value is no tensor, or one that repeats its numbers.
        """
        odd = [key for key, value in tensors.items() if not (isinstance(key, str) and _is_plain(value))]
        if odd or not tensors:
            raise ValueError(f"{where}: {f'not tensors: {_some(odd)}' if odd else 'no tensor in it'}")
        # A row may be stated to repeat a million times. Copied into a module, it would.
        if large := [key for key, value in tensors.items() if value.nbytes > value.untyped_storage().nbytes()]:
            raise ValueError(f"{where}: states more numbers than it holds: {_some(large)}")
        self.left: dict[str, Tensor] = dict(tensors)
        self.where = where

    @classmethod
    def of(cls, path: Path, key: str = "", ignored: Iterable[str] = ()) -> Weights:
        """Read a file: its tensors stand under ``key`` ("" = at the top), beside entries that are ``ignored`` by name.

        Raises:
            ValueError: ``key`` is missing, or an entry is not among ``ignored``.
        """
        found = read_weights(path)
        if not key:
            return cls(found, path)
        if not isinstance(found.get(key), Mapping):
            raise ValueError(f"{path}: has no entry {key!r} with tensors")
        if strange := set(map(str, found)) - {key, *ignored}:
            raise ValueError(f"{path}: has entries that this model's files do not have: {_some(sorted(strange))}")
        return cls(found[key], path)

    def take(self, prefix: str) -> dict[str, Tensor]:
        """Remove and return what is below a prefix, without it.

        Raises:
            ValueError: nothing does.
        """
        taken = {k.removeprefix(prefix): self.left.pop(k) for k in list(self.left) if k.startswith(prefix)}
        if not taken:
            raise ValueError(f"{self.where}: lacks {prefix}*; left are {_some(self.left) or 'none'}")
        return taken

    def one(self, key: str) -> Tensor:
        """Remove and give a single tensor.

        Raises:
            ValueError: it is missing.
        """
        if key not in self.left:
            raise ValueError(f"{self.where}: lacks {key}")
        return self.left.pop(key)

    def has(self, prefix: str) -> bool:
        """Whether anything is below a prefix."""
        return any(key.startswith(prefix) for key in self.left)

    def ignore(self, prefix: str) -> None:
        """Drop what the model was trained with but is not used for embeddings; it need not be there."""
        self.left = {key: value for key, value in self.left.items() if not key.startswith(prefix)}

    def finish(self) -> None:
        """Make sure that nothing is left.

        Raises:
            ValueError: something is.
        """
        if extra := [key for key in self.left if not POSITIONS.search(key)]:
            raise ValueError(f"{self.where}: has keys that this model does not have: {_some(extra)}")


def fill(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors into a module, each into its place, in single precision.

    ``where`` is for messages: "<file>: <prefix of the keys>".

    Raises:
        ValueError: a key is missing, unknown or of another shape; up to three of them are named.
    """
    file, _, prefix = where.rpartition(": ")
    own = module.state_dict()
    given = {k: v for k, v in tensors.items() if k in own or not POSITIONS.search(k)}
    shapes = {k: (list(v.shape), list(own[k].shape)) for k, v in given.items() if k in own}
    found = {
        "missing": [prefix + k for k in own if k not in given],
        "unknown": [prefix + k for k in given if k not in own],
        "of another shape": [f"{prefix}{k} {has} not {needs}" for k, (has, needs) in shapes.items() if has != needs],
    }
    if any(found.values()):
        raise ValueError(f"{file}: " + "; ".join(f"{kind}: {_some(keys)}" for kind, keys in found.items() if keys))
    module.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in given.items()}, strict=True)


def _is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor that holds its numbers."""
    return isinstance(value, Tensor) and not value.is_meta and value.layout == torch.strided


def _some(keys: Iterable[str]) -> str:
    names = [str(key)[:80] for key in keys]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
