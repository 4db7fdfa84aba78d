"""Where params.yaml may point: below the repository, to an absolute path that is there, or to a URL; and how places
are shown to others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.config.params import Params
from pipeline.config.records import NAME, hint


def check_places(params: Params) -> Iterator[str]:
    """A line for each path or URL that cannot be meant.

    Whether an archive, its stamp and what is relative to the repository is there is said later, by whoever reads it: he
    knows how to get it.
    """
    for name, source in params.sources.items():
        at = f"sources.{name}"
        yield from _given(f"{at}.path", source.path) or _archive(f"{at}.path", source.path)
        yield from _archive(f"{at}.reports", source.reports) if source.reports else ()
        yield from _given(f"{at}.stamp", source.stamp) or _path(f"{at}.stamp", source.stamp, there=False)
        yield from _path(f"{at}.list_5x200", source.list_5x200)
        if Path(source.manifest).is_absolute() or "://" in source.manifest or _leaves(source.manifest):
            yield f"{at}.manifest: {source.manifest!r} is not below the archive; give its path from sources.{name}.path"
    yield from _url("ingest.target", params.ingest.target) if params.ingest.target else ()
    for key, file in (("file", params.prompts.file), ("ablation", params.prompts.ablation)):
        yield from _given(f"prompts.{key}", file) or _path(f"prompts.{key}", file)
    for protocol in params.evaluate.protocols:
        if "/" in protocol or protocol.endswith(".yaml"):
            yield from _path("evaluate.protocols", protocol)
        elif not NAME.fullmatch(protocol):
            yield f"evaluate.protocols: {protocol!r} is neither a protocol's name nor a path of a .yaml file"
    for name, other in params.others.items():
        yield from _given(f"others.{name}.weights", other.weights) or _path(f"others.{name}.weights", other.weights)
    for name, encoder in params.model.image_encoders.items():
        yield from _path(f"model.image_encoders.{name}.weights", encoder.weights)
    words = params.back_translation  # these and the text encoder may be names at a hub
    yield from _path("model.text_encoder.name", params.model.text_encoder.name)
    yield from _path("back_translation.forward", words.forward)
    yield from _path("back_translation.back", words.back)


def without_places(value: Any) -> Any:
    """A value of params.yaml as it may be shown to others: absolute paths and URLs, which may name people and hold
    passwords, by their last part, in lists and mappings, too."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(without_places, value))
    if isinstance(value, str) and "://" in value:
        return f"{value.partition('://')[0]}://…/{Path(value).name}"
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def _given(key: str, text: str) -> list[str]:
    return [] if text else [f"{key}: missing; it is empty"]


def _archive(key: str, place: str) -> Iterator[str]:
    yield from _url(key, place) if "://" in place else _path(key, place, there=False)


def _path(key: str, path: str, there: bool = True) -> Iterator[str]:
    """Of a local path; with ``there`` an absolute one must exist."""
    if not path.isprintable():
        yield f"{key}: {path!r} has a character that no path has here"
    elif path.startswith("~") or "$" in path:
        yield f"{key}: {path!r}: ~ and $ are not filled in; give the whole path"
    elif "://" in path:
        yield f"{key}: {path!r} is a URL; a local path is needed here"
    elif _leaves(path):
        yield f"{key}: {path!r} leaves the repository; give a path below it, or an absolute one: {Path(path).resolve()}"
    elif there and Path(path).is_absolute() and not Path(path).exists():
        yield f"{key}: {path} not found"


def _leaves(path: str) -> bool:
    """Whether a relative path ends above where it starts."""
    return os.path.normpath(path).split("/")[0] == ".."


def _url(key: str, url: str) -> Iterator[str]:
    """Of an fsspec URL; one inside another one is joined to it by ``::``."""
    import fsspec  # type: ignore[import-untyped]  # here, since few params.yaml have a URL

    if not url.isprintable() or "://" not in url:
        yield f"{key}: {url!r} is no URL such as s3://bucket/folder"
        return
    known = fsspec.available_protocols()
    for link in url.split("::"):
        scheme = link.partition("://")[0]
        if scheme not in known:
            yield f"{key}: unknown URL scheme {scheme!r}{hint(scheme, known)}; known are {', '.join(known)}"
            continue
        if lacks := _lacks(scheme):
            yield f"{key}: {scheme}:// cannot be read here: {lacks}"


def _lacks(scheme: str) -> str:
    """fsspec's own words on the package that a scheme needs, or nothing if it is there."""
    from fsspec.registry import get_filesystem_class, known_implementations  # type: ignore[import-untyped]

    known = known_implementations.get(scheme, {"class": "fsspec"})
    package = known["class"].partition(".")[0]
    try:
        if package != "fsspec":  # to import it would take a second
            return "" if find_spec(package) else str(known.get("err", f"install {package}"))
        get_filesystem_class(scheme)
    except ImportError as error:
        return str(known.get("err", error))
    return ""
