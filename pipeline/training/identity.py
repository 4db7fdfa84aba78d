"""Whose a saved state is: digests of all that decides what a training ends with."""

from __future__ import annotations

import ast
import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from pipeline.config.run_config import SPEED, RunConfig
from pipeline.text.tokenizer import Tokenizer

LIBRARIES = ("torch", "transformers", "tokenizers", "timm", "numpy", "opencv-python-headless")
# Keys of train that change no result; what ``device`` comes to is told apart by itself.
INDIFFERENT = (*SPEED, "device")
# What of ``identity`` may have changed without changing a result, so that a user can say that it has not.
PROGRAM = ("code", "libraries")


def identity(config: RunConfig, corpus: Path, tokenizer: Tokenizer, device: torch.device) -> dict[str, str]:
    """Digests of all that decides a training's result, by name; a state is used only where all of them agree.

    The number of processes is none of them: the studies of a step, their draws and the negatives do not depend on it.
    """
    settings = asdict(config)
    for key in INDIFFERENT:
        del settings["train"][key]
    own = Path(config.text_encoder.name)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        words = _digest(sorted(Path(folder).iterdir()))
    return {
        "parameters": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "studies": _digest([corpus / "studies.parquet"]),
        "translations": _digest(sorted(corpus.glob("translations.parquet"))),
        "prompts": _digest(sorted((corpus / "prompts").glob("*.json"))),
        "tokenizer": words,
        "text encoder": _digest(sorted(p for p in own.iterdir() if p.is_file())) if own.name and own.is_dir() else "",
        "code": code_digest(Path(__file__).parents[1]),
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "device": device.type,
    }


def code_digest(library: Path) -> str:
    """Digest of what computes in the parts of the library that training is made of.

    Of a Python module that is its syntax tree without comments and docstrings, of a data file (YAML, JSON) its bytes.
    Parameters are compared by their values, so the modules that read them are left out.

    Args:
        library: the folder of the package ``pipeline``.
    """
    found = [*library.glob("study*.py")]
    for part in ("storage", "text", "models", "training"):
        found += [p for p in (library / part).rglob("*") if p.suffix in (".py", ".yaml", ".json")]
    digest = hashlib.sha256()
    for file in sorted(found):
        content = _computing(file.read_bytes()) if file.suffix == ".py" else file.read_bytes()
        digest.update(f"{file.relative_to(library).as_posix()} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _computing(source: bytes) -> bytes:
    return ast.dump(_WithoutStrings().visit(ast.parse(source))).encode()


class _WithoutStrings(ast.NodeTransformer):
    """Takes out statements that are a text alone: docstrings."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Keep a statement that does something."""
        text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if text else node


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()
