"""Pre-training of one run (paper section 4.2): AdamW, warm-up, cosine, AMP, DDP, best by validation.

Whatever ends a training, a later one of the same parameters resumes from its saved state
(``pipeline.training.resume``). What is particular to a method is in ``pipeline.training.methods``.
"""

from __future__ import annotations

import csv
import math
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

from pipeline.config.records import ParamsError
from pipeline.config.run_config import RunConfig, read_run_config
from pipeline.models.checkpoint import save_model
from pipeline.storage.atomic import replacing
from pipeline.storage.index import read_studies
from pipeline.text.prompts import read_pools
from pipeline.text.tokenizer import Tokenizer
from pipeline.text.translations import read_translations
from pipeline.training import resume
from pipeline.training.batches import TrainingSet, ValidationSet, epoch_draws, steps_before, training_batches
from pipeline.training.corpus import prompt_texts, report_texts
from pipeline.training.distributed import Process, device_of, gather_rows, join
from pipeline.training.identity import identity
from pipeline.training.method import Method, Stateful
from pipeline.training.methods import method_of
from pipeline.training.schedule import warmup_cosine
from pipeline.training.step import Later, apply_gradients, compute_gradients
from pipeline.training.throughput import Waiting, epoch_line, peak
from pipeline.training.validation import Validation

# Columns of the history before the terms of the run's method and ``scale``. Times are told, not kept: the file is an
# output that the same inputs make again.
BEFORE_TERMS = ("epoch", "step", "lr", "train_loss", "valid_loss")
CURVE = 50  # steps between two points of the training curve
READ_LATE = {"cpu": 0, "cuda": 1}  # steps that a device is ahead of what is known of it
SKIPS = 50  # steps in a row that fp16 left out, after which it will not find its scale
NAMED = 8  # studies that an error names at most

FP16 = ("loss_scale", "skipped")  # columns of fp16 alone: the factor at the end of the epoch, steps that were left out
Tell = Callable[[dict[str, float], int], None]
Meter = Callable[[Any], float]


@dataclass
class _Training:
    """What all steps of a training share."""

    config: RunConfig
    tokenizer: Tokenizer
    data: TrainingSet
    validation: Validation
    method: Method[Any]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    scaler: torch.amp.GradScaler
    process: Process
    saved: resume.Saved
    tell: Tell

    def steps_before(self, epoch: int) -> int:
        """Steps that are done when an epoch begins."""
        return steps_before(len(self.data), self.config.train.batch_size, epoch)


class _Step(NamedTuple):
    """A step whose numbers are on their way: loss, terms, two flags, and what ``apply_gradients`` says."""

    batch: Any
    terms: tuple[str, ...]
    numbers: Later


def train_run(
    corpus: Path,
    out: Path,
    history: Path,
    work: Path,
    tell: Tell,
    seed: int = 0,
    speed: Mapping[str, Any] | None = None,
    resume_anyway: bool = False,
) -> float:
    """Train the run that ``corpus`` (see ``pipeline.training.corpus``) describes and keep its best model.

    Under ``torchrun`` every process trains on its share of each batch; negatives are gathered over all of them with
    gradients, so the batch of the parameters is the batch of the loss.

    Args:
        out: folder for model.safetensors, run.json and the tokenizer; it appears whole, at the end.
        history: csv file with a row an epoch: ``BEFORE_TERMS``, the method's terms, ``scale`` and, in fp16, ``FP16``.
        work: folder of the training state, on a file system that all processes see. A training whose state it holds
            resumes there, on a CPU to the same bits as if it had never been interrupted. At the end the state
            shrinks to what can write the outputs again, until ``resume.forget``.
        tell: called by rank 0 with each row and its epoch, and every ``CURVE`` steps with the loss (``step_loss``) and
            the number of steps done. A training that resumes tells all of it again. A row told has also
            ``studies_per_second``, ``seconds``, ``waiting``, the share of them spent waiting for data, and, if the
            device's peak is known, ``mfu``, the model's FLOPs over it.
        seed: added to the run's.
        speed: keys of ``train`` instead of the run's own, such that change no result.
        resume_anyway: resume also from a state of other code or libraries.

    Returns:
        The best validation loss.

    Raises:
        ParamsError: settings that do not go together. FloatingPointError: loss or gradients that are not finite, or
        that fp16 cannot hold at any scale (rank 0 says where). resume.Stopped: SIGTERM or SIGUSR1 came.
        resume.StateError: the state could not be saved.
    """
    config = read_run_config(corpus / "run.json")
    config = replace(config, seed=config.seed + seed, train=replace(config.train, **(speed or {})))
    device = device_of(config.train)
    with resume.StopSignals() as signals:
        process = join(device, config.train, from_cpu=config.mixed is not None)
        with resume.alone(work) if process.rank == 0 else nullcontext():
            t = _build(config, corpus, work, process, tell, resume_anyway)
            progress = t.saved.load()
            try:
                _run(t, progress, signals)
                if not math.isfinite(progress.best):
                    raise FloatingPointError(f"{config.name}: no epoch had a finite validation loss")
                if process.rank == 0:
                    _write_outputs(t, progress, out, history)
                    t.saved.finish(progress)
            finally:
                if process.world > 1 and sys.exc_info()[0] in (None, resume.Stopped):  # else the others may be gone
                    dist.destroy_process_group()
    return progress.best


def _build(
    config: RunConfig, corpus: Path, work: Path, process: Process, tell: Tell, resume_anyway: bool = False
) -> _Training:
    """Everything as it is before the first step."""
    device, world = process.device, process.world
    if config.train.batch_size % world:
        raise ParamsError(f"train.batch_size: {config.train.batch_size} studies do not divide among {world} processes")
    _seed(config, device)
    prompts = {path.stem: read_pools(path) for path in sorted((corpus / "prompts").glob("*.json"))}
    training = read_studies(corpus / "studies.parquet", ("train",))
    validation = read_studies(corpus / "studies.parquet", ("valid",))
    tokenizer = Tokenizer.build(config.text_encoder, prompt_texts(prompts.values()), report_texts(training))
    method = method_of(config, tokenizer, process)
    data = TrainingSet(training, prompts, config, read_translations(corpus / "translations.parquet"))
    epoch_draws(len(data), config.train.batch_size, config.seed, 0)  # raises if there are too few studies
    optimizer = torch.optim.AdamW(
        method.learner.parameters(), lr=config.train.lr, weight_decay=config.train.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(config, step, len(data)))
    scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
    if process.rank == 0:
        size = sum(p.numel() for p in method.net.parameters()) / 1e6
        print(
            f"{config.name}: {len(training)} studies, {size:.1f} M parameters, {world} x {device.type}, "
            f"{config.train.precision}, {config.train.epochs} epochs of {len(data) / config.train.batch_size:.4g} steps"
        )
    parts: dict[str, Stateful] = {
        **{"model": method.net, "optimizer": optimizer, "schedule": schedule, "scaler": scaler},
        **method.state,
    }
    return _Training(
        config=config,
        tokenizer=tokenizer,
        data=data,
        validation=Validation(
            method, [ValidationSet(validation.select(dataset=d), prompts, config) for d in config.datasets], config
        ),
        method=method,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        process=process,
        saved=resume.Saved(work, identity(config, corpus, tokenizer, device), parts, process, resume_anyway),
        tell=tell if process.rank == 0 else lambda values, step: None,
    )


def _rate(config: RunConfig, step: int, studies: int) -> float:
    """Factor on the learning rate at a step, counted from the start of a training on so many studies."""
    options = config.train
    warmup = round(options.warmup_epochs * studies / options.batch_size)
    return warmup_cosine(step, warmup, steps_before(studies, options.batch_size, options.epochs))


def _run(t: _Training, progress: resume.Progress, signals: resume.StopSignals) -> None:
    """Epoch after epoch, from where the training is to its end."""
    options = t.config.train
    for row in progress.rows:
        t.tell(row, int(row["epoch"]))
    for step, loss in progress.curve:
        t.tell({"step_loss": loss}, step)
    if t.scaler.is_enabled() and not progress.loss_scale:
        progress.loss_scale = t.scaler.get_scale()
    flops = peak(t.process.device, options.precision)
    meter = t.method.meter() if flops else None
    bar = tqdm(
        total=t.steps_before(options.epochs) * options.batch_size,
        initial=(t.steps_before(progress.epoch) + progress.step) * options.batch_size,
        desc=t.config.name,
        unit=" studies",
        disable=t.process.rank != 0,
        mininterval=1 if sys.stderr.isatty() else 60,  # a log keeps every line of it
    )
    while not progress.finished(options.epochs, options.patience):
        _epoch(t, progress, signals, bar, meter)
        refused = t.saved.save(progress)  # validation may take long, too
        valid_loss = t.validation.loss(lambda: signals.seen)
        if valid_loss is None:
            raise resume.Stopped(_stopped("in its validation", progress, refused, bar))
        done = t.steps_before(progress.epoch + 1)
        row = {
            **{name: total / progress.step for name, total in progress.sums.items()},
            "epoch": progress.epoch,
            "step": done,
            "lr": options.lr * _rate(t.config, done - 1, len(t.data)),
            "valid_loss": valid_loss,
            "scale": t.method.net.scale.item(),
            "studies_per_second": progress.step * options.batch_size / progress.seconds,
            "seconds": progress.seconds,
            "waiting": progress.waited / progress.seconds,
        }
        if t.scaler.is_enabled():
            row |= {"loss_scale": progress.loss_scale, "skipped": progress.skipped}
        if flops and meter:
            row["mfu"] = progress.flops / progress.seconds / flops
        if t.process.rank == 0:
            bar.write(f"{t.config.name}: {epoch_line(row)}")
        if row["valid_loss"] < progress.best and resume.finite(t.method.net.state_dict()):
            progress.best, progress.best_epoch = row["valid_loss"], progress.epoch
        progress.end_epoch(row)
        t.saved.save(progress)
        t.tell(row, int(row["epoch"]))
    bar.close()


def _epoch(
    t: _Training, progress: resume.Progress, signals: resume.StopSignals, bar: tqdm, meter: Meter | None
) -> None:
    """The steps of an epoch that are still to do.

    What a step has computed is read ``READ_LATE`` steps later, so that the device never waits for Python. All processes
    read the same numbers at the same place, and so do the same about them.
    """
    options, process = t.config.train, t.process
    t.method.learner.train()
    at = progress.epoch, process.rank, process.world, options.workers, progress.step
    batches = Waiting(training_batches(t.data, t.method.collate, *at), progress.waited)
    begun = time.perf_counter() - progress.seconds
    saved_at = time.perf_counter()
    unread: deque[_Step] = deque()
    stop = save = False

    def read(left: int) -> None:
        """Until so many steps are left unread."""
        nonlocal stop, save
        while len(unread) > left:
            progress.seconds, progress.waited = time.perf_counter() - begun, batches.seconds
            raised = _count(t, unread.popleft(), progress, bar, meter)
            stop, save = stop or raised[0], save or raised[1]

    def flags() -> list[bool]:
        """Whether this process has been asked to stop, and whether it is time to save."""
        return [signals.seen, process.rank == 0 and time.perf_counter() - saved_at >= 60 * options.save_minutes]

    for batch in batches:
        t.optimizer.zero_grad(set_to_none=True)
        loss, parts, raised = compute_gradients(t.method, batch, t.scaler, flags)
        health = apply_gradients(t.method.learner, t.optimizer, t.scaler, loss)
        t.method.net.clamp_scale()
        t.schedule.step()
        numbers = torch.cat([torch.stack([loss, *parts.values()]), raised, health])
        unread.append(_Step(batch, tuple(parts), Later(numbers)))
        read(READ_LATE[process.device.type])
        if stop or save:
            read(0)
            refused = t.saved.save(progress)
            saved_at, save = time.perf_counter(), False
        if stop:
            raise resume.Stopped(_stopped(f"after step {progress.step}", progress, refused, bar))
    read(0)
    if stop:
        raise resume.Stopped(_stopped(f"after step {progress.step}", progress, t.saved.save(progress), bar))


def _count(t: _Training, step: _Step, progress: resume.Progress, bar: tqdm, meter: Meter | None) -> tuple[bool, bool]:
    """Take a step into the progress and the bar; whether a process has seen a signal, and whether to save.

    Raises:
        FloatingPointError: the training cannot go on.
    """
    *values, seen, due, broken, factor = step.numbers.read()
    named = dict(zip(("train_loss", *step.terms), values, strict=True))
    if broken:
        said = _not_finite(t, step.batch, progress, named["train_loss"])
        raise FloatingPointError(said if t.process.rank == 0 else "")
    progress.end_step(named)
    shown = {"loss": f"{named['train_loss']:.3f}"}
    if t.scaler.is_enabled():
        progress.scaled(factor)
        if progress.in_a_row >= SKIPS or factor < 1:
            said = (
                f"{t.config.name}: the gradients are too large for fp16 in epoch {progress.epoch} at step "
                f"{progress.step}: {progress.in_a_row} steps in a row were left out, and the loss scale is {factor:g}; "
                "set train.precision: bf16, or lower train.lr. The state saved before is kept"
            )
            raise FloatingPointError(said if t.process.rank == 0 else "")
        shown |= {"scale": f"{factor:g}", "skipped": str(progress.skipped)}
    if meter:
        progress.flops += meter(step.batch)
    done = t.steps_before(progress.epoch) + progress.step
    if done % CURVE == 0:
        progress.curve.append((done, named["train_loss"]))
        t.tell({"step_loss": named["train_loss"]}, done)
    bar.set_postfix(shown, refresh=False)
    bar.update(t.config.train.batch_size)
    return seen > 0, due > 0


def _stopped(where: str, progress: resume.Progress, refused: str, bar: tqdm) -> str:
    bar.close()
    saved = refused or "the state is saved, and the next start resumes from it"
    return f"stopped by a signal in epoch {progress.epoch} {where}; {saved}"


@torch.no_grad()
def _not_finite(t: _Training, batch: Any, progress: resume.Progress, loss: float) -> str:
    """What to say of loss or gradients that are not finite: the studies whose embeddings are not, on whatever rank, or
    all of the step if none is. Their ids, never their text."""
    bad = gather_rows((~t.method.finite(batch)).to(torch.uint8), t.process.device).bool()
    places = gather_rows(batch.places, t.process.device)
    places = places[bad] if bad.any() else places.flatten()
    studies = [t.data.studies[i] for i in sorted(places.tolist())]
    named = ", ".join(f"{s.dataset}/{s.patient}/{s.study}" for s in studies[:NAMED])
    more = f" and {len(studies) - NAMED} more" if len(studies) > NAMED else ""
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are not finite"
    return (
        f"{t.config.name}: {what} in epoch {progress.epoch} at step {progress.step}, from studies {named}"
        f"{more}; lower train.lr, or look at these studies. The state saved before is kept"
    )


def _write_outputs(t: _Training, progress: resume.Progress, out: Path, history: Path) -> None:
    """The outputs, each whole, from the best epoch."""
    t.saved.restore_best(t.method.net, progress.best_epoch)
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with resume.one_line(out.parent, "the model could not be written, and the training state is kept"):
        save_model(t.method.net, t.tokenizer, t.config, partial)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        columns = (*BEFORE_TERMS, *t.method.terms, "scale", *(FP16 if t.scaler.is_enabled() else ()))
        _write_history(history, columns, progress.rows)


def _seed(config: RunConfig, device: torch.device) -> None:
    """Same weights on every rank; on the CPU also the same arithmetic every time."""
    torch.manual_seed(config.seed)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    if device.type == "cpu":
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms, without its 2 s of torch.compile
        # Filling memory costs time, and nothing here reads it before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _write_history(path: Path, columns: Sequence[str], rows: list[dict[str, float]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
