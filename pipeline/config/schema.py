"""``python -m pipeline.config.schema``: writes params.schema.json, by which editors complete and check params.yaml.

A key's description is the comment behind it in ``params.py`` or ``archive_params.py``, a section's is its docstring.
"""

from __future__ import annotations

import inspect
import io
import json
import tokenize
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pipeline.config import archive_params, params

SCHEMA_FILE = Path(__file__).parents[2] / "params.schema.json"
# pydantic writes the bounds of a number that text is accepted for as its own words.
BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
OVERRIDES = {"sampling": "Sampling", "augment": "Augment", "loss": "Loss", "train": "Train"}  # keys of a run


def params_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of params.yaml."""
    schema = _plain(TypeAdapter(params.Params).json_schema())
    named = {**vars(archive_params), **vars(params)}
    records = {name: cls for name, cls in named.items() if inspect.isclass(cls) and is_dataclass(cls)}
    for name, made in (*schema["$defs"].items(), ("Params", schema)):
        record = records[name]
        made["description"] = inspect.getdoc(record)
        for key, comment in _comments(record).items():
            made["properties"][key]["description"] = comment
    for key, record_name in OVERRIDES.items():  # ``run_config`` checks them by the section's record
        schema["$defs"]["Run"]["properties"][key] = {"$ref": f"#/$defs/{record_name}"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _plain(made: Any) -> Any:
    """With the bounds in JSON schema's words, and without the titles, which only say a key once more."""
    if isinstance(made, dict):
        return {BOUNDS.get(k, k): _plain(v) for k, v in made.items() if k != "title"}
    return [_plain(v) for v in made] if isinstance(made, list) else made


def _comments(record: type) -> dict[str, str]:
    """Field -> the comment at the end of its line."""
    names, found, key = {f.name for f in fields(record)}, {}, ""
    line_starts = True
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(record)).readline):
        if line_starts and token.type == tokenize.NAME:
            key = token.string if token.string in names else ""
        if token.type == tokenize.COMMENT and key:
            found[key] = token.string.lstrip("# ")
        line_starts = token.type in (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT)
    return found


def main() -> None:
    """Write the schema."""
    SCHEMA_FILE.write_text(json.dumps(params_schema(), indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
