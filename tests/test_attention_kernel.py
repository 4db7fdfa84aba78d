"""Attention with keyed dropout as a GPU computes it: in Triton's interpreter, and compiled for absent cards."""

import pytest
import torch

from pipeline.models.attention_kernel import is_fused
from tests.conftest import run_python

INTERPRETED = """
import torch
from pipeline.models.attention_kernel import backward_by_triton, forward_by_triton
from pipeline.models.keyed_random import keyed_mask, stream_seeds

torch.manual_seed(0)
for dtype, most in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
    for heads, length, width in ((2, 40, 16), (3, 5, 32), (1, 33, 64)):
        seeds = stream_seeds(torch.randint(-2**62, 2**62, (3,)))
        q, k, v = (torch.randn(3, length, heads, width).to(dtype).transpose(1, 2) for _ in range(3))
        k = k.contiguous()  # strides of each their own
        ends = torch.tensor([length, length // 2, length - 1]).view(3, 1, 1, 1)
        bias = torch.zeros(3, 1, 1, length, dtype=dtype)
        bias.masked_fill_(torch.arange(length) >= ends, torch.finfo(dtype).min)
        grad = torch.randn(3, length, heads, width).to(dtype)

        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        mask = keyed_mask(seeds, (1, heads, length, length), 0.3)[:, 0]
        weights = (0.2 * exact[0] @ exact[1].transpose(2, 3) + bias.double()).softmax(-1)
        wanted = (weights.masked_fill(mask, 0) / 0.7 @ exact[2]).transpose(1, 2)
        wanted.backward(grad.double())

        out, logs = forward_by_triton(q, k, v, bias, seeds, 0.3, 0.2)
        found = backward_by_triton(q, k, v, bias, seeds, out, logs, grad, 0.3, 0.2)
        pairs = [(out, wanted.detach()), *((f.transpose(1, 2), x.grad) for f, x in zip(found, exact))]
        for mine, theirs in pairs:
            assert (mine.double() - theirs).norm() < most * theirs.norm(), (dtype, heads, length, width)
"""

COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.models import attention_kernel, attention_triton, dropout_triton

POINTERS = {"seeds": "*i32", "logs": "*fp32"}
NUMBERS = {"scale": "fp32", "factor": "fp32"}
INPUTS = {"q", "k", "v", "x", "bias", "out", "grad", "grad_q", "grad_k", "grad_v"}
attention = {"WIDTH": max(attention_kernel.WIDTHS), "BLOCK": attention_kernel.BLOCK}
kernels = {
    attention_triton.forward: attention,
    attention_triton.backward_queries: attention,
    attention_triton.backward_keys: attention,
    dropout_triton.kernel: {"DIMENSIONS": 4, "BLOCK": 1024},
}
for card in sys.argv[1:]:
    capability, dtype = card.split(":")
    for kernel, constants in kernels.items():
        kind = {name: "constexpr" if name in constants else f"*{dtype}" if name in INPUTS
                else POINTERS.get(name) or NUMBERS.get(name, "i32") for name in kernel.arg_names}
        made = triton.compile(ASTSource(kernel, kind, constants), target=GPUTarget("cuda", int(capability), 32))
        assert made.asm["cubin"] and made.metadata.shared <= 64 << 10, (card, kernel, made.metadata.shared)
"""


def test_the_kernels_compute_attention_with_the_masks_of_the_cpu():
    """Output and gradients against float64, with padded texts, and lengths that are no multiple of a block."""
    run_python(INTERPRETED, TRITON_INTERPRET="1")


def compiles(folder, *cards):
    """For a card that need not be there, into machine code whose programs fit the 64 KiB that all cards have."""
    run_python(COMPILED, *cards, TRITON_CACHE_DIR=str(folder), TRITON_INTERPRET="0")


def test_the_kernels_compile_for_an_h100(tmp_path):
    compiles(tmp_path, "90:bf16")


@pytest.mark.drill
def test_the_kernels_compile_for_every_card_and_type(tmp_path):
    kinds = ("bf16", "fp16", "fp32")  # of which sm_75 lacks the first
    compiles(tmp_path, *(f"{card}:{kind}" for card in (75, 80, 86, 90, 120) for kind in kinds[card == 75 :]))


def test_what_is_fused():
    """Plain attention to all tokens of a text, on a GPU, of heads that the kernels have room for."""
    query, bias = torch.zeros(2, 3, 5, 16, device="meta"), torch.zeros(2, 1, 1, 5, device="meta")
    assert not is_fused(query, bias)  # no GPU

    class OnGpu(torch.Tensor):
        is_cuda = True

    query = query.as_subclass(OnGpu)
    assert is_fused(query, bias)
    assert not is_fused(query, None) and not is_fused(query, torch.zeros(2, 1, 5, 5, device="meta"))
    assert not is_fused(torch.zeros(2, 3, 5, 20, device="meta").as_subclass(OnGpu), bias)
