"""Short forms of the drill in fuzz.py: damaged inputs of every format are read or refused in one line."""

from collections import Counter

import pytest

from tests.fuzz import fuzz, outcomes
from tests.fuzz_formats import FORMATS

BY_CODECS = ("picture", "checkpoint")  # which may crash, so that they have a process of their own
FEW = {"params": 15, "prompts": 15, "protocol": 15}


def test_damaged_pictures_are_read_or_refused():
    found = fuzz("picture", 0, 600)
    assert not found["wrong"] and not found["crashed"] and sum(found["outcomes"].values()) == 600
    assert found["outcomes"]["read"] > 20 and len(found["outcomes"]) > 15


def test_damaged_checkpoints_are_read_or_refused():
    found = fuzz("checkpoint", 0, 300)
    assert not found["wrong"] and not found["crashed"] and found["outcomes"]["read"] > 3 and len(found["outcomes"]) == 3


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in BY_CODECS])
def test_damaged_inputs_are_read_or_refused(kind, tmp_path):
    found = [row for row in outcomes(kind, range(FEW.get(kind, 120)), tmp_path) if row[1]]
    assert not [row for row in found if row[3]]
    assert len(found) == FEW.get(kind, 120)
    assert len(Counter(outcome for _, outcome, *_ in found)) <= 2 + FORMATS[kind].whole


def test_the_drill_asks_for_a_million_inputs():
    assert sum(form.inputs for form in FORMATS.values()) == 1_000_000
