"""Several processes: they stop together, whatever makes one of them stop, and go on together."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.training.batches import epoch_draws
from tests.conftest import make_config, make_corpus

ROOT = Path(__file__).parents[1]
# Two ranks in forked processes, once for every line of the input: a JSON list of the folder of outputs, a free port,
# and what happens to rank 1 in its seventh step. It answers with how each rank ended.
TWO = """
import dataclasses, json, multiprocessing, os, signal, sys
from pathlib import Path
import pandas, timm, tokenizers.implementations, torch, transformers
from pipeline.config import run_config
from pipeline.models import cxr_clip
from pipeline.training import loop

torch.set_num_threads(1)
corpus = Path(sys.argv[1])
cxr_clip.CxrClip(run_config.read_run_config(corpus / "run.json"), 100)  # what is imported when it is first needed
context = multiprocessing.get_context("fork")

def work(rank, out, port, event, ended):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    sys.stdout = (out / "said").open("a", buffering=1)
    real, count = loop.compute_gradients, [0]
    def gradients(method, *rest):
        count[0] += 1
        if rank == 1 and count[0] == 7:
            if event == "nan":
                net = method.net
                forward = net.forward
                def broken(*inputs):
                    images, texts, scale = forward(*inputs)
                    return images * torch.tensor([1.0, float("nan"), 1.0, 1.0] * 2)[:, None], texts, scale
                net.forward = broken
            elif event:
                os.kill(os.getpid(), getattr(signal, event))
        return real(method, *rest)
    loop.compute_gradients = gradients
    if event == "SIGSTOP":  # whoever waits for it shall not wait long
        join = loop.join
        loop.join = lambda device, options, **how: join(device, dataclasses.replace(options, timeout_minutes=0.15))
    try:
        loop.train_run(corpus, out / "model", out / "history.csv", out / "work", lambda values, step: None)
        ended.put((rank, "done", ""))
    except BaseException as error:
        ended.put((rank, type(error).__name__, str(error)))

for line in sys.stdin:
    out, port, event = json.loads(line)
    Path(out).mkdir(exist_ok=True)
    ended = context.Queue()
    ranks = [context.Process(target=work, args=(rank, Path(out), port, event, ended)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    ranks[0].join(100)
    ranks[1].join(0 if event == "SIGSTOP" else 100)  # one that was stopped stays so
    told = {}
    while not ended.empty():
        rank, *how = ended.get()
        told[rank] = how
    for rank in ranks:
        rank.kill()
        rank.join()
    print(json.dumps([told.get(0), told.get(1)]), flush=True)
"""


@pytest.fixture(scope="module")
def two(studies, prompts, tmp_path_factory):
    """A function that trains by two processes; what it answers, and the corpus."""
    folder = tmp_path_factory.mktemp("two")
    run = make_config(train={"timeout_minutes": 1.5})  # for slow machines
    make_corpus(folder, run, studies, prompts)
    with subprocess.Popen(
        [sys.executable, "-c", TWO, str(folder / "corpus")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:

        def train(out, event=""):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            process.stdin.write(json.dumps([str(out), port, event]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield train, folder / "corpus"
        process.kill()


@pytest.fixture(scope="module")
def whole(two, tmp_path_factory):
    """The outputs of an undisturbed training."""
    out = tmp_path_factory.mktemp("whole")
    assert two[0](out) == [["done", ""], ["done", ""]]
    return outputs(out)


def outputs(out):
    with (out / "history.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    return rows, {p.name: p.read_bytes() for p in sorted((out / "model").iterdir())}


def test_a_signal_to_one_rank_stops_all_after_the_same_step(two, whole, tmp_path):
    train, _ = two
    stopped = train(tmp_path, "SIGTERM")
    assert stopped[0] == stopped[1] and stopped[0][0] == "Stopped"
    assert "in epoch 1 after step 2; the state is saved" in stopped[0][1]
    assert train(tmp_path) == [["done", ""], ["done", ""]]
    assert outputs(tmp_path) == whole
    assert "resumes in epoch 1 at step 2" in (tmp_path / "said").read_text()


def test_a_study_of_another_rank_is_named_by_the_first(two, whole, tmp_path, studies):
    train, _ = two
    first, second = train(tmp_path, "nan")
    run = make_config()
    training = [s for d in run.datasets for s in studies if s.dataset == d and s.split == "train"]
    study = training[epoch_draws(40, 8, run.seed, 1)[1][1::2][1, 1]]  # rank 1 has each second study
    assert first[0] == "FloatingPointError" and second == ["FloatingPointError", ""]
    assert f"in epoch 1 at step 1, from studies {study.dataset}/{study.patient}/{study.study}; lower" in first[1]
    assert train(tmp_path) == [["done", ""], ["done", ""]]  # from the end of the first epoch
    assert outputs(tmp_path) == whole


@pytest.mark.parametrize("event", ["SIGKILL", "SIGSTOP"])
def test_a_lost_rank_ends_the_others_with_an_error(two, whole, tmp_path, event):
    """One that is dead is noticed at once, one that does not answer after ``train.timeout_minutes``: 9 seconds here."""
    train, _ = two
    first, second = train(tmp_path, event)
    assert first is not None and first[0] in ("RuntimeError", "DistBackendError") and second is None
    assert train(tmp_path) == [["done", ""], ["done", ""]]
    assert outputs(tmp_path) == whole


def test_ranks_that_see_different_states_do_not_start(two, tmp_path):
    """The state is on a disk of one node alone."""
    import torch

    from pipeline.training import resume
    from pipeline.training.distributed import Process

    parts = {"model": torch.nn.Linear(1, 1)}
    saved = resume.Saved(tmp_path, {"a": "b"}, parts, Process(torch.device("cpu")))
    saved.save(resume.Progress(epoch=1, step=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "gather_rows", lambda row, device: torch.stack([row, torch.tensor([-1, -1])]))
        with pytest.raises(resume.StateError, match="must be on a file system that all nodes share"):
            saved.load()
    assert saved.load().step == 3


RESTARTED = """
import os, signal, sys
from pathlib import Path
import torch
from pipeline.config.params import Train
from pipeline.training.distributed import any_of, join

cpu = torch.device("cpu")
process = join(cpu, Train(device="cpu", precision="fp32", timeout_minutes=0.1))
rank, world = process.rank, process.world
said = any_of([rank == 1], cpu)
if rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] != "2":
    os.kill(os.getpid(), signal.SIGKILL)
any_of([True], cpu)
# Each into its own file: on one pipe two ranks' lines may mix.
(Path(sys.argv[1]) / str(rank)).write_text(f"rank {rank} of {world} heard {said}")
torch.distributed.destroy_process_group()
"""


def test_a_restarted_attempt_joins(tmp_path):
    """torchrun's store still holds the addresses of the killed attempts: whoever met them would wait for the dead."""
    (tmp_path / "script.py").write_text(RESTARTED)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = (*torchrun, str(tmp_path / "script.py"), str(tmp_path))
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert (tmp_path / str(rank)).read_text() == f"rank {rank} of 2 heard [True]"


def test_another_number_of_processes_goes_on(two, whole, tmp_path):
    """The studies of each step are the same, so one process ends where two would, up to rounding."""
    from pipeline.training import loop

    train, corpus = two
    assert train(tmp_path, "SIGTERM")[0][0] == "Stopped"
    loop.train_run(corpus, tmp_path / "model", tmp_path / "history.csv", tmp_path / "work", lambda values, step: None)
    rows = outputs(tmp_path)[0]
    assert len(rows) == len(whole[0])
    for one, by_two in zip(rows, whole[0], strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(by_two["train_loss"]), rel=1e-4)
        assert float(one["valid_loss"]) == pytest.approx(float(by_two["valid_loss"]), rel=1e-3)
