"""A folder with a model of transformers, read as data: no code of it runs, no hub is asked, no other file is opened.

transformers finds by itself what a folder holds, and keys of its JSON files name code, other models and files. So it
never sees the folder: ``as_data`` makes another one of the files below. The JSON files are written anew with what can
name nothing (numbers) and with the words that are listed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from pipeline.storage.tokenizer_file import LARGEST_TOKENIZER, check_tokenizer
from pipeline.storage.torch_archive import Refused, check_archive

LARGEST_JSON = 16 << 20  # bytes of a JSON file that is read here
MOST_PARTS = 2_000_000  # lists and tables of it; a tokenizer has one for each word, or pair of pieces
LARGEST_NUMBER = 1 << 24  # in a configuration: no vocabulary has as many words, and no model as many layers or pixels
LARGEST_PICTURE = 1 << 10  # pixels of a side that a picture is resized to
MOST_TENSORS = 1 << 12  # of a model; the largest CLIP has 1,300
MOST_NUMBERS = 1 << 30  # of a model whose weights are in no file, 4 GB
TOKENIZER_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
IMAGE_JSON = ("preprocessor_config.json", "processor_config.json")
# Read by parsers of data alone: JSON, lines of text, protobuf.
VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt", "target_vocab.json"),
    *("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm", "target.spm"),
)
# The first that is there is used.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

# Keys that ask for code, for other weights or for another model. Without what they ask for the model is another one,
# so they are refused wherever they say anything; keys that are merely unknown are not passed on.
REFUSED = frozenset(
    (
        *("auto_map", "trust_remote_code", "code_revision", "custom_pipelines", "custom_generate"),
        *("quantization_config", "compression_config", "kernel_config", "fusion_config", "use_kernels"),
        *("transformers_weights", "base_model_name_or_path", "gguf_file", "distributed_config"),
        *("backbone", "use_timm_backbone", "use_pretrained_backbone", "backbone_kwargs"),
    )
)
# Model types of other libraries, whose configuration is a name to be looked up elsewhere.
ELSEWHERE = ("timm_backbone", "timm_wrapper")
# Fields of a configuration that no model has here: a name is made for each label, the others change what is returned.
UNWANTED = ("num_labels", "return_dict", "output_hidden_states", "output_attentions", "chunk_size_feed_forward")
CONFIG_WORDS = ("model_type", "torch_dtype", "tokenizer_class")  # beside the fields of the configuration's class
TOKENIZER_WORDS = (
    *("tokenizer_class", "backend", "padding_side", "truncation_side", "source_lang", "target_lang", "errors"),
    *("model_input_names", "additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
    "model_specific_special_tokens",
)
IMAGE_WORDS = ("image_processor_type", "feature_extractor_type", "data_format", "input_data_format")
# What a word may look like where it names a class of transformers or torch.
NAMES = {
    "tokenizer_class": re.compile(r"[A-Za-z0-9]+Tokenizer(Fast)?|TokenizersBackend|SentencePieceBackend"),
    "image_processor_type": re.compile(r"[A-Za-z0-9]+(ImageProcessor(Fast|Pil)?|FeatureExtractor)"),
    "feature_extractor_type": re.compile(r"[A-Za-z0-9]+FeatureExtractor"),
    "dtype": re.compile(r"b?float(16|32|64)"),
    "torch_dtype": re.compile(r"b?float(16|32|64)"),
}


@contextmanager
def offline() -> Iterator[None]:
    """Within it huggingface_hub and all that use it, transformers, timm and open_clip, send no request."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True  # the environment variable is read once, at import; this is asked each time
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fetched(name: str, weights: bool = False) -> Path:
    """The folder of a model of the params: ``name`` itself if it is one, or else what the hub has of that name.

    Only files that ``as_data`` reads are asked for. If the hub was asked before, no network is needed.

    Raises:
        OSError, ValueError: it is no folder, and the hub has none or cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    files = ["config.json", *TOKENIZER_JSON, *VOCABULARIES]
    folder = Path(snapshot_download(name, allow_patterns=files))
    for weight in WEIGHTS if weights else ():
        shards = ["model-*.safetensors"] if weight.endswith("index.json") else []
        folder = Path(snapshot_download(name, allow_patterns=[*files, weight, *shards]))
        if (folder / weight).is_file():
            break
    return folder


@contextmanager
def one_line(key: str, says: str, advice: str = "", kind: type[ValueError] = Refused) -> Iterator[None]:
    """Within it whatever a library raises that reads a model becomes a ``kind`` of one line.

    The library's own text may quote a file or advise to trust it, so it is left out: the line is ``key`` and the reason
    of a ``Refused``, or else ``key``, ``says``, the error's type and ``advice``.
    """
    try:
        yield
    except Refused as error:
        raise kind(f"{key}{error}") from None
    except BaseException as error:
        # What the tokenizers library raises if it fails within is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{key}{says} ({type(error).__name__}){advice}") from None


@contextmanager
def bounded(most: int, where: object) -> Iterator[None]:
    """Within it no more than ``most`` numbers and ``MOST_TENSORS`` tensors become part of new modules.

    torch tells of a tensor before it is written to, when it has taken addresses but no memory.

    Raises:
        Refused: a model has more. ``where`` is for the message.
    """
    left = [most, MOST_TENSORS]

    def count(_: nn.Module, __: str, tensor: torch.Tensor | None) -> None:
        left[0] -= 0 if tensor is None else tensor.numel()
        left[1] -= 1
        if min(left) < 0:
            raise Refused(f"{where}: states a larger model than can be; its sizes are not those of its weights")

    watches = [
        watch(count)
        for watch in (register_module_parameter_registration_hook, register_module_buffer_registration_hook)
    ]
    try:
        yield
    finally:
        for handle in watches:
            handle.remove()


def check_size(build: Callable[[], Any], most: int, where: object) -> None:
    """Build a model once without memory for its numbers; raises as ``bounded`` and ``build`` do."""
    with torch.device("meta"), bounded(most, where):
        build()


@contextmanager
def as_data(folder: Path, weights: bool = False) -> Iterator[Path]:
    """A temporary folder with what of ``folder`` is data, for transformers to read; offline while it is there.

    Links of the folder are followed, as the hub's cache consists of them; what they lead to is read as data, too.

    Args:
        weights: also the first of ``WEIGHTS``, after a look at it; a model that is made within may be as large as they.

    Raises:
        Refused: a JSON file has a key that asks for code or for another model, or is none, or a model is too large.
    """
    files = _weights(folder) if weights else []
    # Words may be there up to four times before the places that share them do, and a number has two bytes or more.
    most = 2 * sum((folder / file).stat().st_size for file in files if (folder / file).is_file())
    limit = bounded(most, folder / "config.json") if files else nullcontext()
    with offline(), limit, TemporaryDirectory(prefix="model-") as name:
        clean = Path(name)
        keep: dict[str, Callable[[Mapping[str, Any], Path], dict[str, Any]]] = {"config.json": configuration}
        keep |= dict.fromkeys(TOKENIZER_JSON, _tokenizer) | dict.fromkeys(IMAGE_JSON, _image_processor)
        for file, kept in keep.items():
            if (folder / file).is_file():
                table = kept(read_json(folder / file), folder / file)
                (clean / file).write_text(json.dumps(table), encoding="utf-8")
        if (folder / "tokenizer.json").is_file():
            check_tokenizer(json_table(folder / "tokenizer.json", LARGEST_TOKENIZER), folder / "tokenizer.json")
        for file in (*VOCABULARIES, *files):
            if (folder / file).is_file():
                (clean / file).symlink_to((folder / file).resolve())
        yield clean


def read_json(path: Path) -> dict[str, Any]:
    """A table from a JSON file that transformers will read.

    Raises:
        Refused: as ``json_table``, or the table has a key among ``REFUSED``, at any depth.
    """
    found = json_table(path)
    try:
        _refuse(found, path)
    except RecursionError:
        raise Refused(f"{path}: a table within a table too often; refused") from None
    return found


def json_table(path: Path, most: int = LARGEST_JSON) -> dict[str, Any]:
    """A table from a JSON file of ``most`` bytes.

    Raises:
        Refused: it is none or is too large.
    """
    try:
        if path.stat().st_size > most:
            raise Refused(f"{path}: larger than {most >> 20} MB; refused")
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > MOST_PARTS:
            raise Refused(f"{path}: more lists and tables than any model's; refused")
        found = json.loads(text)
    except Refused:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path}: not a table in JSON ({type(error).__name__}); download it again") from None
    if not isinstance(found, dict):
        raise Refused(f"{path}: not a table in JSON; download it again")
    return found


def configuration(table: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Of a model's configuration the fields that the class of its ``model_type`` has, and numbers.

    Args:
        where: for messages.

    Raises:
        Refused: transformers itself has no such ``model_type``, or a key is refused.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    _refuse(table, where)
    kind = table.get("model_type")
    if kind is not None and (not isinstance(kind, str) or kind not in CONFIG_MAPPING or kind in ELSEWHERE):
        raise Refused(f"{where}: model_type: not a model that is part of transformers; no other can be read")
    check_numbers(table, LARGEST_NUMBER, where)
    return _fields(table, CONFIG_MAPPING[kind] if kind else PreTrainedConfig, where)


def numbers_only(value: Any) -> bool:
    """Whether a value of JSON consists of numbers, true, false and null, which cannot name anything."""
    if isinstance(value, Mapping):
        return all(map(numbers_only, value.values()))
    return all(map(numbers_only, value)) if isinstance(value, list) else not isinstance(value, str)


def _fields(table: Mapping[str, Any], kind: type, where: object) -> dict[str, Any]:
    parts = getattr(kind, "sub_configs", {})
    own = {*CONFIG_WORDS, *(field.name for field in fields(kind))}
    kept = _kept(table, own.__contains__, where)
    for key in UNWANTED:
        kept.pop(key, None)
    for key, value in table.items():
        # Old files of CLIP have text_config_dict beside text_config.
        if isinstance(value, Mapping) and (part := parts.get(key.removesuffix("_dict"))):
            at = f"{where}: {key}"
            kept[key] = configuration(value, at) if part.__name__ == "AutoConfig" else _fields(value, part, at)
    return kept


def _tokenizer(table: Mapping[str, Any], where: object) -> dict[str, Any]:
    return _kept(table, lambda key: key in TOKENIZER_WORDS or key.endswith("_token"), where)


def _image_processor(table: Mapping[str, Any], where: object) -> dict[str, Any]:
    for key in ("size", "crop_size", "pad_size"):
        check_numbers(table.get(key), LARGEST_PICTURE, f"{where}: {key}")
    kept = _kept(table, IMAGE_WORDS.__contains__, where)
    if isinstance(name := kept.get("image_processor_type"), str):  # which until 2023 was called otherwise
        kept["image_processor_type"] = name.replace("FeatureExtractor", "ImageProcessor")
    if isinstance(table.get("image_processor"), Mapping):
        kept["image_processor"] = _kept(table["image_processor"], IMAGE_WORDS.__contains__, where)
    return kept


def _kept(table: Mapping[str, Any], word: Callable[[str], bool], where: object) -> dict[str, Any]:
    for key, form in NAMES.items():
        if isinstance(table.get(key), str) and not form.fullmatch(table[key]):
            raise Refused(f"{where}: {key}: not the name of anything that may be there; refused")
    return {key: value for key, value in table.items() if word(key) or numbers_only(value)}


def check_numbers(value: Any, most: int, where: object) -> None:
    """Raise ``Refused`` if a number in a value of JSON is above ``most``."""
    for part in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        check_numbers(part, most, where)
    if isinstance(value, int | float) and value > most:
        raise Refused(f"{where}: has a number above {most}; no model of this size can be read")


def _refuse(table: Any, where: object) -> None:
    for key, value in table.items() if isinstance(table, Mapping) else enumerate(table):
        if key in REFUSED and value:
            raise Refused(f"{where}: {key}: asks for code, weights or a model from elsewhere; refused")
        if isinstance(value, Mapping | list):
            _refuse(value, f"{where}: {key}" if re.fullmatch(r"\w{1,40}", str(key)) else where)


def _weights(folder: Path) -> list[str]:
    """Names of the files that hold the weights; none if there are none."""
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first == "pytorch_model.bin":
        check_archive(folder / first)
    if first != "model.safetensors.index.json":
        return [first] if first else []
    parts = read_json(folder / first).get("weight_map")
    names = sorted(set(map(str, parts.values()))) if isinstance(parts, Mapping) else []
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.safetensors", name):
            raise Refused(f"{folder / first}: weight_map: names what is no .safetensors file of the folder; refused")
    return [first, *names]
