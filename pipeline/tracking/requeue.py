"""Queued experiments whose worker was killed: what they had finished is collected, the rest is queued again.

DVC leaves such an experiment "Running" for ever: its message is taken, its stash entry dropped, and nobody collects its
result (DVC 3.67; ``dvc queue kill`` then calls it a success, and it is lost). Everything to go on from is still there:
the commit it was stashed as, and its copy of the repository. This uses DVC's own parts, which are no public interface:
tests/queued.py holds them to what is needed here.

Ours, because DVC's commands (kill, remove, exp run --queue) want all overrides typed again and leave copies behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import psutil

Outcome = Literal["running", "collected", "queued"]


class RequeueError(ValueError):
    """Workers still run; the message is one line that says what to do."""


def requeue(repo: Any, names: tuple[str, ...] = ()) -> dict[str, Outcome]:
    """Bring back every experiment of the queue that its worker has left.

    Args:
        repo: an open ``dvc.repo.Repo``.
        names: experiments that failed (or were killed with ``dvc queue kill``) to queue again, too.

    Returns:
        Per experiment: "running": its process has outlived its worker, ask again when it has ended; "collected": it had
        ended well, and is an experiment now; "queued": it starts with the next ``dvc queue start``.

    Raises:
        RequeueError: a worker runs (what it is at cannot be told from what another has left), or a name is unknown.
    """
    from celery.result import AsyncResult

    queue = repo.experiments.celery_queue
    if pids := list(_workers(Path(queue.wdir))):
        raise RequeueError(
            f"{len(pids)} queue workers run; they end when the queue is empty, or at once with: dvc queue stop"
        )
    done: dict[str, Outcome] = {}
    for message, entry in list(queue._iter_processed()):
        name = entry.name or entry.stash_rev[:7]
        task = AsyncResult(message.headers["id"])
        info = _info(queue, entry)
        process = queue.proc.get(entry.stash_rev)
        if process is not None and process.returncode is None and _alive(process.pid):
            done[name] = "running"
        elif info is not None and info.result_ref and Path(info.root_dir).is_dir():
            _collect(repo, queue, entry, info)
            queue.celery.backend.mark_as_done(task.id, None)
            done[name] = "collected"
        elif not task.ready() or name in names:
            if info is not None and repo.scm.get_ref(info.result_ref or "refs/exps/none") is not None:
                continue  # a success under this name
            _queue_again(repo, queue, message, entry, info)
            if task.ready():
                task.forget()
            done[name] = "queued"
    if unknown := [name for name in names if name not in done]:
        raise RequeueError(f"{unknown[0]}: no experiment of the queue that failed; dvc queue status lists them")
    return done


def _workers(folder: Path) -> Iterator[int]:
    """Process ids of the queue's workers that are alive, from the files DVC keeps of them."""
    for file in folder.glob("dvc-exp-worker-*.json"):
        pid = json.loads(file.read_text(encoding="utf-8"))["pid"]
        if _alive(pid):
            yield pid


def _alive(pid: int) -> bool:
    """Whether a process of DVC has this id: ids are used again, and a dead child of nobody is a zombie."""
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and any("dvc" in word for word in process.cmdline()[:3])
    except psutil.Error:
        return False


def _info(queue: Any, entry: Any) -> Any:
    """What DVC noted of an experiment's copy, or None where it had none yet."""
    try:
        return queue._load_info(entry.stash_rev)
    except (FileNotFoundError, ValueError):
        return None


def _collect(repo: Any, queue: Any, entry: Any, info: Any) -> None:
    """What a worker does when an experiment has ended well: fetch its commit, remove its copy."""
    from dvc.repo.experiments.executor.local import TempDirExecutor
    from dvc.repo.experiments.queue.base import BaseStashQueue

    executor = TempDirExecutor.from_info(info)
    BaseStashQueue.collect_executor(repo.experiments, executor, info.result)
    executor.cleanup(queue.get_infofile_path(entry.stash_rev))


def _queue_again(repo: Any, queue: Any, message: Any, entry: Any, info: Any) -> None:
    """Put an entry back as it was queued first: the same commit on the stash, the same message to the workers."""
    from dvc.repo.experiments.queue.tasks import run_exp
    from dvc.utils.fs import remove

    if queue.failed_stash and entry.stash_rev in queue.failed_stash.stash_revs:
        queue.failed_stash.remove_revs([queue.failed_stash.stash_revs[entry.stash_rev]])
    args, kwargs, _ = message.decode()
    if info is not None:
        remove(info.root_dir)
    remove(Path(queue.get_infofile_path(entry.stash_rev)).parent)
    text = queue.stash.format_message(entry.head_rev, entry.baseline_rev, entry.name, entry.branch)
    repo.scm.set_ref(queue.stash.ref, entry.stash_rev, message=f"commit: {text}")
    queue.celery.purge(message.delivery_tag)
    queue.celery.signature(run_exp.s(*args, **kwargs)).delay()
