"""A YAML file that a user gives, read with care: what is wrong with it is one line, and it cannot grow in memory.

Ours, because PyYAML keeps the last of two equal keys in silence, expands a kilobyte of aliases to gigabytes, and ends
with a traceback for a folder, a byte that is no UTF-8, a thousand brackets or a number of five thousand digits.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 20  # the paper's params.yaml has 9,000
MOST_TEXT = 1 << 22  # characters once all aliases are written out
DEEPEST = 50  # levels of lists and mappings
MERGE = "tag:yaml.org,2002:merge"
TEXT = "tag:yaml.org,2002:str"
# What YAML 1.1, which PyYAML reads, and 1.2, which DVC reads, take for the same.
PLAIN = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)"),
    "tag:yaml.org,2002:float": re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan", re.I),
    "tag:yaml.org,2002:bool": re.compile(r"true|false", re.I),
}
KINDS = {MERGE, *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map"))}


class YamlFileError(ValueError):
    """A file that is not YAML as we read it; one line, without the file's name: the line's number and what is wrong."""


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: mappings with text for keys, lists, text, numbers, true, false and null.

    Raises:
        YamlFileError: it is no such file: see there. FileNotFoundError: there is none.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for whoever writes it
            raise YamlFileError("not a file")
        if found.st_size > MOST_BYTES:
            raise YamlFileError(f"{found.st_size:,} bytes; such a file has {MOST_BYTES:,} at most")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, YamlFileError):
            raise
        raise YamlFileError(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise YamlFileError(f"line {1 + raw.count(10, 0, error.start)}: not UTF-8; save the file as UTF-8") from None
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = 1 + text.count("\n", 0, error.position)
        raise YamlFileError(f"line {line}: the character U+{int(error.character):04X} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem if isinstance(error, _Refused) else f"not valid YAML ({error.problem or error.context})"
        raise YamlFileError(f"line {mark.line + 1}: {what}" if mark else str(what)) from None


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that we do not take."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses more."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0
        self.written = 0  # characters so far, aliases written out
        self.sizes: dict[int, int] = {}  # of each node, in such characters

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node of the file, looked at as soon as it is whole."""
        event, before = self.peek_event(), self.written
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused(f"more than {DEEPEST} levels deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            self._check(node)
            self.written += 1 + len(node.value) if isinstance(node, yaml.ScalarNode) else 1
            self.sizes[id(node)] = self.written - before
        elif id(node) not in self.sizes:
            raise _Refused(f"*{event.anchor} is a part of itself", event.start_mark)
        else:
            self.written += self.sizes[id(node)]
        if self.written > MOST_TEXT:
            raise _Refused("the file is too large once its aliases (*) are written out", event.start_mark)
        return node

    def _check(self, node: Any) -> None:
        if node.tag not in KINDS:
            kind = node.tag.removeprefix("tag:yaml.org,2002:")[:40]
            raise _Refused(f"a value of the kind {kind!r}; write text in quotes, and no tag (!)", node.start_mark)
        if isinstance(node, yaml.ScalarNode) and node.tag in PLAIN and not PLAIN[node.tag].fullmatch(node.value):
            said = (
                f"{node.value[:40]!r} is something else to DVC: write a plain number, true or false, or text in quotes"
            )
            raise _Refused(said, node.start_mark)
        if not isinstance(node, yaml.MappingNode):
            return
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == MERGE:
                continue
            if key.tag != TEXT:
                said = f"the key {key.value[:40]!r} is" if isinstance(key, yaml.ScalarNode) else "a key is"
                raise _Refused(f"{said} not text; put it in quotes", key.start_mark)
            if key.value in first:
                raise _Refused(f"the key {key.value[:40]!r} is in line {first[key.value]} already", key.start_mark)
            first[key.value] = key.start_mark.line + 1

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """A node's value; of a text that only looks like a number one line says so."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError):
            raise _Refused("a number that cannot be read; put text in quotes", node.start_mark) from None
