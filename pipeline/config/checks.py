"""What the types of params.yaml's keys cannot say: which names must be known, which values go together."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from pipeline.config.archive_params import About, Source
from pipeline.config.params import ADAPTERS, Evaluate, MixedModel, Params, Run
from pipeline.config.places import check_places
from pipeline.config.records import ParamsError, hint, shown
from pipeline.config.run_config import NOT_MIXED, RunConfig, run_config
from pipeline.datasets import MANIFEST, Table, archives, datasets_of, facts, known_datasets, used_for

STAMPS = Path("data/fingerprints")  # of the stamps that ``stages.fingerprint`` writes
PHANTOMS = Path("data/phantom")  # whose stamps the stage phantom writes


def check(params: Params) -> None:
    """Hold the keys of params.yaml against one another.

    Raises:
        ParamsError: a line for each thing that is wrong: a key, what is wrong with it and what is accepted.
    """
    table = datasets_of(params.sources)
    found = [
        *_same_but_for_case(params),
        *check_places(params),
        *_sources(params, table),
        *_known("phantom.archives", params.phantom.archives, archives()),
        *_warmup("", params),
        *(line for name, run in params.runs.items() for line in _run(params, table, name, run)),
        *_others(params, table),
        *_rows(params),
        *_encoders(params),
        *_texts(params),
        *_evaluate(params, table),
    ]
    if found:
        raise ParamsError(*dict.fromkeys(found))


def check_stamps(sources: Mapping[str, Source]) -> None:
    """Whether every stamp is there that no stage of the graph makes; DVC only says that a file is missing.

    Raises:
        ParamsError: a line for each that is not, with the command that writes it.
    """
    lost = []
    for name, source in sources.items():
        stamp = Path(source.stamp)
        if PHANTOMS in stamp.parents or stamp.is_file():
            continue
        own = "" if stamp.parent == STAMPS else f"set {STAMPS / name}.json, and "
        lost.append(f"sources.{name}.stamp: {stamp} not found; {own}run: python -m stages.fingerprint")
    if lost:
        raise ParamsError(*lost)


def _same_but_for_case(params: Params) -> Iterator[str]:
    """Names that a file system which knows no capitals would take for one."""
    few_shot = params.evaluate.few_shot
    for key, names in (
        ("sources", params.sources),
        ("runs and others", {**params.runs, **params.others}),
        ("evaluate.few_shot.shares", {**few_shot.shares, **few_shot.fine_tune.shares}),
    ):
        first: dict[str, str] = {}
        for name in names:
            if (same := first.setdefault(name.lower(), name)) != name:
                yield f"{key}: {same} and {name} differ in capitals alone; rename one"


def _sources(params: Params, table: Table) -> Iterator[str]:
    for name, source in params.sources.items():
        at = f"sources.{name}"
        if source.reader == MANIFEST:
            if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                yield f"{at}: a data set's name is small letters, digits and _"
            if not source.manifest:
                yield f"{at}.manifest: missing; the CSV or Parquet file that lists the images"
            yield from _about(at, source.about, name in known_datasets())
            continue
        if source.about != About():
            yield f"{at}.about: only of a data set of your own (reader: {MANIFEST})"
        if name not in known_datasets():
            yield from _known("sources", [name], known_datasets())
            continue
        known = table[name]
        if source.reader != known.reader:
            yield f"{at}.reader: {source.reader!r} is neither {known.reader} nor {MANIFEST}"
        elif source.split in known.splits:
            continue
        elif known.archive:
            yield f"{at}.split: {source.split}, but it is the data set of split: {known.splits[0]}"
        else:
            others = ", ".join(d for d in archives(table) if source.split in table[d].splits)
            yield f"{at}.split: {source.split!r} is none of {', '.join(known.splits)}; {others} can be split so"


def _about(at: str, about: About, known: bool) -> Iterator[str]:
    if known and about != About():
        yield f"{at}.about: the facts of this data set are known; name the source otherwise to describe your own"
    if "classification" in about.tests and not about.classes:
        yield f"{at}.about.classes: missing; the classes of the labels that classification asks for"
    for cls in about.classes:
        if not cls.strip() or not cls.isprintable() or "{" in cls or "}" in cls:
            yield f"{at}.about.classes: {shown(cls)}: not a name; expected words without braces"


def _run(params: Params, table: Table, name: str, run: Run) -> Iterator[str]:
    at = f"runs.{name}"
    yield from _kind(name, run)
    own = tuple(d for d in table if table[d].reader == MANIFEST)
    reports = tuple(d for d in table if table[d].captions == "reports" or d in own)
    training = (*used_for("pretraining", table), *own)
    accept = {"paired": reports, "images": tuple(table), "texts": reports} if run.mixed else {"datasets": training}
    for key, accepted in accept.items():
        if lost := [d for d in getattr(run, key) if d in accepted and d not in params.sources]:
            are, them = ("is", "it") if len(lost) == 1 else ("are", "them")
            yield f"{at}.{key}: {', '.join(lost)} {are} not among sources; add {them} there or leave out the run"
        for dataset in getattr(run, key):
            if dataset not in accepted:
                yield from _known(f"{at}.{key}", [dataset], accepted)
            elif dataset in params.sources and params.sources[dataset].split in table[dataset].all_test:
                again = [d for d in table if table[d].archive == dataset]
                other = next(s for s in table[dataset].splits if s not in table[dataset].all_test)
                yield (
                    f"{at}.{key}: {dataset} is a test set, it has no training split; take {' or '.join(again)} or "
                    f"set sources.{dataset}.split: {other}"
                )
    if not (run.mixed or run.image_encoder):
        return  # said above
    try:
        config = run_config(params, name)
    except ParamsError as error:
        yield from error.lines
        return
    if run.train.keys() & {"epochs", "warmup_epochs"}:  # else the section's line says it
        yield from _warmup(f"{at}.", config)
    yield from _mixed(name, run, config, config.mixed) if config.mixed else _loss(name, config, table)


def _warmup(where: str, config: Params | RunConfig) -> Iterator[str]:
    if config.train.warmup_epochs > config.train.epochs:
        yield f"{where}train.warmup_epochs: {config.train.warmup_epochs} is outside [0, {config.train.epochs}]"


def _kind(name: str, run: Run) -> Iterator[str]:
    """A run names sources by role, or data sets and an image encoder."""
    at = f"runs.{name}"
    if not run.mixed:
        if not (run.image_encoder or run.datasets):
            yield f"{at}: no source in any role; name paired, images or texts, or datasets"
            return
        yield from (f"{at}.{key}: missing" for key in ("image_encoder", "datasets") if not getattr(run, key))
        return
    sources = (*run.paired, *run.images, *run.texts)
    if run.image_encoder or run.datasets != sources:
        yield (
            f"{at}: a mixed run (paired, images, texts) has no image_encoder and no datasets of its own; leave them out"
        )
    if twice := [d for d in sources if sources.count(d) > 1]:
        yield f"{at}: {twice[0]} is in two roles; paired_fraction 0 parts images from texts"


def _mixed(name: str, run: Run, config: RunConfig, shape: MixedModel) -> Iterator[str]:
    at, loss, train = f"runs.{name}", config.loss, config.train
    cell = shape.patch * 2 ** (shape.scales - 1)
    if config.image_size % cell or config.image_size < 2 * cell:
        yield (
            f"model.mixed: model.image_size {config.image_size} is not two or more cells of patch * 2^(scales-1) = "
            f"{cell} pixels; change patch or scales"
        )
    if shape.width % shape.heads or shape.width % 4:
        yield f"model.mixed.width: {shape.width} does not divide by heads ({shape.heads}) and by 4"
    yield from (f"{at}.loss.{key}: no term of mixed runs; leave it out" for key in run.loss if key in NOT_MIXED)
    if not (loss.regeneration_weight or loss.mlm_weight or loss.alignment_weight):
        yield f"{at}.loss: regeneration_weight, mlm_weight and alignment_weight are all 0"
    if loss.alignment_weight and not config.aligned:
        yield f"{at}.loss.alignment_weight: no pair is left (paired, paired_fraction); set 0"
    for lone, what, weight in (
        ("images", "regeneration_weight", loss.regeneration_weight),
        ("texts", "mlm_weight", loss.mlm_weight),
    ):
        if weight and not (run.paired or getattr(run, lone)):
            yield f"{at}.loss.{what}: no source has {lone}; set 0"
    if train.micro_batch:
        yield f"{at}.train.micro_batch: {train.micro_batch}; a mixed run is trained in one pass, set 0"
    if train.shuffle_pairs:
        yield f"{at}.train.shuffle_pairs: not for mixed runs; set false"


def _loss(name: str, config: RunConfig, table: Table) -> Iterator[str]:
    loss, at = config.loss, f"runs.{name}.loss"
    for key in ("regeneration_weight", "alignment_weight"):
        if getattr(loss, key):
            yield f"{at}.{key}: a term of mixed runs alone; set 0"
    if not (loss.mvs_weight or loss.icl_weight or loss.tcl_weight):
        yield f"{at}: mvs_weight, icl_weight and tcl_weight are all 0; validation needs one of them"
    if loss.label_positives and all(facts(d, table).text == "reports" for d in config.datasets):
        yield f"{at}.label_positives: none of the run's data sets has labels; set false"
    if loss.label_positives and config.train.shuffle_pairs:
        yield f"{at}.label_positives: train.shuffle_pairs parts texts from labels; set one of them false"


def _others(params: Params, table: Table) -> Iterator[str]:
    for name, other in params.others.items():
        if name in params.runs:
            yield f"others.{name}: a run has this name, too"
        if other.adapter not in ADAPTERS:
            known = ", ".join(ADAPTERS)
            yield f"others.{name}.adapter: {other.adapter!r} is none of {known}{hint(other.adapter, ADAPTERS)}"
        yield from _known(f"others.{name}.trained_on", other.trained_on, table)


def _rows(params: Params) -> Iterator[str]:
    """The runs that fill the tables."""
    for key, names in (
        ("main", params.main),
        ("ablations", params.ablations),
        ("prompt_ablations", params.prompt_ablations),
        ("compositions", params.compositions),
        ("control", (params.control,) if params.control else ()),
    ):
        for name in names:
            if name not in params.runs:
                yield f"{key}: {name!r} is not among runs{hint(name, params.runs)}"
            elif key != "compositions" and not _aligned(params, name):
                yield (
                    f"{key}: {name} never aligns a pair (paired, loss.alignment_weight), so it has no zero-shot and no "
                    "retrieval; name it in compositions instead"
                )


def _aligned(params: Params, name: str) -> bool:
    try:
        return run_config(params, name).aligned
    except ParamsError:  # said where the runs are looked at
        return True


def _encoders(params: Params) -> Iterator[str]:
    for name, encoder in params.model.image_encoders.items():
        if encoder.weights and encoder.pretrained:
            yield f"model.image_encoders.{name}: weights names a file; set pretrained: false"


def _texts(params: Params) -> Iterator[str]:
    encoder = params.model.text_encoder
    if params.runs and not encoder.name and encoder.vocabulary < 32:
        yield f'model.text_encoder.vocabulary: {encoder.vocabulary}; a tokenizer is trained (name: ""), set 32 at least'
    words = params.back_translation
    if bool(words.forward) != bool(words.back):
        lacks = "back" if words.forward else "forward"
        yield f"back_translation.{lacks}: missing; name the models of both directions, or none"


def _evaluate(params: Params, table: Table) -> Iterator[str]:
    evaluate = params.evaluate
    if not evaluate.protocols:
        yield "evaluate.protocols: an empty list; name at least one protocol, such as paper"
    yield from _shares(evaluate)
    official = used_for("official_classification", table)
    yield from _among_runs("evaluate.official.runs", evaluate.official.runs, params)
    if params.runs.keys() & set(evaluate.official.runs) and not params.sources.keys() & set(official):
        yield f"evaluate.official.runs: {' or '.join(official)} is not among sources; add it there or name no run"
    regeneration = evaluate.regeneration
    yield from _among_runs("evaluate.regeneration.runs", regeneration.runs, params)
    for name in regeneration.runs:
        if name in params.runs and not params.runs[name].mixed:
            yield f"evaluate.regeneration.runs: {name} is no mixed run and regenerates nothing"
    for ratio in regeneration.ratios:
        if abs(100 * ratio - round(100 * ratio)) > 1e-6:
            yield f"evaluate.regeneration.ratios: {ratio} is no whole percentage"
    for name in evaluate.few_shot.fine_tune.runs:
        if name not in params.main:
            yield f"evaluate.few_shot.fine_tune.runs: {name!r} is not in main{hint(name, params.main)}"


def _shares(evaluate: Evaluate) -> Iterator[str]:
    few_shot, tune = evaluate.few_shot, evaluate.few_shot.fine_tune
    if few_shot.shares.keys() != few_shot.epochs.keys():
        yield "evaluate.few_shot: shares and epochs name different subsets"
    if tune.shares.keys() != tune.epochs.keys():
        yield "evaluate.few_shot.fine_tune: shares and epochs name different subsets"
    for both in sorted(few_shot.shares.keys() & tune.shares.keys()):
        yield f"evaluate.few_shot.fine_tune.shares.{both}: the linear probe has a share of this name"
    known = (*few_shot.shares, *tune.shares)
    for share in evaluate.official.shares:
        if share not in known:
            yield f"evaluate.official.shares: {share!r} is none of evaluate.few_shot's ({', '.join(known)})"


def _among_runs(key: str, names: Iterable[str], params: Params) -> Iterator[str]:
    for name in names:
        if name not in params.runs:
            yield f"{key}: {name!r} is not among runs{hint(name, params.runs)}"


def _known(key: str, names: Iterable[str], known: Collection[str]) -> Iterator[str]:
    for name in names:
        if name not in known:
            yield f"{key}.{name}: unknown data set; known are {', '.join(known)}{hint(name, known)}"
