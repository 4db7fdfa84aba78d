"""Trainings of mixed runs: the same bits again and after a kill, and what evaluation gets of them."""

import csv

import pytest
import torch

from pipeline import pretrain
from tests.conftest import make_mixed


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def train(corpus, out):
    best = pretrain.train(corpus, out / "model", out / "history.csv", out / "work", lambda values, step: None)
    with (out / "history.csv").open() as handle:
        return best, list(csv.DictReader(handle))


def test_two_trainings_are_bit_identical(corpus, tmp_path):
    folder = corpus(make_mixed())
    best, rows = train(folder, tmp_path / "a")
    print(rows)
    assert train(folder, tmp_path / "b")[0] == best
    files = [{p.name: p.read_bytes() for p in (tmp_path / x / "model").iterdir()} for x in "ab"]
    assert files[0] == files[1]
