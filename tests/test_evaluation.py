"""Where models are evaluated."""

import torch

from pipeline.evaluation.device import evaluation_device


def test_models_are_evaluated_in_as_many_threads_as_params_say():
    before = torch.get_num_threads()
    try:
        for threads in (before + 1, 1):
            evaluation_device(threads)
            assert torch.get_num_threads() == threads
        evaluation_device(0)
        assert torch.get_num_threads() == 1  # left as it is
    finally:
        torch.set_num_threads(before)
