"""What an interrupted training goes on from: its state on disk, and whether that state is of this very training.

The work folder of a run holds ``state.pt`` (written whole or not at all) and ``best-<epoch>.safetensors``, the weights
of the best epoch that the state knows of. Neither holds code: they are read as tensors, numbers and text alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.config.records import ParamsError
from pipeline.config.run_config import SPEED, RunConfig
from pipeline.storage.atomic import replacing
from pipeline.text.tokenizer import Tokenizer
from pipeline.training.distributed import gather_rows

EXIT_STOPPED = 75  # of a training that a signal stopped: sysexits.h's "try again later"
STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # pre-emption; and what SLURM can be told to send ahead of it
# All modules that compute the training: those of the stage's dependencies in dvc.yaml.
CODE = (
    "study.py",
    *(f"models/{m}.py" for m in ("checkpoint", "cxr_clip", "encoders", "keyed_dropout", "keyed_random")),
    *(f"models/{m}.py" for m in ("masked_tokens", "mixed", "vectors")),
    *(f"storage/{m}.py" for m in ("evaluation_crop", "files", "index", "memory", "pictures", "shards")),
    *(f"text/{m}.py" for m in ("eda", "prompts", "sentences", "tokenizer", "translations")),
    *(f"training/{m}.py" for m in ("augment", "batch_norm", "batches", "declip", "distributed", "losses", "loop")),
    *(f"training/{m}.py" for m in ("mixed_batches", "mixed_losses", "resume", "sampling", "schedule", "step")),
    "training/throughput.py",
    "text/synonyms.yaml",
)
LIBRARIES = ("torch", "transformers", "tokenizers", "timm", "numpy", "opencv-python-headless")
# Keys of train that change no result; what ``device`` comes to is told apart by itself.
INDIFFERENT = (*SPEED, "device")


class StateError(OSError):
    """The training state could not be written or read: one line that says what to do."""


class Stopped(Exception):
    """A signal asked the training to stop, and its state is saved."""


class Stateful(Protocol):
    """Model, optimizer, schedule, scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers and text alone."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over such a state."""


@dataclass
class Progress:
    """Where a training stands. ``epoch`` epochs are done, and ``step`` steps of the next one.

    ``sums`` to ``flops`` are of the epoch that runs: its loss terms added up, the seconds it took so far, those of them
    it waited for data, and this process's FLOPs. ``curve`` holds (step from the start, loss) every so many steps.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    waited: float = 0.0
    flops: float = 0.0
    rows: list[dict[str, float]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    best_epoch: int = -1

    def end_step(self, values: dict[str, float]) -> None:
        """Count a step and its loss terms."""
        self.step += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def end_epoch(self, row: dict[str, float]) -> None:
        """Count an epoch and its row of the history."""
        self.rows.append(row)
        self.epoch, self.step, self.sums = self.epoch + 1, 0, {}
        self.seconds = self.waited = self.flops = 0.0

    def finished(self, epochs: int, patience: int) -> bool:
        """Whether all epochs are done, or ``patience`` (0 = any number) of them in a row have not been the best."""
        return self.epoch >= epochs or 0 < patience < self.epoch - self.best_epoch


def identity(config: RunConfig, corpus: Path, tokenizer: Tokenizer, device: torch.device) -> dict[str, str]:
    """Digests of all that decides a training's result, by name; a state is used only where all of them agree.

    The number of processes is none of them: the studies of a step, their draws and the negatives do not depend on it.
    """
    settings = asdict(config)
    for key in INDIFFERENT:
        del settings["train"][key]
    own = Path(config.text_encoder.name)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        words = _digest(sorted(Path(folder).iterdir()))
    return {
        "parameters": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "studies": _digest([corpus / "studies.parquet"]),
        "translations": _digest(sorted(corpus.glob("translations.parquet"))),
        "prompts": _digest(sorted((corpus / "prompts").glob("*.json"))),
        "tokenizer": words,
        "text encoder": _digest(sorted(p for p in own.iterdir() if p.is_file())) if own.name and own.is_dir() else "",
        "code": _digest([Path(__file__).parents[1] / name for name in CODE]),
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "device": device.type,
    }


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


class Saved:
    """The state of one training in its work folder. Rank 0 writes; all ranks of the process group call each method."""

    def __init__(
        self, work: Path, identity: dict[str, str], parts: Mapping[str, Stateful], device: torch.device, rank: int
    ) -> None:
        """``parts``: what has a state of its own, by name, one of them ``model``."""
        self.work = work
        self.identity = identity
        self.parts = parts
        self.device = device
        self.rank = rank

    @property
    def state(self) -> Path:
        """The file of the state."""
        return self.work / "state.pt"

    def best(self, epoch: int) -> Path:
        """The file of the weights after an epoch that was the best."""
        return self.work / f"best-{epoch}.safetensors"

    def load(self) -> Progress:
        """Bring all parts to where the saved training stood, and say so; a state that is not of this training is
        left aside, and that is said, too.

        Raises:
            StateError: the file cannot be read now, or not all ranks see the same one.
        """
        saved, reason = self._read()
        place = [saved["progress"]["epoch"], saved["progress"]["step"]] if saved else [-1, -1]
        if any(other != place for other in gather_rows(torch.tensor(place), self.device).tolist()):
            raise StateError(f"{self.work}: not all processes see the same training state; it must be on a file system "
                             "that all nodes share")  # fmt: skip
        if reason and self.rank == 0:
            print(f"{self.work}: {reason}; training starts anew")
        progress = Progress()
        if saved:
            for name, part in self.parts.items():
                part.load_state_dict(saved[name])
            self._set_random(saved["random"][self.rank % len(saved["random"])])
            progress = Progress(**saved["progress"])
            if self.rank == 0:
                print(f"{self.work}: training goes on in epoch {progress.epoch} at step {progress.step}")
        if self.rank == 0:
            self._tidy(progress if saved else None)
        return progress

    def _read(self) -> tuple[dict[str, Any] | None, str]:
        """The saved state where it can be used, else why not ("" where there is none)."""
        try:
            saved = torch.load(self.state, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return None, ""
        except OSError as error:
            raise StateError(f"{self.state}: cannot be read ({error.strerror}); see to it, or remove it") from None
        except Exception as error:  # damaged on the disk: torch has a dozen types for it
            return None, f"the saved state is damaged ({type(error).__name__})"
        was = saved["identity"]
        if was != self.identity:
            changed = [name for name in sorted({*was, *self.identity}) if was.get(name) != self.identity.get(name)]
            return None, f"the saved state is of another training ({', '.join(changed)} changed)"
        if saved["progress"]["best_epoch"] >= 0 and not self.best(saved["progress"]["best_epoch"]).is_file():
            return None, "the weights of the best epoch are gone"
        return saved, ""

    def save(self, progress: Progress) -> None:
        """Replace the saved state by the present one. Where ``progress.best_epoch`` has just ended, its weights are
        kept first; those that no state names any more are removed last. A model that is no longer finite is not saved:
        nothing good can come of it, and the next step will say so.

        Raises:
            StateError: it could not be written; the state before it is whole. All ranks raise it, and rank 0 says why.
        """
        weights = self.parts["model"].state_dict()
        if not all(bool(v.isfinite().all()) for v in weights.values()):
            return
        random = list(gather_rows(_random(self.device), self.device))
        failure = ""
        if self.rank == 0:
            try:
                with one_line(self.work, "the training state could not be saved, and the one before it is kept"):
                    best = self.best(progress.best_epoch)
                    if progress.best_epoch >= 0 and not best.exists():
                        with replacing(best) as partial:
                            save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, partial)
                    states = {name: part.state_dict() for name, part in self.parts.items()}
                    with replacing(self.state) as partial:
                        told = {"identity": self.identity, "progress": asdict(progress), "random": random}
                        torch.save({**told, **states}, partial)
                    self._tidy(progress)
            except StateError as error:
                failure = str(error)
        if gather_rows(torch.tensor([int(bool(failure))]), self.device).any():
            raise StateError(failure)

    def restore_best(self, net: nn.Module, epoch: int) -> None:
        """Give a model the weights it had after the best epoch."""
        net.load_state_dict(load_file(self.best(epoch)), strict=True)

    def _tidy(self, progress: Progress | None) -> None:
        """Remove what is neither the state nor the best model it names; all, where there is none to go on from."""
        keep = {"lock"} | ({self.state.name, self.best(progress.best_epoch).name} if progress else set())
        for stray in self.work.iterdir():
            if stray.name not in keep:
                stray.unlink()

    def _set_random(self, state: Tensor) -> None:
        size = len(torch.get_rng_state())
        torch.set_rng_state(state[:size].clone())
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state[size:].clone(), self.device)


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
        ParamsError: another process holds it.
    """
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise ParamsError(
                f"{work}: process {handle.read().strip() or '?'} is training this run; end it, or let it end"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
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
