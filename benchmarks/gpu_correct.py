"""Parts of the check for a GPU that compare: with the CPU, with single precision, with one process."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.gpu_setting import Setting, must, optimizer_of, unscaled, waits
from pipeline.models.attention_kernel import is_fused, keyed_attention
from pipeline.models.dropout_kernel import keyed_dropout
from pipeline.models.keyed_random import stream_seeds
from pipeline.training.distributed import any_of, backend_of, gather_rows, gathered, summed
from pipeline.training.step import apply_gradients, compute_gradients

LARGE = ((6, 33, 768), (6, 12, 255, 255), (384, 3, 49, 49), (6, 512))  # shapes of layers whose masks are compared


def environment(s: Setting) -> dict[str, Any]:
    """What the figures were measured on."""
    names = ("torch", "transformers", "timm", "numpy", "opencv-python-headless", "triton")
    found: dict[str, Any] = {name: version(name) for name in names}
    found |= {"python": sys.version.split()[0], "cores": os.cpu_count(), "device": s.device.type}
    shared = os.statvfs("/dev/shm")
    found["shm_gb"] = round(shared.f_frsize * shared.f_blocks / 2**30, 2)
    if s.device.type == "cuda":
        about = torch.cuda.get_device_properties(s.device)
        found |= {"name": about.name, "memory_gb": round(about.total_memory / 2**30, 1)}
        found |= {"capability": f"sm_{about.major}{about.minor}", "kernels": torch.cuda.get_arch_list()}
        found |= {"cudnn": torch.backends.cudnn.version(), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def masks(s: Setting) -> dict[str, Any]:
    """Values and gradients of keyed dropout on the device and on the CPU, bit for bit."""
    seeds = stream_seeds(torch.arange(6) * 12345)
    compared = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((6, 33, 96), (6, 2, 65, 65), (24, 3, 49, 49), (6, 512)) if s.tiny else LARGE:
            for whole_rows in (False, True):
                x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                found = []
                for device in (torch.device("cpu"), s.device):
                    on = x.to(device, copy=True).requires_grad_()
                    y = keyed_dropout(on, seeds.to(device), 0.1, whole_rows)
                    y.backward(torch.ones_like(y))
                    assert on.grad is not None
                    found.append((y.detach().cpu(), on.grad.cpu()))
                must(all(map(torch.equal, *found)), f"{dtype} {shape} whole_rows={whole_rows} differs")
                compared += 2 * x.numel()
    return {"values": compared, "equal": True, "attention_off": _attention(s)}


def _attention(s: Setting) -> dict[str, float]:
    """Attention as one operation against the same by torch's operations in float32, on the device: relative distance of
    output and gradients together."""
    if s.device.type != "cuda":
        return {}
    rows, heads, length, width = 4, 12, 131, 64
    draws = torch.Generator(s.device).manual_seed(0)
    given = torch.randn(4, rows, length, heads, width, device=s.device, generator=draws)
    seeds = stream_seeds(torch.arange(rows, device=s.device) * 12345)
    ends = torch.tensor([131, 64, 100, 3], device=s.device).view(rows, 1, 1, 1)
    found: dict[str, float] = {}
    for dtype, limit in ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)):
        values, padding = given.to(dtype), torch.arange(length, device=s.device) >= ends
        results: list[Tensor] = []
        for kind in (dtype, torch.float32):
            q, k, v = (x.transpose(1, 2).to(kind).requires_grad_() for x in values[:3])
            bias = torch.zeros(rows, 1, 1, length, dtype=kind, device=s.device)
            bias = bias.masked_fill_(padding, torch.finfo(dtype).min)
            if not results:
                must(is_fused(q, bias), "attention is not fused")
                out = keyed_attention(q, k, v, bias, seeds, 0.1, width**-0.5)[0]
            else:
                weights = (width**-0.5 * q @ k.transpose(2, 3) + bias).softmax(-1)
                out = (keyed_dropout(weights, seeds, 0.1, False) @ v).transpose(1, 2)
            out.backward(values[3].to(kind))
            assert q.grad is not None and k.grad is not None and v.grad is not None
            parts = (out.detach().transpose(1, 2), q.grad, k.grad, v.grad)
            results.append(torch.cat([x.flatten().double() for x in parts]))
        off = float((results[0] - results[1]).norm() / results[1].norm())
        must(off < limit, f"attention in {dtype} is off by {off}")
        found[str(dtype).removeprefix("torch.")] = round(off, 8)
    return found


def precision(s: Setting) -> dict[str, Any]:
    """Correctness of a step: see the head of this module."""
    small: dict[str, Any] = {"batch_size": min(16, s.batch), "length_groups": 2}
    config = s.config(**small)
    batch = s.method(config).collate(s.draws(config))
    gradients: dict[str, Tensor] = {}
    losses: dict[str, float] = {}
    ways: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}, "pieces": {"micro_batch": 4}}
    if s.device.type == "cuda":
        ways["fp16"] = {"precision": "fp16"}
    for way, train in ways.items():
        method = s.method(s.config(**{**small, **train}))
        scaler = torch.amp.GradScaler(s.device.type, enabled=way == "fp16", init_scale=1024.0)
        losses[way] = float(compute_gradients(method, batch, scaler)[0])
        flat = [p.grad.flatten().float() for p in method.net.parameters() if p.grad is not None]
        gradients[way] = torch.cat(flat).double().cpu() / (1024 if way == "fp16" else 1)
    found: dict[str, Any] = {}
    for way in (w for w in ways if w != "fp32"):
        found[f"cosine_{way}"] = round(
            float(nn.functional.cosine_similarity(gradients[way], gradients["fp32"], dim=0)), 6
        )
        found[f"loss_{way}"] = round(losses[way] / losses["fp32"] - 1, 6)
    limit = 0.8 if s.tiny else 0.999  # BatchNorms of a tiny model are over few values
    must(all(value > limit for name, value in found.items() if name.startswith("cosine")), f"gradients differ: {found}")
    found |= _scaler(s, small, batch)
    method = s.method(config)
    optimizer = optimizer_of(method)
    loss, *_ = compute_gradients(method, batch)
    method.net.log_scale.grad = torch.full_like(method.net.log_scale, float("nan"))
    before = [p.detach().clone() for p in method.net.parameters()]
    broken = float(apply_gradients(method.net, optimizer, unscaled(s), loss)[0])
    kept = all(map(torch.equal, before, method.net.parameters()))
    must(broken > 0 and kept, "a gradient that is not finite was not seen, or reached the weights")
    return found | {"nan_seen": True, "waits_a_step": waits(s, s.method(s.config(**small, precision=s.half)), batch)}


def _scaler(s: Setting, small: dict[str, Any], batch: Any) -> dict[str, Any]:
    """Steps that a scale of 2^40 takes to come down to one that fits."""
    method = s.method(s.config(**small, precision="fp16" if s.device.type == "cuda" else "fp32"))
    optimizer, scaler = optimizer_of(method), torch.amp.GradScaler(s.device.type, init_scale=2.0**40)
    scales = [2.0**40]
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        loss, *_ = compute_gradients(method, batch, scaler)
        scales.append(float(apply_gradients(method.net, optimizer, scaler, loss)[1]))
        if scales[-1] == scales[-2]:
            break
    must(scales[-1] == scales[-2] and np.isfinite(float(loss)), "the scale never settled")
    return {"scale_settled_at": scales[-1], "skipped": len(scales) - 2}


def collectives(s: Setting) -> dict[str, Any]:
    """One process: what NCCL (gloo on the CPU) makes of each collective we use, and of DDP."""
    backend, port = backend_of(s.device, from_cpu=True), 29500 + os.getpid() % 1000
    own = s.device if s.device.type == "cuda" else None
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=0, world_size=1, device_id=own)
    try:
        x = torch.randn(4, 8, device=s.device, requires_grad=True)
        both = gathered(x)[0] + summed(x)
        both.sum().backward()
        must(
            torch.equal(both.detach(), 2 * x.detach()) and x.grad is not None and bool(x.grad.eq(2).all()),
            "a collective changed its input",
        )
        flags, row = any_of([True, False], s.device), gather_rows(torch.arange(3.0), s.device)
        must(flags == [True, False] and row.tolist() == [[0, 1, 2]], f"flags are {flags}, a row is {row}")
        rows = torch.empty(1, 3, dtype=torch.int64)  # from CPU to CPU, as mixed runs send sizes
        dist.all_gather_into_tensor(rows.flatten(), torch.arange(3))
        must(rows.tolist() == [[0, 1, 2]], f"on the CPU a row is {rows}")
        config = s.config(batch_size=min(16, s.batch))
        method = s.method(config)
        batch = method.collate(s.draws(config))
        alone = float(compute_gradients(method, batch)[0])
        method.module = nn.parallel.DistributedDataParallel(method.net, broadcast_buffers=False)
        method.net.zero_grad(set_to_none=True)
        loss = float(compute_gradients(method, batch)[0])
        must(abs(loss - alone) < 1e-3 * abs(alone), f"DDP's loss is {loss}, without it {alone}")
        return {"backend": backend, "ddp_loss": round(loss, 5)}
    finally:
        dist.destroy_process_group()
