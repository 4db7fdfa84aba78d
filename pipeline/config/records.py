"""Plain YAML or JSON data as frozen dataclasses, every key and type checked: one clear error names what is wrong."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeVar

T = TypeVar("T")


class ParamsError(ValueError):
    """A key of params.yaml that cannot be used; the message is one line that names it."""


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both allowed: ``Annotated[int, Within(1, 9)]``."""

    low: float
    high: float


def hint(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` where one of ``known`` is close to ``name``, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def read_record(cls: type[T], raw: Any, at: str = "") -> T:
    """Build the dataclass ``cls`` from plain YAML/JSON data, checking every key and type on the way down.

    Raises:
        ParamsError: unknown key, missing key, a value of another type or out of its bounds, with its dotted path.
    """
    if not isinstance(raw, Mapping):
        raise ParamsError(f"{at or 'the file'}: expected a mapping of keys, got {_show(raw)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    prefix = f"{at}." if at else ""
    for key in raw:
        if key not in known:
            raise ParamsError(f"{prefix}{key}: unknown key{hint(str(key), known)}")
    values = {}
    for name, f in known.items():
        if name in raw:
            values[name] = _convert(hints[name], raw[name], f"{prefix}{name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ParamsError(f"{prefix}{name}: missing")
    return cls(**values)


def _convert(kind: Any, raw: Any, at: str) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return raw
    if origin is Annotated:
        value = _convert(args[0], raw, at)
        for bounds in args[1:]:
            if not bounds.low <= value <= bounds.high:
                raise ParamsError(f"{at}: {value} is outside [{bounds.low}, {bounds.high}]")
        return value
    if is_dataclass(kind):
        return read_record(typing.cast(type, kind), raw, at)
    if origin is Literal:
        if raw not in args:
            raise ParamsError(f"{at}: {_show(raw)} is none of {', '.join(map(str, args))}")
        return raw
    if origin is dict:
        if not isinstance(raw, Mapping):
            raise ParamsError(f"{at}: expected a mapping, got {_show(raw)}")
        return {_convert(args[0], k, f"{at}.{k}"): _convert(args[1], v, f"{at}.{k}") for k, v in raw.items()}
    if origin is tuple:
        if not isinstance(raw, list | tuple):
            raise ParamsError(f"{at}: expected a list, got {_show(raw)}")
        kinds = [args[0]] * len(raw) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(raw):
            raise ParamsError(f"{at}: expected {len(kinds)} values, got {len(raw)}")
        return tuple(_convert(k, v, f"{at}[{i}]") for i, (k, v) in enumerate(zip(kinds, raw, strict=True)))
    if origin in (typing.Union, types.UnionType):
        if len(args) == 2 and args[1] is types.NoneType:
            return None if raw is None else _convert(args[0], raw, at)
        raise TypeError(f"{at}: unions are not supported in params records")
    if kind is float:
        if isinstance(raw, str):  # YAML 1.1 reads 1e-4 as text, YAML 1.2 and people read it as a number
            try:
                return float(raw)
            except ValueError:
                pass
        elif isinstance(raw, int | float) and not isinstance(raw, bool):
            return float(raw)
        raise ParamsError(f"{at}: expected a number, got {_show(raw)}")
    if isinstance(raw, kind) and not (kind is int and isinstance(raw, bool)):
        return raw
    names = {int: "a whole number", bool: "true or false", str: "text"}
    raise ParamsError(f"{at}: expected {names[kind]}, got {_show(raw)}")


def _show(raw: Any) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
