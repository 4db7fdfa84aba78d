"""Plain YAML or JSON data as records: pydantic checks every key, type and bound; an error is a line in our words."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")
MOST_CLOSE = 200  # names among which a close one is looked for
MOST = 20  # lines of an error that are shown
MANY = 1 << 20  # upper bound of a number without a tighter one

# Of every record: ``@dataclass(frozen=True, config=RECORD)``, the decorator being pydantic's.
RECORD = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class ParamsError(ValueError):
    """Keys of params.yaml that cannot be used; the message is one line for each, which names it."""

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        left = len(self.lines) - MOST
        return "\n".join([*self.lines[:MOST], *([f"and {left} more"] if left > 0 else [])])


_AS_WRITTEN = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def _number(raw: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text, YAML 1.2 and people read it as a number."""
    return float(raw) if isinstance(raw, str) and _AS_WRITTEN.fullmatch(raw) else raw


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if not limits[0] < limits[1]:
        raise ValueError(f"{list(limits)} is no lower and upper bound")
    return limits


def _in_order(limits: tuple[float, float]) -> tuple[float, float]:
    if not limits[0] <= limits[1]:
        raise ValueError(f"{list(limits)} is no lower and upper bound")
    return limits


def _each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    seen: set[T] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{shown(value)} is there twice; expected each once")
        seen.add(value)
    return values


def _some_each_once(values: tuple[T, ...]) -> tuple[T, ...]:
    if not values or len(set(values)) < len(values):
        raise ValueError("expected at least one, each once")
    return values


# Without Strict, true would be 1, "4" would be 4 and "yes" would be true. A whole number is a number.
Whole = Annotated[int, Strict()]
Flag = Annotated[bool, Strict()]
Number = Annotated[float, Strict(), BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=0, le=MANY)]
Positive = Annotated[Whole, Field(ge=1, le=MANY)]
Seed = Annotated[Whole, Field(ge=0, le=1 << 32)]
Pixels = Annotated[Whole, Field(ge=16, le=1 << 12)]  # of a side
Share = Annotated[Number, Field(ge=0, le=1)]
Part = Annotated[Number, Field(gt=0, le=1)]
Inside = Annotated[Number, Field(gt=0, lt=1)]
LessThanAll = Annotated[Number, Field(ge=0, lt=1)]
Weight = Annotated[Number, Field(ge=0, le=MANY)]
Decay = Annotated[Number, Field(ge=0, le=100)]

# What params.yaml gives a name to becomes a file, an item of a DVC stage and a part of metrics' names.
# DVC reads the file as YAML 1.2, in which 08, 1e5 and 1_0 are numbers: so a letter comes first.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
Name = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
NameOrNone = Annotated[str, Field(pattern=f"^({NAME.pattern})?$")]

_UNIQUE = Field(json_schema_extra={"uniqueItems": True})
Names = Annotated[tuple[Name, ...], AfterValidator(_each_once), _UNIQUE]
Texts = Annotated[tuple[str, ...], AfterValidator(_each_once), _UNIQUE]
Purposes = Annotated[tuple[Literal["classification", "retrieval"], ...], AfterValidator(_each_once), _UNIQUE]
Insides = Annotated[tuple[Inside, ...], AfterValidator(_each_once), _UNIQUE]
Seeds = Annotated[tuple[Count, ...], AfterValidator(_some_each_once), _UNIQUE]
Ranks = Annotated[tuple[Positive, ...], AfterValidator(_some_each_once), _UNIQUE]
Limits = Annotated[tuple[Weight, Weight], AfterValidator(_ascending)]
Scale = Annotated[Number, Field(gt=0, le=100)]
Scales = Annotated[tuple[Scale, Scale], AfterValidator(_in_order)]


def hint(name: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` where one of ``known`` is close to ``name``, else nothing."""
    close = _close(name, known)
    return f" (did you mean {close}?)" if close else ""


def _close(name: str, known: Iterable[str]) -> str:
    known = list(known)
    if len(known) > MOST_CLOSE:  # each costs a comparison, and a file of a stranger may have a hint for each line
        return ""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), "")


def read_record(cls: type[T], raw: Any, at: str = "") -> T:
    """Build a record from plain YAML/JSON data, checking every key and type on the way down.

    Args:
        at: the dotted key of ``raw`` in its file, "" for the whole of it.

    Raises:
        ParamsError: unknown keys, missing keys, values of another type or out of their bounds: a line for each.
    """
    try:
        kind: Any = cls
        found: T = _adapter(kind).validate_python(raw)
        return found
    except ValidationError as error:
        errors = error.errors(include_url=False)
        unknown = [one["loc"] for one in errors if one["type"] == "unexpected_keyword_argument"]
        meant = {(*place[:-1], _close(str(place[-1]), _keys(cls, place[:-1]))) for place in unknown}
        # Of a misspelt key one line is enough: that it is unknown, not that the right one is missing, too.
        lines = [_line(cls, one, at) for one in errors if one["type"] != "missing" or one["loc"] not in meant]
        raise ParamsError(*dict.fromkeys(lines)) from None


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


WANTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "dict": "a mapping",
    "dataclass": "a mapping of keys",
}  # by the first word of pydantic's name of an error


def _keys(cls: type, place: tuple[str | int, ...]) -> list[str]:
    return [f.name for f in fields(kind_at(cls, place))]


def _line(cls: type, error: ErrorDetails, at: str) -> str:
    """One of pydantic's errors in our words."""
    place = tuple(step for step in error["loc"] if step != "[key]")
    what, value, context = error["type"], error["input"], error.get("ctx", {})
    above = kind_at(cls, place[:-1])
    if what == "missing" and not is_dataclass(above):  # a value of a list of fixed length
        place, what, context = place[:-1], "too_long", {"max_length": len(typing.get_args(above))}
    key = _dotted(at, place)
    if what == "missing":
        return f"{key}: missing"
    if what == "too_long":
        return f"{key}: expected {context['max_length']} values, got {len(value)}"
    if what in ("unexpected_keyword_argument", "invalid_key"):
        return f"{key}: unknown key{hint(str(place[-1]), _keys(cls, place[:-1]))}"
    if what.startswith("string_") and what != "string_type":
        return f"{key}: a name is letters, digits and _, a letter first, 64 at most"
    kind = kind_at(cls, place)
    if what == "literal_error":
        return f"{key}: {shown(value)} is none of {', '.join(map(str, typing.get_args(kind)))}"
    if what.startswith(("greater_than", "less_than")):
        return f"{key}: {shown(value)} is outside {_bounds(cls, place)}"
    if what == "value_error":
        return f"{key}: {context['error']}"
    return f"{key}: expected {WANTED[what.partition('_')[0]]}, got {shown(value)}"


def kind_at(kind: Any, place: Iterable[str | int], bare: bool = True) -> Any:
    """The annotation at a place of a record: ``kind_at(Params, ("train", "lr"))`` -> float.

    Args:
        bare: without what ``Annotated`` adds to it.
    """
    for step in place:
        kind = _bare(kind)
        arguments = typing.get_args(kind)
        if is_dataclass(kind):
            kind = typing.get_type_hints(kind, include_extras=True).get(str(step), Any)
        elif typing.get_origin(kind) is dict:
            kind = arguments[1]
        elif typing.get_origin(kind) is tuple:
            kind = arguments[0] if arguments[-1] is Ellipsis else arguments[int(step)]
        else:
            return Any
    return _bare(kind) if bare else kind


def _bare(kind: Any) -> Any:
    """Without ``Annotated`` and ``| None``."""
    if typing.get_origin(kind) is Annotated:
        return _bare(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _bare(typing.get_args(kind)[0])
    return kind


def _bounds(cls: type, place: tuple[str | int, ...]) -> str:
    """``[1, 100]``; a round bracket where the bound itself is outside."""
    parts = [
        part for extra in typing.get_args(kind_at(cls, place, bare=False)) for part in getattr(extra, "metadata", ())
    ]
    known = {name: getattr(part, name) for part in parts for name in ("ge", "gt", "le", "lt") if hasattr(part, name)}
    low = f"[{known['ge']}" if "ge" in known else f"({known['gt']}"
    high = f"{known['le']}]" if "le" in known else f"{known['lt']})"
    return f"{low}, {high}"


def _dotted(at: str, place: Iterable[str | int]) -> str:
    text = at
    for step in place:
        if isinstance(step, int):
            text += f"[{step}]"
        else:  # a key of the file, which may hold anything
            text += f".{step}" if re.fullmatch(r"[\w-]{1,64}", step) else f".{shown(step)}"
    return text.removeprefix(".") or "the file"


def shown(raw: Any) -> str:
    """A value of a file as a message quotes it: 60 characters at most."""
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
