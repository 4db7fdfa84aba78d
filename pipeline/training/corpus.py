"""What one run trains on: its effective parameters, studies, prompts and back-translations, all in one folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from pipeline.config.run_config import Roles, RunConfig, write_run_config
from pipeline.storage.index import read_studies, write_studies
from pipeline.study import SPLITS, Study
from pipeline.study_keys import study_key
from pipeline.text.prompts import PromptSentences, read_pools
from pipeline.text.translations import TRANSLATIONS_FILE, read_translations, report_sections


def usable(study: Study, prompts: PromptSentences | None) -> bool:
    """Whether a study has a view and something to say: a section, or a label that a prompt puts into words. Without
    this rule the twelve CheXpert images that have no label at all would train on an empty caption."""
    if study.labels and prompts is not None:
        return bool(study.views) and any(prompts.sentences(c, value) for c, value in study.labels.items())
    return bool(study.views) and bool(study.findings or study.impression)


def write_corpus(
    config: RunConfig, index: Path, prompts: Path, out: Path, translations: Path | None = None
) -> dict[str, int]:
    """Write ``out``/run.json, studies.parquet (train and valid, in the run's order of data sets) and prompts/.

    Of a mixed run a pair is a study with views and texts; a lone image has no text and no label, a lone text no view,
    and a broken pair is one of each. They are in the order of the run's sources.

    Beside them goes translations.parquet, the back-translations of the run's training reports, where the run augments
    texts and there are any; a run that does not draw from them is the same with and without.

    Args:
        config: the run.
        index: folder of <dataset>.parquet as ingest wrote them.
        prompts: folder of <dataset>.json as the prompts stage wrote them, for data sets with labels.
        translations: folder the back_translate stage wrote, or None for no translations.

    Returns:
        Counts: studies per data set and split (and, in a mixed run, kind), those left out for want of what the run
        needs of them, and with translations their number.

    Raises:
        ValueError: a data set of the run has no training study, or a run that aligns pairs has none.
    """
    (out / "prompts").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}

    def kept() -> Iterator[Study]:
        for dataset in config.datasets:
            sentences = None
            if dataset in config.captioned:
                sentences = read_pools(prompts / f"{dataset}.json")
                sentences.write_pools(out / "prompts" / f"{dataset}.json")
            counts.update({f"{dataset}.{part}": 0 for part in ("silent", "train", "valid")})
            for study in read_studies(index / f"{dataset}.parquet", ("train", "valid")):
                speaks = usable(study, sentences)
                counts[f"{dataset}.{study.split if speaks else 'silent'}"] += 1
                if speaks:
                    yield study
            if not counts[f"{dataset}.train"]:
                raise ValueError(f"{index / dataset}.parquet: no training study with a text; see the summary beside it")

    if config.roles is None:
        write_studies(out / "studies.parquet", kept())
    else:
        write_studies(out / "studies.parquet", _mixed(config, config.roles, index, counts))
        if config.loss.alignment_weight and not sum(counts.get(f"{d}.pairs.train", 0) for d in config.roles.paired):
            raise ValueError(f"runs.{config.name}.loss.alignment_weight: no training pair is left; set 0")
    write_run_config(out / "run.json", config)
    (out / TRANSLATIONS_FILE).unlink(missing_ok=True)
    if (
        translations is not None
        and config.augment.text
        and config.augment.text_method == "swap"
        and len(known := read_translations(translations / TRANSLATIONS_FILE))
    ):
        training = read_studies(out / "studies.parquet", ("train",))
        own = known.of(text for study in training for text in report_sections(study, config.captioned))
        counts["translations"] = len(own)
        if len(own):
            own.write(out / TRANSLATIONS_FILE)
    return counts


def prompt_texts(prompts: Iterable[PromptSentences]) -> Iterator[str]:
    """Every sentence of the prompts of some data sets, once."""
    for said in prompts:
        for pool in said.pools.values():
            yield from chain(*pool.values())


def report_texts(studies: Iterable[Study]) -> Iterator[tuple[str, str]]:
    """The sections of reports, and the patient that each is of: by the id alone, since a patient may be in two data
    sets."""
    for study in studies:
        for text in (study.findings, study.impression):
            if text:
                yield study.patient, text


def whole(study: Study, roles: Roles, seed: int) -> bool:
    """Whether a pair stays one. Those of a fraction are among those of every larger one."""
    return study_key(study, seed, "pair") >> 10 < roles.paired_fraction * 2**53


def _mixed(config: RunConfig, roles: Roles, index: Path, counts: dict[str, int]) -> Iterator[Study]:
    """The pairs, lone images and lone texts of a mixed run; ``counts`` is filled."""
    for dataset in config.datasets:
        kinds: tuple[str, ...] = ("images",) if dataset in roles.images else ("texts",)
        if dataset in roles.paired:
            kinds = ("images", "texts")
        known = ("pairs", *kinds) if dataset in roles.paired else kinds
        counts.update({f"{dataset}.{part}": 0 for part in ("silent", *(f"{k}.{s}" for k in known for s in SPLITS[:2]))})
        for study in read_studies(index / f"{dataset}.parquet", ("train", "valid")):
            needed = {"images": bool(study.views), "texts": bool(study.findings or study.impression)}
            if not all(needed[kind] for kind in kinds):
                counts[f"{dataset}.silent"] += 1
            elif dataset in roles.paired and whole(study, roles, config.seed):
                counts[f"{dataset}.pairs.{study.split}"] += 1
                yield replace(study, labels={})
            else:
                for kind in kinds:
                    counts[f"{dataset}.{kind}.{study.split}"] += 1
                    yield _lone_image(study) if kind == "images" else _lone_text(study)
        if not any(counts[f"{dataset}.{kind}.train"] for kind in known):
            lacks = " and ".join(kinds)
            raise ValueError(f"{index / dataset}.parquet: no training study with {lacks}; see the summary beside it")


def _lone_image(study: Study) -> Study:
    return replace(study, findings=None, impression=None, labels={})


def _lone_text(study: Study) -> Study:
    return replace(study, views=(), labels={})
