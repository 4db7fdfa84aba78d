"""What each stage reads of params.yaml, with every default filled in: the files of data/settings, one a stage or item.

Stages depend on these files instead of on keys of params.yaml: a changed key, or a changed default in the code, re-runs
the stages whose file changes and no others. Keys that change no result are in none of them (``Machine``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic.dataclasses import dataclass

from pipeline.config.archive_params import About, Ingest, Source
from pipeline.config.load import load_params
from pipeline.config.params import Augment, BackTranslation, Bootstrap, FewShot, FineTune, Other, Params
from pipeline.config.records import (
    RECORD,
    Count,
    Flag,
    Insides,
    Name,
    Names,
    ParamsError,
    Positive,
    Ranks,
    Seed,
    Share,
    read_record,
)
from pipeline.config.run_config import RunConfig, run_config, without_speed
from pipeline.datasets import Dataset, captioned, datasets_of, facts, own_datasets, paired_tests, tested, used_for

FOLDER = Path("data/settings")
GROUPS = ("corpus",)  # folders that a stage depends on as a whole
CHECKED = "checked"  # a file without content of params.yaml: what depends on it runs after the check alone
T = TypeVar("T")


@dataclass(frozen=True, config=RECORD)
class PhantomSettings:
    """``archives``: how many studies of each are drawn; ``size``: their short side in pixels."""

    seed: Seed
    size: Positive
    archives: dict[Name, Positive]


@dataclass(frozen=True, config=RECORD)
class IngestSettings:
    """Of one data set; its ``classes`` are those that ``datasets.yaml`` gives and its reader knows."""

    seed: Seed
    source: Source
    options: Ingest
    classes: tuple[str, ...]


@dataclass(frozen=True, config=RECORD)
class AuditSettings:
    """``sources``: names of the data sets; ``own``, here and below: what is known of the user's own among them."""

    sources: Names
    min_correlation: Share
    own: dict[Name, Dataset] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class PromptSettings:
    """The files of training templates, the data sets whose labels become captions, and the user's ``own``: classes of
    theirs without templates take the default ones."""

    file: str
    ablation: str
    datasets: Names
    own: Names = ()


@dataclass(frozen=True, config=RECORD)
class BackTranslationSettings:
    """``sources``: names of the data sets."""

    seed: Seed
    sources: Names
    captioned: Names
    options: BackTranslation


@dataclass(frozen=True, config=RECORD)
class CorpusSettings:
    """Of one run: its effective parameters, and the folder below data/prompts that its captions come from."""

    prompts: str
    config: RunConfig


@dataclass(frozen=True, config=RECORD)
class EmbedSettings:
    """``runs``: ``<run>/<seed>`` of all trainings; ``test_sets``: the data sets whose test images are embedded, and
    ``map_sets`` those of them with similarity maps; ``sources``: names of all data sets."""

    runs: tuple[str, ...]
    sources: Names
    test_sets: Names
    map_sets: Names
    protocols: tuple[str, ...]
    own: dict[Name, Dataset] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class EmbedOtherSettings:
    """Of one other people's model."""

    other: Other
    sources: Names
    test_sets: Names
    protocols: tuple[str, ...]
    own: dict[Name, Dataset] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class ZeroShotSettings:
    """``rows``: all that is evaluated and the data sets each was trained on (``evaluated_rows``)."""

    seed: Seed
    sources: Names
    protocols: tuple[str, ...]
    bootstrap: Bootstrap
    rows: dict[str, Names]
    own: dict[Name, Dataset] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class RetrievalSettings:
    """As ``ZeroShotSettings``; ``k`` of R@K."""

    seed: Seed
    sources: Names
    protocols: tuple[str, ...]
    bootstrap: Bootstrap
    rows: dict[str, Names]
    k: Ranks
    own: dict[Name, Dataset] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class FewShotSettings:
    """Of one run or other people's model: the recipe (``options.fine_tune`` without a share: no fine-tuning), the test
    sets, and the data sets that the model was trained on."""

    seed: Seed
    sources: Names
    protocols: tuple[str, ...]
    augment: Augment
    bootstrap: Bootstrap
    options: FewShot
    test_sets: Names
    trained_on: Names
    other: Other | None = None
    own: dict[Name, Dataset] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class RegenerateSettings:
    """``test_sets``: data sets with a report for every test image; ``images``: of a test set at most (0 = all);
    ``ratios``: shares of hidden cells."""

    seed: Seed
    sources: Names
    protocols: tuple[str, ...]
    bootstrap: Bootstrap
    test_sets: Names
    images: Count
    ratios: Insides
    show_patient_data: Flag
    own: dict[Name, Dataset] = field(default_factory=dict)


@dataclass(frozen=True, config=RECORD)
class Machine:
    """How the work is done on this machine: keys of params.yaml that change no result, so no stage re-runs for them.

    Numbers of processes (0 = one a core) and threads (0 = torch's choice), the address of a dask scheduler, images a
    pass, the device of back-translation, and whether MLflow records.
    """

    ingest_workers: Count
    scheduler: str
    audit_workers: Count
    translation_workers: Count
    translation_device: Literal["auto", "cpu", "cuda"]
    loader_workers: Count
    batch_size: Positive
    threads: Count
    tracking: Flag


def load_machine() -> Machine:
    """Those keys of params.yaml. Raises ``ParamsError`` as ``load_params`` does."""
    params = load_params()
    return Machine(
        ingest_workers=params.ingest.workers,
        scheduler=params.ingest.scheduler,
        audit_workers=params.audit.workers,
        translation_workers=params.back_translation.workers,
        translation_device=params.back_translation.device,
        loader_workers=params.train.workers,
        batch_size=params.evaluate.batch_size,
        threads=params.evaluate.threads,
        tracking=params.tracking.enabled,
    )


def evaluated_rows(params: Params) -> dict[str, tuple[str, ...]]:
    """All that is evaluated, and the data sets each was trained on.

    Keys: ``<run>/<seed>`` of our trainings and the names of other people's models, which are the places of their
    embeddings and results.
    """
    ours = {f"{name}/{seed}": run.datasets for name, run in params.runs.items() for seed in params.seeds}
    return ours | {name: other.trained_on for name, other in params.others.items()}


def tested_facts(params: Params) -> dict[str, Dataset]:
    """What evaluation asks of the user's own data sets: uses and classes, and nothing that would re-run it in vain."""
    found = {}
    for name, own in own_datasets(params.sources).items():
        captions = own.captions if "retrieval" in own.uses else "reports"  # which texts are searched
        found[name] = replace(own, name=name, patient_ids=False, captions=captions)
    return found


def audited_facts(params: Params) -> dict[str, Dataset]:
    """What the audit asks of them: whether patients are persons."""
    own = own_datasets(params.sources)
    return {
        name: replace(d, name=name, classes=(), captions="reports", uses=("pretraining",)) for name, d in own.items()
    }


def settings_of(params: Params) -> dict[str, Any]:
    """The settings of every stage: path below data/settings without suffix -> record."""
    evaluate, sources, seed = params.evaluate, tuple(params.sources), params.seed
    table, own = datasets_of(params.sources), tested_facts(params)
    common: dict[str, Any] = {
        "seed": seed,
        "sources": sources,
        "own": own,
        "protocols": evaluate.protocols,
        "bootstrap": evaluate.bootstrap,
    }
    rows = evaluated_rows(params)
    tests = tuple(d for d in tested(table) if d in sources)
    maps = tuple(d for d in used_for("binary_classification") if d in sources)
    found: dict[str, Any] = {}
    found["phantom"] = PhantomSettings(seed, params.phantom.size, params.phantom.archives)
    ingest = replace(params.ingest, workers=Ingest().workers, scheduler=Ingest().scheduler)
    for name, source in params.sources.items():
        read = replace(source, about=About())  # which reading does not ask for
        found[f"ingest/{name}"] = IngestSettings(seed, read, ingest, facts(name).classes)
    found["audit"] = AuditSettings(sources, params.audit.min_correlation, audited_facts(params))
    labelled = tuple(name for name in captioned(table) if name in params.sources)
    found["prompts"] = PromptSettings(params.prompts.file, params.prompts.ablation, labelled, tuple(own))
    plain = BackTranslation()
    translation = replace(params.back_translation, workers=plain.workers, device=plain.device)
    found["back_translate"] = BackTranslationSettings(seed, sources, labelled, translation)
    for name, run in params.runs.items():
        found[f"corpus/{name}"] = CorpusSettings(run.prompts, without_speed(run_config(params, name)))
    trainings = tuple(f"{name}/{s}" for name in params.runs for s in params.seeds)
    found["embed/runs"] = EmbedSettings(trainings, sources, tests, maps, evaluate.protocols, own)
    for name, other in params.others.items():
        found[f"embed/other/{name}"] = EmbedOtherSettings(_unnamed(other), sources, tests, evaluate.protocols, own)
    found["zero_shot"] = ZeroShotSettings(**common, rows=rows)
    found["retrieval"] = RetrievalSettings(**common, rows=rows, k=evaluate.retrieval.k)
    found |= _few_shot(params, common)
    found["regenerate"] = RegenerateSettings(
        **common,
        test_sets=tuple(d for d in paired_tests() if d in sources),
        images=evaluate.regeneration.images,
        ratios=evaluate.regeneration.ratios,
        show_patient_data=params.report.show_patient_data,
    )
    return found


def _few_shot(params: Params, common: dict[str, Any]) -> dict[str, FewShotSettings]:
    """Of the rows of Tables 2 and 3 (main), of the runs on ChestX-ray14's official lists, of other people's models."""
    evaluate = params.evaluate
    found: dict[str, FewShotSettings] = {}
    probe = replace(evaluate.few_shot, fine_tune=FineTune())
    tuned = replace(evaluate.few_shot, fine_tune=replace(evaluate.few_shot.fine_tune, runs=()))
    common = {**common, "augment": params.augment}
    own = tested_facts(params)
    asked = (*used_for("binary_classification"), *used_for("own_classification", own))
    probed = tuple(d for d in asked if d in params.sources)
    for name in params.main:
        found[f"few_shot/main/{name}"] = FewShotSettings(
            **common,
            options=tuned if name in evaluate.few_shot.fine_tune.runs else probe,
            test_sets=probed,
            trained_on=params.runs[name].datasets,
        )
    official = with_shares(tuned, evaluate.official.shares)
    for name in evaluate.official.runs:
        found[f"few_shot/official/{name}"] = FewShotSettings(
            **common,
            options=official,
            test_sets=tuple(d for d in used_for("official_classification") if d in params.sources),
            trained_on=params.runs[name].datasets,
        )
    for name, other in params.others.items():
        found[f"few_shot/other/{name}"] = FewShotSettings(
            **common,
            options=probe,
            test_sets=probed,
            trained_on=other.trained_on,
            other=_unnamed(other),
        )
    return found


def _unnamed(other: Other) -> Other:
    """Without what only the tables print."""
    return replace(other, model="", backbone="", data="", trained_on=())


def with_shares(options: FewShot, names: Iterable[str]) -> FewShot:
    """The recipe with some of its shares alone, linear and fine-tuned ones."""
    chosen = set(names)
    tune = options.fine_tune
    return replace(
        options,
        shares={name: share for name, share in options.shares.items() if name in chosen},
        fine_tune=replace(tune, shares={name: share for name, share in tune.shares.items() if name in chosen}),
    )


def write_settings(params: Params, folder: Path = FOLDER) -> int:
    """Write the settings of every stage to ``folder``, in place of what was there; the number of files.

    They are written beside it first: whoever reads one finds it whole or not at all.
    """
    found, partial = settings_of(params), folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, record in found.items():
        path = partial / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    for name in GROUPS:  # a part of the stage's output even if no item is named
        (partial / name).mkdir(parents=True, exist_ok=True)
    (partial / CHECKED).write_text("params.yaml has been read and checked.\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return len(found)


def read_settings(cls: type[T], name: str, folder: Path = FOLDER) -> T:
    """The settings of a stage, or of one of its items: ``few_shot/main/resnet_m``.

    Raises:
        ParamsError: there are none; one line that says what to do.
    """
    path = folder / f"{name}.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(
            f"{path}: not found; either params.yaml does not name it, or it has changed: run dvc repro settings"
        ) from None
    except (ValueError, RecursionError):
        raise ParamsError(f"{path}: not JSON; run dvc repro -f settings") from None
    return read_record(cls, raw)
