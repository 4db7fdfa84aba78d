"""What the types of params.yaml's keys cannot say: which names must be known, which values go together."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pipeline.config.params import (
    ADAPTERS,
    BY_PATIENT,
    DATASETS,
    MANIFEST,
    OFFICIAL,
    PRETRAIN_DATASETS,
    READ_AGAIN,
    REPORT_DATASETS,
    MixedModel,
    Params,
    Run,
)
from pipeline.config.records import ParamsError, hint
from pipeline.config.run_config import NOT_MIXED, RunConfig, run_config


def check(params: Params) -> None:
    """Hold the keys of params.yaml against one another.

    Raises:
        ParamsError: one line that names a key, what is wrong with it and what is accepted.
    """
    for name, source in params.sources.items():
        if source.reader == MANIFEST:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ParamsError(f"sources.{name}: a data set's name is small letters, digits and _")
            if not source.manifest:
                raise ParamsError(f"sources.{name}.manifest: missing; the CSV or Parquet file that lists the images")
            continue
        _known("sources", [name], (*DATASETS, *READ_AGAIN))
        reader, split = READ_AGAIN.get(name, (name, source.split))
        if source.reader != reader:
            raise ParamsError(f"sources.{name}.reader: {source.reader!r} is neither {reader} nor {MANIFEST}")
        if source.split != "paper" and reader not in ("chestxray14", "rsna", "openi"):
            raise ParamsError(f"sources.{name}.split: only chestxray14, rsna and openi can be split by patient")
        if source.split == "official" and reader != "chestxray14":
            raise ParamsError(f"sources.{name}.split: only chestxray14 has official lists")
        if source.split != split:
            raise ParamsError(f"sources.{name}.split: {source.split}, but it is the data set of split: {split}")
    _known("phantom.archives", params.phantom.archives, DATASETS)
    _check_warmup("", params)
    own = tuple(key for key, source in params.sources.items() if source.reader == MANIFEST)
    reports = (*REPORT_DATASETS, *own)
    everything = tuple(dict.fromkeys((*PRETRAIN_DATASETS, *DATASETS, *own)))
    accept = {"paired": reports, "images": everything, "texts": reports}
    only_test = [d for d, source in params.sources.items() if source.reader == "openi" and source.split == "paper"]
    for name, run in params.runs.items():
        if "-" in name:
            raise ParamsError(f"runs.{name}: no '-' in a run's name (DVC joins stage names with it)")
        _check_kind(name, run)
        for key, accepted in (accept if run.mixed else {"datasets": (*PRETRAIN_DATASETS, *own)}).items():
            _known(f"runs.{name}.{key}", getattr(run, key), accepted)
            for dataset in getattr(run, key):
                if dataset not in params.sources:
                    raise ParamsError(
                        f"runs.{name}.{key}: {dataset} is not among sources; add it there or leave out the run"
                    )
                if dataset in only_test:
                    raise ParamsError(
                        f"runs.{name}.{key}: {dataset} is a test set, it has no training split; take {BY_PATIENT} or "
                        f"set sources.{dataset}.split: patient"
                    )
        config = run_config(params, name)
        _check_warmup(f"runs.{name}.", config)
        if config.mixed:
            _check_mixed(name, run, config, config.mixed)
        else:
            _check_loss(name, config)
    for name, other in params.others.items():
        if name in params.runs:
            raise ParamsError(f"others.{name}: a run has this name, too")
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise ParamsError(f"others.{name}: a name is letters, digits and _")
        if other.adapter not in ADAPTERS:
            known = ", ".join(ADAPTERS)
            raise ParamsError(
                f"others.{name}.adapter: {other.adapter!r} is none of {known}{hint(other.adapter, ADAPTERS)}"
            )
        _known(f"others.{name}.trained_on", other.trained_on, (*DATASETS, *READ_AGAIN, *own))
    for key, names in (
        ("main", params.main),
        ("ablations", params.ablations),
        ("prompt_ablations", params.prompt_ablations),
        ("compositions", params.compositions),
        ("control", (params.control,)),
    ):
        for name in names:
            if name and name not in params.runs:
                raise ParamsError(f"{key}: {name!r} is not among runs")
            if name and key != "compositions" and not run_config(params, name).aligned:
                raise ParamsError(
                    f"{key}: {name} never aligns a pair (paired, loss.alignment_weight), so it has no zero-shot and no "
                    "retrieval; name it in compositions instead"
                )
    words = params.back_translation
    if bool(words.forward) != bool(words.back):
        lacks = "back" if words.forward else "forward"
        raise ParamsError(f"back_translation.{lacks}: missing; name the models of both directions, or none")
    if words.temperature <= 0:
        raise ParamsError(f"back_translation.temperature: {words.temperature} is not above 0")
    if not params.evaluate.protocols:
        raise ParamsError("evaluate.protocols: an empty list; name at least one protocol, such as paper")
    few_shot = params.evaluate.few_shot
    tune = few_shot.fine_tune
    if few_shot.shares.keys() != few_shot.epochs.keys():
        raise ParamsError("evaluate.few_shot: shares and epochs name different subsets")
    if tune.shares.keys() != tune.epochs.keys():
        raise ParamsError("evaluate.few_shot.fine_tune: shares and epochs name different subsets")
    if both := sorted(few_shot.shares.keys() & tune.shares.keys()):
        raise ParamsError(f"evaluate.few_shot.fine_tune.shares.{both[0]}: the linear probe has a share of this name")
    for key, seeds in (("seeds", params.seeds), ("evaluate.few_shot.seeds", few_shot.seeds)):
        if not seeds or len(set(seeds)) < len(seeds):
            raise ParamsError(f"{key}: expected at least one, each once")
    official = params.evaluate.official
    for name in official.runs:
        if name not in params.runs:
            raise ParamsError(f"evaluate.official.runs: {name!r} is not among runs")
    if official.runs and OFFICIAL not in params.sources:
        raise ParamsError(f"evaluate.official.runs: {OFFICIAL} is not among sources; add it there or name no run")
    for share in official.shares:
        if share not in (known_shares := (*few_shot.shares, *tune.shares)):
            raise ParamsError(
                f"evaluate.official.shares: {share!r} is none of evaluate.few_shot's ({', '.join(known_shares)})"
            )
    for name in params.evaluate.regeneration.runs:
        if name not in params.runs:
            raise ParamsError(f"evaluate.regeneration.runs: {name!r} is not among runs")
        if params.runs[name].image_encoder:
            raise ParamsError(f"evaluate.regeneration.runs: {name} is no mixed run and regenerates nothing")
    for ratio in params.evaluate.regeneration.ratios:
        if not 0 < ratio < 1 or abs(100 * ratio - round(100 * ratio)) > 1e-6:
            raise ParamsError(f"evaluate.regeneration.ratios: {ratio} is no whole percentage within (0, 1)")
    if len(set(params.evaluate.regeneration.ratios)) < len(params.evaluate.regeneration.ratios):
        raise ParamsError("evaluate.regeneration.ratios: expected each once")
    for name in tune.runs:
        if name not in params.main:
            raise ParamsError(f"evaluate.few_shot.fine_tune.runs: {name!r} is not in main")


def _check_warmup(where: str, config: Params | RunConfig) -> None:
    if config.train.warmup_epochs > config.train.epochs:
        raise ParamsError(
            f"{where}train.warmup_epochs: {config.train.warmup_epochs} is outside [0, {config.train.epochs}]"
        )


def _check_kind(name: str, run: Run) -> None:
    """A run names sources by role, or data sets and an image encoder."""
    at = f"runs.{name}"
    if not run.mixed:
        if not (run.image_encoder or run.datasets):
            raise ParamsError(f"{at}: no source in any role; name paired, images or texts, or datasets")
        for key in ("image_encoder", "datasets"):
            if not getattr(run, key):
                raise ParamsError(f"{at}.{key}: missing")
        return
    sources = (*run.paired, *run.images, *run.texts)
    if run.image_encoder or run.datasets != sources:
        raise ParamsError(
            f"{at}: a mixed run (paired, images, texts) has no image_encoder and no datasets of its own; leave them out"
        )
    if twice := [d for d in sources if sources.count(d) > 1]:
        raise ParamsError(f"{at}: {twice[0]} stands in two roles; paired_fraction 0 parts images from texts")


def _check_mixed(name: str, run: Run, config: RunConfig, shape: MixedModel) -> None:
    at, loss, train = f"runs.{name}", config.loss, config.train
    cell = shape.patch * 2 ** (shape.scales - 1)
    if not 0 < shape.mask_ratio < 1:
        raise ParamsError(f"model.mixed.mask_ratio: {shape.mask_ratio} is outside (0, 1)")
    if config.image_size % cell or config.image_size < 2 * cell:
        raise ParamsError(
            f"model.mixed: model.image_size {config.image_size} is not two or more cells of patch * 2^(scales-1) = "
            f"{cell} pixels; change patch or scales"
        )
    if shape.width % shape.heads or shape.width % 4:
        raise ParamsError(f"model.mixed.width: {shape.width} does not divide by heads ({shape.heads}) and by 4")
    if unused := sorted(run.loss.keys() & NOT_MIXED.keys()):
        raise ParamsError(f"{at}.loss.{unused[0]}: no term of mixed runs; leave it out")
    if not (loss.regeneration_weight or loss.mlm_weight or loss.alignment_weight):
        raise ParamsError(f"{at}.loss: regeneration_weight, mlm_weight and alignment_weight are all 0")
    if loss.alignment_weight and not config.aligned:
        raise ParamsError(f"{at}.loss.alignment_weight: no pair is left (paired, paired_fraction); set 0")
    for images, what, weight in (
        (True, "regeneration_weight", loss.regeneration_weight),
        (False, "mlm_weight", loss.mlm_weight),
    ):
        if weight and not (run.paired or (run.images if images else run.texts)):
            raise ParamsError(f"{at}.loss.{what}: no source has {'images' if images else 'texts'}; set 0")
    if train.micro_batch:
        raise ParamsError(f"{at}.train.micro_batch: {train.micro_batch}; a mixed run is trained in one pass, set 0")
    if train.shuffle_pairs:
        raise ParamsError(f"{at}.train.shuffle_pairs: not for mixed runs; set false")


def _check_loss(name: str, config: RunConfig) -> None:
    loss, at = config.loss, f"runs.{name}.loss"
    for key in ("regeneration_weight", "alignment_weight"):
        if getattr(loss, key):
            raise ParamsError(f"{at}.{key}: a term of mixed runs alone; set 0")
    if not (loss.mvs_weight or loss.icl_weight or loss.tcl_weight):
        raise ParamsError(f"{at}: mvs_weight, icl_weight and tcl_weight are all 0; validation needs one of them")
    if not loss.scale_limits[0] < loss.scale_limits[1]:
        raise ParamsError(f"{at}.scale_limits: {list(loss.scale_limits)} is no lower and upper bound")
    if loss.label_positives and set(config.datasets) <= set(REPORT_DATASETS):
        raise ParamsError(f"{at}.label_positives: none of the run's data sets has labels; set false")
    if loss.label_positives and config.train.shuffle_pairs:
        raise ParamsError(f"{at}.label_positives: train.shuffle_pairs parts texts from labels; set one of them false")


def _known(key: str, names: Iterable[str], known: tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ParamsError(f"{key}.{name}: unknown data set; known are {', '.join(known)}{hint(name, known)}")
