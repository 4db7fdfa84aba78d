"""What one run trains on: its effective parameters, studies, prompts and back-translations, all in one folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.params import LABEL_DATASETS, RunConfig, write_run_config
from pipeline.prompts import Prompts, read_pools
from pipeline.study import Study, read_studies, write_studies
from pipeline.translations import FILE, read_translations, report_sections


def usable(study: Study, prompts: Prompts | None) -> bool:
    """Whether a study has a view and something to say: a section, or a label that a prompt puts into words. Without
    this rule the twelve CheXpert images that have no label at all would train on an empty caption."""
    if study.labels and prompts is not None:
        return bool(study.views) and any(prompts.sentences(c, value) for c, value in study.labels.items())
    return bool(study.views) and bool(study.findings or study.impression)


def gather(
    config: RunConfig, index: Path, prompts: Path, out: Path, translations: Path | None = None
) -> dict[str, int]:
    """Write ``out``/run.json, studies.parquet (train and valid, in the run's order of data sets) and prompts/.

    Beside them goes translations.parquet, the back-translations of the run's training reports, where the run augments
    texts and there are any; a run that does not draw from them is the same with and without.

    Args:
        config: the run.
        index: folder of <dataset>.parquet as ingest wrote them.
        prompts: folder of <dataset>.json as the prompts stage wrote them, for data sets with labels.
        translations: folder the back_translate stage wrote, or None for no translations.

    Returns:
        Counts: studies per data set and split, those left out for want of any text, and with translations their number.

    Raises:
        ValueError: a data set of the run has no training study.
    """
    (out / "prompts").mkdir(parents=True, exist_ok=True)
    counts: dict[str, int] = {}

    def kept() -> Iterator[Study]:
        for dataset in config.datasets:
            sentences = None
            if dataset in LABEL_DATASETS:
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

    write_studies(out / "studies.parquet", kept())
    write_run_config(out / "run.json", config)
    (out / FILE).unlink(missing_ok=True)
    if (
        translations is not None
        and config.augment.text
        and config.augment.text_method == "swap"
        and len(known := read_translations(translations / FILE))
    ):
        training = read_studies(out / "studies.parquet", ("train",))
        own = known.of(text for study in training for text in report_sections(study))
        counts["translations"] = len(own)
        if len(own):
            own.write(out / FILE)
    return counts
