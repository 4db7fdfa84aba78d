"""What a pickle of a torch checkpoint would make, found out without making it: no name of it is looked up.

torch's ``weights_only`` keeps code out, not sizes: ``bytearray(10**10)`` is 30 bytes, and a tensor may be stated larger
than its storage, which torch then enlarges. Here each step of a pickle is followed on place holders first.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import chain
from typing import IO, Any

from torch._utils import IMPORT_MAPPING, NAME_MAPPING

PICKLES = 4 << 20  # bytes of all pickles of a file; a model of a thousand tensors has 200 KB, with optimizer 1 MB
# Bytes of a number, by the name of torch's storage.
WIDTHS = {"Bool": 1, "Byte": 1, "Char": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4, "Long": 8}
WIDTHS |= {"Double": 8, "ComplexFloat": 8, "ComplexDouble": 16}
STORAGE = re.compile(r"torch\.(?:cuda\.)?([A-Z]\w*)Storage")
DTYPE = re.compile(r"torch\.(b?float|u?int|complex|bool)\d*")
# What may be called beside the caller's names: it makes no more than it is given, or is looked at in ``_called``.
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
CALLED = frozenset(
    (
        *("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.complex", "_codecs.encode"),
        *("torch.Size", "torch.device", "torch._utils._rebuild_parameter", *TENSORS),
    )
)
PLAIN = (
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    "SHORT_BINSTRING",
)


class Odd(ValueError):
    """What is wrong with a pickle, in words that go after the name of its file."""


@dataclass(frozen=True)
class _Name:
    name: str


@dataclass(frozen=True)
class _Storage:
    """``length`` numbers of ``width`` bytes."""

    width: int
    length: int


class _Tensor:
    pass


@dataclass
class Checkpoint:
    """The pickles of one file, ``size`` bytes long; ``known`` are names that its reader replaces by something inert."""

    size: int
    known: Collection[str] = ()
    storages: dict[Any, _Storage] = field(default_factory=dict)
    stated: int = 0  # bytes of the storages
    copied: int = 0  # parts of what is copied

    def follow(self, file: IO[bytes]) -> None:
        """Follow one pickle to its end. Lists, dicts and sets are lists here, since only their lengths matter.

        Raises:
            Odd: it names what no checkpoint needs, or states more than ``size`` bytes.
            Exception: it is no pickle; of any class.
        """
        stack: list[Any] = []
        marked: list[list[Any]] = []
        memo: dict[Any, Any] = {}
        for code, value, _ in pickletools.genops(file):
            match code.name:
                case "STOP":
                    return
                case "PROTO":
                    pass
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = tuple(stack), marked.pop()
                    stack.append(items)
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    last = [stack.pop() for _ in range(int(code.name[-1]))]
                    stack.append(tuple(reversed(last)))
                case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                    stack.append([])
                case "APPENDS" | "SETITEMS":
                    more, stack = stack, marked.pop()
                    _check_keys(more[::2] if code.name == "SETITEMS" else ())
                    stack[-1].extend(more)
                case "APPEND":
                    stack[-2].append(stack.pop())
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _check_keys([key])
                    stack[-1].extend((key, value))
                case "BINPUT" | "LONG_BINPUT":
                    memo[value] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[value])
                case "GLOBAL":
                    stack.append(self._named(str(value)))
                case "REDUCE" | "NEWOBJ":
                    given = stack.pop()
                    stack[-1] = self._called(stack[-1], given)
                case "BUILD":
                    self._copy([stack.pop()])
                    if not isinstance(stack[-1], list):  # of a tensor it sets the size
                        raise Odd("changes a tensor after it is made, which torch itself does not write")
                case "BINPERSID":
                    stack.append(self._stored(stack.pop()))
                case "EMPTY_TUPLE":
                    stack.append(())
                case plain if plain in PLAIN:
                    stack.append(value)
                case _:
                    raise Odd(f"has a step {code.name}, which torch does not read safely; save it with protocol 2")
        raise Odd("ends within a pickle")

    def _named(self, words: str) -> _Name:
        module, _, name = words.partition(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = f"{module}.{name}"
        if full not in CALLED and full not in self.known and not STORAGE.fullmatch(full) and not DTYPE.fullmatch(full):
            what = full if re.fullmatch(r"[\w.]{1,80}", full) else "something"
            raise Odd(f"holds {what}, which is no tensor and no known setting")
        return _Name(full)

    def _called(self, called: Any, given: tuple[Any, ...]) -> Any:
        if not isinstance(called, _Name) or not (called.name in CALLED or called.name in self.known):
            raise Odd("calls what no checkpoint needs to call")
        self._copy(given)
        if called.name in TENSORS:
            return self._rebuilt(*given[:4])
        if called.name == "torch._utils._rebuild_parameter":
            return given[0]
        if called.name == "torch.Size":
            return _numbers(given[0])
        _check_keys(chain.from_iterable(_members(part) for part in given))
        if called.name == "_codecs.encode":  # how old pickles write bytes; other encodings make more of them
            if not isinstance(given[0], str) or given[1] not in ("latin1", "latin-1"):
                raise Odd("encodes a text, which torch itself does not write")
            return given[0]
        return list(chain.from_iterable(part for part in given if isinstance(part, list | tuple | str)))

    def _copy(self, given: Collection[Any]) -> None:
        """A list that is named a thousand times may be copied a thousand times."""
        self.copied += sum(len(part) for part in given if isinstance(part, list | tuple | str))
        if self.copied > PICKLES:
            raise Odd("copies the same part again and again")

    def _stored(self, stated: tuple[Any, ...]) -> _Storage:
        """A storage: ("storage", its class, key, device, number of elements) and, in the old format, a None."""
        what, kind, key, _, length = stated[:5]
        if not isinstance(key, str | int) or type(length) is not int:
            raise Odd("has a storage without a name or a length")
        width = WIDTHS.get(found[1]) if (found := STORAGE.fullmatch(kind.name)) else None
        if what != "storage" or any(part is not None for part in stated[5:]) or width is None:
            raise Odd("has numbers of a kind that is not known here")
        storage = _Storage(width, length)
        before = self.storages.setdefault(key, storage)
        if before is storage:
            self.stated += width * length
        if length < 0 or self.stated > self.size:
            raise Odd("states more numbers than it holds")
        if before != storage and before.length + length:  # torch would read it again each time
            raise Odd("states one storage in two ways")
        return storage

    def _rebuilt(self, storage: _Storage, offset: int, sizes: tuple[int, ...], strides: tuple[int, ...]) -> _Tensor:
        steps = list(zip(_numbers(sizes), _numbers(strides), strict=True))
        if min(offset, *sizes, *strides, 0) < 0:
            raise Odd("has a tensor of a negative size")
        end = offset + 1 + sum((size - 1) * stride for size, stride in steps) if all(sizes) else offset
        if end > storage.length:
            raise Odd("has a tensor that is larger than its storage")
        return _Tensor()


def _numbers(sizes: Any) -> tuple[int, ...]:
    """Sizes or strides."""
    if not isinstance(sizes, tuple) or any(type(size) is not int for size in sizes):
        raise Odd("has a tensor whose sizes are no numbers")
    return sizes


def _members(part: Any) -> list[Any]:
    """What becomes keys of a table, or members of a set, that is made of ``part``: values, or pairs of them."""
    found = list(part) if isinstance(part, list | tuple) else []
    return [pair[0] if isinstance(pair, list | tuple) and len(pair) == 2 else pair for pair in found]


def _check_keys(keys: Iterable[Any]) -> None:
    """A key's place in a table is computed from all of it: of a tuple in itself thirty times that has no end, and of
    large numbers it may be the same."""
    for key in keys:
        small = abs(key) < 1 << 60 if isinstance(key, int) else isinstance(key, str | float | _Name | None)
        if not small:
            raise Odd("has a key that no checkpoint needs")
