"""What an interrupted training resumes from: its state on disk, and whether that state is of this very training.

The work folder of a run holds ``state.pt`` (written whole or not at all) and ``best-<epoch>.safetensors``, the weights
of the best epoch that the state knows of. Neither holds code: they are read as tensors, numbers and text alone.

When a training has written its outputs, its state shrinks to what can write them again: its progress, whose rows are
the history, and the weights of the best epoch. The stage then calls ``forget``, if whoever started it is still there to
see it end. If not (DVC was killed, and the training went on and ended well), DVC knows nothing of the outputs and
removes them before it trains again; the next start with the same identity writes them from here and trains nothing. A
training whose end was seen leaves nothing behind, so ``dvc repro --force`` trains it again.
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import socket
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pipeline.config.records import ParamsError
from pipeline.models.weights_file import DamagedWeights, load_weights, save_weights
from pipeline.storage.atomic import replacing
from pipeline.training.distributed import Process, gather_rows
from pipeline.training.identity import PROGRAM
from pipeline.training.method import Stateful

EXIT_STOPPED = 75  # of a training that a signal stopped: sysexits.h's "try again later"
STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # pre-emption; and what SLURM can be told to send ahead of it


class StateError(OSError):
    """The training state could not be written or read: one line that says what to do."""


class Stopped(Exception):
    """A signal asked the training to stop; the message says whether its state is saved."""


@dataclass
class Progress:
    """How far a training has come. ``epoch`` epochs are done, and ``step`` steps of the next one.

    ``sums`` to ``skipped`` are of the epoch that runs: its loss terms added up, the seconds it took so far, those of
    them it waited for data, this process's FLOPs, and the steps that fp16 left out. ``in_a_row`` of those were the
    latest, and ``loss_scale`` is fp16's factor after the last step. ``curve`` holds (step from the start, loss) every
    so many steps.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    flops: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    loss_scale: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    best_epoch: int = -1

    def end_step(self, values: dict[str, float]) -> None:
        """Count a step and its loss terms."""
        self.step += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def scaled(self, factor: float) -> None:
        """Count what fp16's scaler did in a step: a factor that fell is a step that was left out."""
        fell = factor < self.loss_scale
        self.skipped += fell
        self.in_a_row = self.in_a_row + 1 if fell else 0
        self.loss_scale = factor

    def end_epoch(self, row: dict[str, float]) -> None:
        """Count an epoch and its row of the history."""
        self.rows.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.seconds = self.waited = self.flops = 0.0
        self.skipped = 0

    def finished(self, epochs: int, patience: int) -> bool:
        """Whether all epochs are done, or ``patience`` (0 = any number) of them in a row have not been the best."""
        return self.epoch >= epochs or 0 < patience < self.epoch - self.best_epoch


class Saved:
    """The state of one training in its work folder. Rank 0 writes; all ranks of the process group call ``load`` and
    ``save``."""

    def __init__(
        self,
        work: Path,
        identity: dict[str, str],
        parts: Mapping[str, Stateful],
        process: Process,
        anyway: bool = False,
    ) -> None:
        """``parts``: what has a state of its own, by name, one of them ``model``. ``anyway``: a state of other code or
        libraries (``pipeline.training.identity.PROGRAM``) is this training's, too."""
        self.work = work
        self.identity = identity
        self.parts = parts
        self.process = process
        self.anyway = anyway

    @property
    def state(self) -> Path:
        """The file of the state."""
        return self.work / "state.pt"

    def best(self, epoch: int) -> Path:
        """The file of the weights after an epoch that was the best."""
        return self.work / f"best-{epoch}.safetensors"

    def load(self) -> Progress:
        """Bring all parts to where the saved training was, and say so; a state that is not of this training is
        left aside, and that is said, too. Of a training that was finished the progress alone comes back.

        Raises:
            StateError: the file cannot be read now, or not all ranks see the same one.
        """
        saved, said = self._read()
        place = [saved["progress"]["epoch"], saved["progress"]["step"]] if saved else [-1, -1]
        if any(other != place for other in gather_rows(torch.tensor(place), self.process.device).tolist()):
            raise StateError(f"{self.work}: not all processes see the same training state; it must be on a file system "
                             "that all nodes share")  # fmt: skip
        progress = Progress()
        if saved:
            progress = Progress(**saved["progress"])
            now = f"training resumes in epoch {progress.epoch} at step {progress.step}"
            if saved["finished"]:
                now = "training had finished, and whoever started it was gone; its outputs are written from here"
            else:
                for name, part in self.parts.items():
                    part.load_state_dict(saved[name])
                self._set_random(saved["random"][self.process.rank % len(saved["random"])])
            said = f"{said}{now}"
        elif said:
            said = f"{said}; training starts from the beginning"
        if self.process.rank == 0:
            if said:
                print(f"{self.work}: {said}")
            self._tidy(progress if saved else None)
        return progress

    def _read(self) -> tuple[dict[str, Any] | None, str]:
        """The saved state if it can be used, and what to say before that; else None and why not ("": there is none)."""
        try:
            with zipfile.ZipFile(self.state) as file:  # whose checksums torch does not look at
                if file.testzip():
                    raise zipfile.BadZipFile
            saved = torch.load(self.state, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None, ""
        except OSError as error:
            raise StateError(f"{self.state}: cannot be read ({error.strerror}); see to it, or remove it") from None
        except Exception as error:  # damaged on the disk: torch has a dozen types for it
            return None, f"the saved state is damaged ({type(error).__name__})"
        was, now = saved["identity"], self.identity
        changed = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
        forgiven = [name for name in changed if self.anyway and name in PROGRAM]
        if changed != forgiven:
            return None, f"the saved state is of another training ({', '.join(changed)} changed)"
        try:
            if saved["progress"]["best_epoch"] >= 0:
                load_weights(self.best(saved["progress"]["best_epoch"]))
        except (FileNotFoundError, DamagedWeights) as error:
            how = "damaged" if isinstance(error, DamagedWeights) else "gone"
            return None, f"the weights of the best epoch are {how}"
        return saved, f"{' and '.join(forgiven)} changed, and the state is used as asked; " if forgiven else ""

    def save(self, progress: Progress) -> str:
        """Replace the saved state by the present one. If ``progress.best_epoch`` has just ended, its weights are kept
        first; those that no state names any more are removed last. A model that is no longer finite is not saved:
        nothing good can come of it.

        Returns:
            "", or why the state is not saved and what is in its place, alike on all ranks.

        Raises:
            StateError: it could not be written; the state before it is whole. All ranks raise it, and rank 0 says why.
        """
        weights = self.parts["model"].state_dict()
        if not finite(weights):
            kept = "the one saved before is kept" if self.state.exists() else "no earlier one is there"
            return f"the state is not saved, since weights of the model are not finite; {kept}"
        random = list(gather_rows(_random(self.process.device), self.process.device))
        failure = ""
        if self.process.rank == 0:
            try:
                states = {name: part.state_dict() for name, part in self.parts.items()}
                self._write(progress, {"finished": False, "random": random, **states}, weights)
            except StateError as error:
                failure = str(error)
        if gather_rows(torch.tensor([int(bool(failure))]), self.process.device).any():
            raise StateError(failure)
        return ""

    def finish(self, progress: Progress) -> None:
        """On rank 0, which has written the outputs: shrink the state to what can write them again.

        Raises:
            StateError: it could not be written.
        """
        self._write(progress, {"finished": True}, {})

    def _write(self, progress: Progress, more: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        """A state whole or not at all; ``weights``: of the best epoch if no file holds them yet."""
        with one_line(self.work, "the training state could not be saved, and the one before it is kept"):
            best = self.best(progress.best_epoch)
            if progress.best_epoch >= 0 and not best.exists():
                save_weights(best, weights)
            with replacing(self.state) as partial:
                torch.save({"identity": self.identity, "progress": asdict(progress), **more}, partial)
            self._tidy(progress)

    def restore_best(self, net: nn.Module, epoch: int) -> None:
        """Give a model the weights it had after the best epoch."""
        net.load_state_dict(load_weights(self.best(epoch)), strict=True)

    def _tidy(self, progress: Progress | None) -> None:
        """Remove what is neither the state nor the best model it names; all, where there is none to go on from."""
        keep = {"lock"} | ({self.state.name, self.best(progress.best_epoch).name} if progress else set())
        for stray in self.work.iterdir():
            if stray.name not in keep:
                stray.unlink()

    def _set_random(self, state: Tensor) -> None:
        size = len(torch.get_rng_state())
        torch.set_rng_state(state[:size].clone())
        if self.process.device.type == "cuda":
            torch.cuda.set_rng_state(state[size:].clone(), self.process.device)


def finite(weights: Mapping[str, Tensor]) -> bool:
    """Whether every number of a model is finite."""
    return all(bool(value.isfinite().all()) for value in weights.values())


def forget(work: Path) -> None:
    """Remove what a finished training has left: whoever started it has its outputs.

    Raises:
        ParamsError: another process trains the run already.
    """
    with alone(work):
        shutil.rmtree(work)


def _random(device: torch.device) -> Tensor:
    """State of torch's generators, uint8: the CPU's, then the device's. NumPy draws here from seeds alone."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


@contextmanager
def one_line(folder: Path, what: str) -> Iterator[None]:
    """Errors of a write into ``folder``, for which torch and safetensors have types of their own, as one line."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # torch's writer of files
            raise
        free = shutil.disk_usage(folder).free / 2**20
        raise StateError(
            f"{folder}: {what} ({type(error).__name__}; {free:.0f} MiB are free there): make room, then start again"
        ) from None


@contextmanager
def alone(work: Path) -> Iterator[None]:
    """Hold the work folder: no second process may train the same run. The hold ends with the process, however it ends.

    Raises:
        ParamsError: another process holds it, on this host or, over a shared file system, on another one.
    """
    work.mkdir(parents=True, exist_ok=True)
    own = socket.gethostname()
    with (work / "lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            host, _, pid = handle.read().strip().rpartition(" ")
            where = "this host" if host == own else f"host {host or '?'}, which shares this file system,"
            raise ParamsError(
                f"{work}: process {pid or '?'} of {where} is training this run; end it, or let it end"
            ) from None
        handle.truncate(0)
        handle.write(f"{own} {os.getpid()}")
        handle.flush()
        yield


class StopSignals:
    """While entered, SIGTERM and SIGUSR1 do not end the process but set ``seen``."""

    def __init__(self) -> None:
        self.seen = False

    def __enter__(self) -> StopSignals:
        """Take the signals over; the main thread alone can."""
        self._old = {number: signal.signal(number, self._see) for number in STOPPING}
        return self

    def _see(self, number: int, frame: object) -> None:
        self.seen = True

    def __exit__(self, *error: object) -> None:
        """Hand them back."""
        for number, handler in self._old.items():
            with suppress(TypeError):  # a handler that was not set from Python
                signal.signal(number, handler)
