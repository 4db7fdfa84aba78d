"""params.yaml as typed, frozen, validated records; an unknown or ill-typed key is one clear error that names it."""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

LABEL_DATASETS = ("chexpert", "chestxray14")  # captions come from their labels through prompts
PRETRAIN_DATASETS = ("mimic_cxr", *LABEL_DATASETS)
DATASETS = (*PRETRAIN_DATASETS, "vindr_cxr", "rsna", "siim", "openi")

T = TypeVar("T")


class ParamsError(ValueError):
    """A key of params.yaml that cannot be used; the message is one line that names it."""


@dataclass(frozen=True)
class Source:
    """An archive on disk. ``stamp`` is a small file DVC watches in the archive's stead."""

    path: str
    stamp: str
    reports: str = ""  # MIMIC-CXR: root of the report tree where it is not the image root
    list_5x200: str = ""  # CheXpert: chexpert_5x200.csv where it is not in the archive


@dataclass(frozen=True)
class Phantom:
    """Synthetic archives to draw: archive -> number of studies."""

    archives: dict[str, int]
    size: int = 256


@dataclass(frozen=True)
class Ingest:
    """How archives become shards."""

    short_side: int = 512
    jpeg_quality: int = 95
    shard_size: int = 512
    workers: int = 0
    labels_only: bool = False
    max_rejected: float = 0.05


@dataclass(frozen=True)
class Prompts:
    """The file of training templates."""

    file: str


@dataclass(frozen=True)
class Sampling:
    """What one draw from a study is (paper section 3.1)."""

    unit: Literal["study", "image"] = "study"
    negatives: int = 3


@dataclass(frozen=True)
class Augment:
    """Image and text augmentation (paper section 4.2)."""

    image: bool = True
    crop_scale: tuple[float, float] = (0.8, 1.1)
    clahe: float = 0.5
    brightness: float = 0.1
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.1
    text: bool = True


@dataclass(frozen=True)
class ImageEncoder:
    """A timm model: its name, whether hub weights are loaded, its input statistics and extra arguments."""

    name: str
    pretrained: bool = True
    normalise: Literal["imagenet", "half"] = "imagenet"
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TextEncoder:
    """A BERT: by hub name or local folder, or (``name`` empty) a small one with a tokenizer trained on the corpus."""

    name: str = ""
    vocabulary: int = 2000
    args: dict[str, Any] = field(default_factory=dict)
    max_tokens: int = 256


@dataclass(frozen=True)
class Model:
    """Both encoders and the shared space."""

    image_encoders: dict[str, ImageEncoder]
    text_encoder: TextEncoder
    dim: int = 512
    scale: float = 1 / 0.07
    image_size: int = 224


@dataclass(frozen=True)
class Loss:
    """MVS + icl_weight * ICL + tcl_weight * TCL (paper section 3.3)."""

    mvs: bool = True
    icl_weight: float = 1.0
    tcl_weight: float = 0.5
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class Train:
    """Optimisation (paper section 4.2)."""

    launcher: str = "python"
    epochs: int = 15
    batch_size: int = 128
    lr: float = 5e-5
    weight_decay: float = 1e-4
    warmup_epochs: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    workers: int = 0
    shuffle_pairs: bool = False


@dataclass(frozen=True)
class Run:
    """One training: what it uses, and the keys it sets otherwise than the sections do."""

    image_encoder: str
    datasets: tuple[str, ...]
    sampling: dict[str, Any] = field(default_factory=dict)
    augment: dict[str, Any] = field(default_factory=dict)
    loss: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FewShot:
    """Linear probe: shares of the training set by label, and the recipe."""

    shares: dict[str, float]
    epochs: dict[str, int]
    lr: float = 5e-5
    weight_decay: float = 1e-4
    batch_size: int = 256
    draws: int = 30


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of the test set and the confidence of the interval."""

    samples: int = 1000
    confidence: float = 0.95


@dataclass(frozen=True)
class Retrieval:
    """The K of R@K."""

    k: tuple[int, ...] = (1, 5, 10)


@dataclass(frozen=True)
class Evaluate:
    """Everything after training."""

    zero_shot: str
    few_shot: FewShot
    bootstrap: Bootstrap = Bootstrap()
    retrieval: Retrieval = Retrieval()
    batch_size: int = 256


@dataclass(frozen=True)
class Report:
    """What the page may show."""

    show_patient_data: bool = False


@dataclass(frozen=True)
class Tracking:
    """MLflow."""

    enabled: bool = True


@dataclass(frozen=True)
class Params:
    """The whole of params.yaml."""

    seed: int
    sources: dict[str, Source]
    phantom: Phantom
    ingest: Ingest
    prompts: Prompts
    sampling: Sampling
    augment: Augment
    model: Model
    loss: Loss
    train: Train
    runs: dict[str, Run]
    main: tuple[str, ...]
    ablations: tuple[str, ...]
    control: str
    evaluate: Evaluate
    report: Report = Report()
    tracking: Tracking = Tracking()


@dataclass(frozen=True)
class RunConfig:
    """A run with every override applied: all that its training depends on, and nothing else."""

    name: str
    seed: int
    datasets: tuple[str, ...]
    image_encoder: ImageEncoder
    text_encoder: TextEncoder
    dim: int
    scale: float
    image_size: int
    sampling: Sampling
    augment: Augment
    loss: Loss
    train: Train


def load(path: Path = Path("params.yaml")) -> Params:
    """Read and validate params.yaml.

    Raises:
        ParamsError: one line naming the key, what is wrong with it and what is accepted.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: not found; run from the repository root or copy profiles/demo.yaml to it") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise ParamsError(f"{path}: line {line}: not valid YAML") from None
    try:
        params = read_record(Params, raw)
        _check(params)
    except ParamsError as error:
        raise ParamsError(f"{path}: {error}") from None
    return params


def run_config(params: Params, name: str) -> RunConfig:
    """The effective parameters of one run: the sections, overlaid by the run's own keys."""
    if name not in params.runs:
        raise ParamsError(f"runs.{name}: no such run; runs are {', '.join(params.runs) or 'none'}")
    run = params.runs[name]
    overlaid: dict[str, Any] = {}
    for section, cls in (("sampling", Sampling), ("augment", Augment), ("loss", Loss), ("train", Train)):
        values = {**asdict(getattr(params, section)), **getattr(run, section)}
        overlaid[section] = read_record(cls, values, f"runs.{name}.{section}")
    if run.image_encoder not in params.model.image_encoders:
        known = ", ".join(params.model.image_encoders)
        raise ParamsError(f"runs.{name}.image_encoder: {run.image_encoder!r} is none of model.image_encoders ({known})")
    return RunConfig(
        name=name,
        seed=params.seed,
        datasets=run.datasets,
        image_encoder=params.model.image_encoders[run.image_encoder],
        text_encoder=params.model.text_encoder,
        dim=params.model.dim,
        scale=params.model.scale,
        image_size=params.model.image_size,
        **overlaid,
    )


def write_run_config(path: Path, config: RunConfig) -> None:
    """Write a run's effective parameters as JSON, keys in a fixed order."""
    path.write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")


def read_run_config(path: Path) -> RunConfig:
    """Inverse of ``write_run_config``."""
    return read_record(RunConfig, json.loads(path.read_text(encoding="utf-8")))


def _check(params: Params) -> None:
    """What types alone cannot say."""
    _known("sources", params.sources, DATASETS)
    _known("phantom.archives", params.phantom.archives, DATASETS)
    for name, run in params.runs.items():
        if "-" in name:
            raise ParamsError(f"runs.{name}: no '-' in a run's name (DVC joins stage names with it)")
        _known(f"runs.{name}.datasets", run.datasets, PRETRAIN_DATASETS)
        for dataset in run.datasets:
            if dataset not in params.sources:
                raise ParamsError(
                    f"runs.{name}.datasets: {dataset} is not among sources; add it there or leave out the run"
                )
        run_config(params, name)
    for key, names in (("main", params.main), ("ablations", params.ablations), ("control", (params.control,))):
        for name in names:
            if name and name not in params.runs:
                raise ParamsError(f"{key}: {name!r} is not among runs")
    few_shot = params.evaluate.few_shot
    if few_shot.shares.keys() != few_shot.epochs.keys():
        raise ParamsError("evaluate.few_shot: shares and epochs name different subsets")
    bounds: list[tuple[str, float, float, float]] = [
        ("ingest.max_rejected", params.ingest.max_rejected, 0, 1),
        ("ingest.short_side", params.ingest.short_side, 16, 1 << 14),
        ("ingest.jpeg_quality", params.ingest.jpeg_quality, 1, 100),
        ("ingest.shard_size", params.ingest.shard_size, 1, 1 << 20),
        ("train.epochs", params.train.epochs, 1, 1 << 20),
        ("train.batch_size", params.train.batch_size, 2, 1 << 20),
        ("sampling.negatives", params.sampling.negatives, 1, 14),  # a study without any positive must say something
        ("augment.clahe", params.augment.clahe, 0, 1),
        ("loss.label_smoothing", params.loss.label_smoothing, 0, 1),
        ("evaluate.bootstrap.confidence", params.evaluate.bootstrap.confidence, 0, 1),
        *((f"evaluate.few_shot.shares.{k}", v, 0, 1) for k, v in few_shot.shares.items()),
    ]
    for key, value, low, high in bounds:
        if not low <= value <= high:
            raise ParamsError(f"{key}: {value} is outside [{low}, {high}]")


def _known(key: str, names: typing.Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ParamsError(f"{key}.{name}: unknown data set; known are {', '.join(known)}{_hint(name, known)}")


def _hint(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def read_record(cls: type[T], raw: Any, at: str = "") -> T:
    """Build the dataclass ``cls`` from plain YAML/JSON data, checking every key and type on the way down.

    Raises:
        ParamsError: unknown key, missing key or a value of another type, with its dotted path.
    """
    if not isinstance(raw, Mapping):
        raise ParamsError(f"{at or 'the file'}: expected a mapping of keys, got {_show(raw)}")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    prefix = f"{at}." if at else ""
    for key in raw:
        if key not in known:
            raise ParamsError(f"{prefix}{key}: unknown key{_hint(str(key), known)}")
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
