"""A run with every override of params.yaml applied: what its training depends on, as a record and as run.json."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.config.params import Augment, ImageEncoder, Loss, MixedModel, Params, Sampling, TextEncoder, Train
from pipeline.config.records import (
    RECORD,
    Name,
    NameOrNone,
    Names,
    ParamsError,
    Pixels,
    Positive,
    Share,
    Weight,
    Whole,
    read_record,
)
from pipeline.datasets import datasets_of, facts

SPEED = ("launcher", "workers", "save_minutes", "timeout_minutes")  # of Train: they change no result

# What of ``Loss`` a mixed run has no use for, as it is then written to its run.json.
NOT_MIXED: dict[str, Any] = {
    **{"mvs": False, "mvs_weight": 0.0, "icl_weight": 0.0, "tcl_weight": 0.0, "nn_weight": 0.0},
    **{"simsiam_weight": 0.0, "label_positives": False},
}


@dataclass(frozen=True, config=RECORD)
class Roles:
    """What a mixed run takes from its sources: pairs, images alone, texts alone."""

    paired: Names = ()
    images: Names = ()
    texts: Names = ()
    paired_fraction: Share = 1.0


@dataclass(frozen=True, config=RECORD)
class RunConfig:
    """A run with every override applied: all that its training depends on, and nothing else.

    A mixed run has ``roles`` and ``mixed``, any other one an ``image_encoder``. ``captioned``: those of its data sets
    whose labels become captions; ``random_negatives``: those that name ``sampling.negatives`` negative classes only.
    """

    name: NameOrNone
    seed: Annotated[Whole, Field(ge=0)]  # of params.yaml, and one of its seeds added
    datasets: tuple[Name, ...]
    image_encoder: ImageEncoder | None
    text_encoder: TextEncoder
    dim: Positive
    temperature: Weight
    image_size: Pixels
    sampling: Sampling
    augment: Augment
    loss: Loss
    train: Train
    roles: Roles | None = None
    mixed: MixedModel | None = None
    captioned: tuple[Name, ...] = ()
    random_negatives: tuple[Name, ...] = ()

    @property
    def aligned(self) -> bool:
        """Whether training brings images and texts together, without which there is no zero-shot and no retrieval."""
        return self.roles is None or bool(
            self.loss.alignment_weight and self.roles.paired and self.roles.paired_fraction
        )


def run_config(params: Params, name: str, seed: int = 0) -> RunConfig:
    """The effective parameters of one run: the sections, overlaid by the run's own keys; ``seed`` is one of seeds."""
    if name not in params.runs:
        raise ParamsError(f"runs.{name}: no such run; runs are {', '.join(params.runs) or 'none'}")
    run, table = params.runs[name], datasets_of(params.sources)
    overlaid: dict[str, Any] = {}
    wrong: list[str] = []
    for section, cls in (("sampling", Sampling), ("augment", Augment), ("loss", Loss), ("train", Train)):
        unused = NOT_MIXED if run.mixed and section == "loss" else {}
        values = {**asdict(getattr(params, section)), **unused, **getattr(run, section)}
        try:
            overlaid[section] = read_record(cls, values, f"runs.{name}.{section}")
        except ParamsError as error:
            wrong += error.lines
    if not run.mixed and run.image_encoder not in params.model.image_encoders:
        known = ", ".join(params.model.image_encoders)
        wrong.append(f"runs.{name}.image_encoder: {run.image_encoder!r} is none of model.image_encoders ({known})")
    if wrong:
        raise ParamsError(*wrong)
    return RunConfig(
        name=name,
        seed=params.seed + seed,
        datasets=run.datasets,
        image_encoder=None if run.mixed else params.model.image_encoders[run.image_encoder],
        text_encoder=params.model.text_encoder,
        dim=params.model.dim,
        temperature=params.model.temperature,
        image_size=params.model.image_size,
        roles=Roles(run.paired, run.images, run.texts, run.paired_fraction) if run.mixed else None,
        mixed=params.model.mixed if run.mixed else None,
        captioned=tuple(d for d in run.datasets if facts(d, table).captioned),
        random_negatives=tuple(d for d in run.datasets if facts(d, table).random_negatives),
        **overlaid,
    )


def without_speed(config: RunConfig) -> RunConfig:
    """A run with the keys of ``SPEED`` at their defaults, so that none of them makes anything train again."""
    return replace(config, train=replace(config.train, **{key: getattr(Train(), key) for key in SPEED}))


def speed(params: Params, name: str) -> dict[str, Any]:
    """The keys of ``SPEED`` of one run."""
    common = {
        "launcher": params.train.launcher,
        "workers": params.train.workers,
        "save_minutes": params.train.save_minutes,
        "timeout_minutes": params.train.timeout_minutes,
    }
    return common | {key: value for key, value in params.runs[name].train.items() if key in SPEED}


def write_run_config(path: Path, config: RunConfig) -> None:
    """Write a run's effective parameters as JSON, keys in a fixed order."""
    path.write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")


def read_run_config(path: Path) -> RunConfig:
    """Inverse of ``write_run_config``."""
    return read_record(RunConfig, json.loads(path.read_text(encoding="utf-8")))
