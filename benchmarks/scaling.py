"""What a step costs a process as processes and batch grow, by formula and measured: python -m benchmarks.scaling

1, 2 and 4 gloo processes train the demo's two encoders on made-up studies, the global batch being the same. Every
figure of docs/scaling.md that this machine can show is put beside its formula: bytes of weights, gradients and
optimizer; bytes that autograd keeps until the backward pass; bytes a process sends, as the kernel counts them; seconds
a step, by the clock and of the processor. Then the paper's encoders, with random weights, are weighed: parameters,
floating-point operations and kept bytes a study.

Processes use one thread each; where they are more than the cores, they wait for each other. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.load import load_params
from pipeline.config.params import ImageEncoder, TextEncoder
from pipeline.config.run_config import RunConfig, run_config
from pipeline.models.cxr_clip import CxrClip
from pipeline.training.batches import Batch
from pipeline.training.distributed import Process
from pipeline.training.losses import Embeddings, cxr_clip_loss
from pipeline.training.methods.cxr_clip import CxrClipMethod

CPU = torch.device("cpu")
ALONE = Process(CPU)
FLOAT = 4  # bytes
PAIRS = 6  # of embeddings the loss compares: four of MVS, ICL, TCL
SAMPLES = 4  # embeddings of a study: two images, two texts
WORLDS = (1, 2, 4)
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
PAPER_VOCABULARY, PAPER_TOKENS = 28996, 90  # BioClinicalBERT's words; a text's length
PAPER = {
    "resnet": ImageEncoder("resnet50", False),
    "swin": ImageEncoder("swin_tiny_patch4_window7_224", False),
}


@dataclass(frozen=True)
class System:
    """Processes (one a GPU), studies a step, and what the makers publish of a GPU: operations a second of dense half
    precision; bytes a second to its neighbours in the node, and to other nodes through the ports of its node."""

    world: int
    batch: int
    operations: float
    link: float
    ports: float = float("inf")


SYSTEMS = {  # NVIDIA's data sheets: V100 SXM2 and H100 SXM, NVLink in one direction, eight ports of 400 Gb/s a node
    "4 x V100": System(4, 128, 125e12, 150e9),
    "8 x H100": System(8, 128, 989e12, 450e9),
    "64 x 8 H100": System(512, 16384, 989e12, 450e9, 8 * 50e9),
}


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a model: numbers of weights, of those trained, of BatchNorm layers and of the channels
    under them; width of an embedding."""

    weights: int
    trained: int
    norms: int
    normed: int
    dim: int

    @classmethod
    def of(cls, net: CxrClip) -> Shape:
        """That of a model."""
        return cls(
            weights=sum(p.numel() for p in net.parameters()),
            trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
            norms=sum(isinstance(m, _BatchNorm) for m in net.modules()),
            normed=sum(m.num_features for m in net.modules() if isinstance(m, _BatchNorm)),
            dim=net.image_projection.out_features,
        )


def state_bytes(shape: Shape) -> int:
    """Weights, gradients and AdamW's two moments of a process, in float32, whatever the number of processes."""
    return FLOAT * (shape.weights + 3 * shape.trained)


def loss_bytes(shape: Shape, local: int, batch: int) -> int:
    """What the loss keeps for the backward pass of ``local`` studies against all ``batch``.

    Both directions of each pair keep a block of log-probabilities [local, batch] and one factor [local, dim]; and all
    embeddings are kept once, the process's own and the gathered ones.
    """
    return FLOAT * (2 * PAIRS * local * (batch + shape.dim) + SAMPLES * (local + batch) * shape.dim)


def sent_bytes(shape: Shape, world: int, batch: int) -> dict[str, float]:
    """What a process sends in a step, the mean over processes, by gloo's ways.

    A ring's all-reduce of N bytes sends 2 (w - 1) / w N, an all-gather of N bytes in all (w - 1) / w N. gloo's
    reduce-scatter is an all-reduce of which a part is kept; NCCL's sends (w - 1) / w N.
    """
    share = (world - 1) / world
    embeddings = FLOAT * SAMPLES * batch * shape.dim
    return {
        "gradients": 2 * share * FLOAT * shape.trained,
        "embeddings": share * embeddings,
        "their gradients": 2 * share * embeddings,
        "BatchNorm": 4 * 2 * share * FLOAT * shape.normed,  # mean and variance, forward and backward
    }


def calls(shape: Shape) -> int:
    """Collectives of a step that a process waits for: mean and variance of each of our BatchNorms, forward and backward
    (torch's on GPUs: one call each way); embeddings forward and backward, one bucket of gradients that no computation
    is left to hide, the loss."""
    return 4 * shape.norms + 4


def of(net: CxrClip, config: RunConfig, process: Process = ALONE) -> CxrClipMethod:
    """The method of a model whose batches are made up, so that it needs no tokenizer."""
    return CxrClipMethod(net, None, config, process)  # type: ignore[arg-type]


def made_up(config: RunConfig, studies: int, tokens: int, vocabulary: int) -> Batch:
    """A batch of noise: two images and two texts of ``tokens`` ids a study, in one length group."""
    rng = torch.Generator().manual_seed(0)
    size, texts = config.image_size, 2 * studies
    return Batch(
        images=torch.randint(0, 256, (2 * studies, size, size), dtype=torch.uint8, generator=rng),
        tokens=(torch.randint(5, vocabulary, (texts, tokens), generator=rng),),
        mask=(torch.ones(texts, tokens, dtype=torch.int64),),
        order=torch.arange(texts),
        places=torch.arange(studies),
        keys=torch.arange(studies),
        labels=torch.zeros(studies, dtype=torch.int64),
        studies=studies,
    )


@contextmanager
def kept(model: nn.Module | None = None) -> Iterator[dict[int, int]]:
    """Bytes of each piece of memory that autograd keeps for the backward pass, by address, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()} if model else set()
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield held


def work(rank: int, world: int, port: int, config: RunConfig, options: argparse.Namespace, answers: Any) -> None:
    """One process of a training; puts what it measured."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world)
    vocabulary = config.text_encoder.vocabulary
    torch.manual_seed(0)
    net = CxrClip(config, vocabulary).train()
    method = of(net, config, Process(CPU, rank, world))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    batch = made_up(config, config.train.batch_size // world, options.tokens, vocabulary)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        method.loss(batch)[0].backward()
        optimizer.step()

    def meet() -> None:
        if world > 1:
            dist.barrier()

    def timed(do: Any) -> tuple[float, float]:
        meet()
        clock, processor = time.perf_counter(), time.process_time()
        do()
        return time.perf_counter() - clock, time.process_time() - processor

    step()
    step()  # DDP orders its buckets anew after the first
    meet()
    seconds, cpu_seconds = zip(*(timed(step) for _ in range(options.steps)), strict=True)
    sent = counted(meet, step, options.steps) - counted(meet, lambda: None, options.steps)
    with kept(net) as held:
        loss = method.loss(batch)[0]
        activations = sum(held.values())
        loss.backward()
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    tensors = [*net.parameters(), *(p.grad for p in net.parameters() if p.grad is not None), *moments]
    flat, small = torch.zeros(Shape.of(net).trained), torch.zeros(64)
    reduce = [timed(lambda: dist.all_reduce(flat))[0] for _ in range(options.steps)] if world > 1 else [0.0]
    call = [timed(lambda: dist.all_reduce(small))[0] for _ in range(10 * options.steps)] if world > 1 else [0.0]
    answers.put(
        {
            "rank": rank,
            "state": sum(x.nbytes for x in tensors),
            "activations": activations,
            "sent": sent / options.steps,
            "seconds": min(seconds),  # the step that others on the machine disturbed least
            "cpu_seconds": statistics.median(cpu_seconds),
            "all_reduce_seconds": min(reduce),
            "call_seconds": statistics.median(call),
        }
    )
    meet()
    if world > 1:
        dist.destroy_process_group()


def counted(meet: Any, do: Any, times: int) -> int:
    """Bytes this process wrote, to sockets above all, while all did something ``times`` times between two meetings."""
    meet()
    before = _written()
    for _ in range(times):
        do()
    meet()
    return _written() - before


def _written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def demo(encoder: str, batch: int) -> RunConfig:
    """A run of the demo with ``batch`` studies a step."""
    config = run_config(load_params(Path("profiles/demo.yaml")), f"{encoder}_m")
    return replace(config, train=replace(config.train, batch_size=batch, precision="fp32", device="cpu"))


def run(world: int, config: RunConfig, options: argparse.Namespace) -> dict[str, float]:
    """Measure ``world`` processes: seconds by the clock as the longest of them, all else as their mean."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")  # spares each process the seconds of importing torch
    answers = context.Queue()
    processes = [
        context.Process(target=work, args=(rank, world, port, config, options, answers)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    mean = {key: statistics.mean(one[key] for one in found) for key in ("state", "activations", "sent", "cpu_seconds")}
    times = ("seconds", "all_reduce_seconds", "call_seconds")
    return mean | {key: max(one[key] for one in found) for key in times}


def loss_kept(dim: int, local: int, batch: int) -> int:
    """Measured bytes that the loss keeps."""
    config = run_config(load_params(Path("profiles/demo.yaml")), "resnet_m")
    mine, everyone = (
        Embeddings(*(torch.randn(n, dim, requires_grad=True) for _ in range(SAMPLES))) for n in (local, batch)
    )
    with kept() as held:
        loss = cxr_clip_loss(mine, torch.tensor(10.0, requires_grad=True), config.loss, everyone, 0)
        total = sum(held.values())
    del loss
    return total


def weigh(encoder: str) -> dict[str, float]:
    """The paper's model: its numbers, operations a study in a training step (three times those of the forward pass),
    and bytes kept a study, as the difference of two studies and one; float32, and bfloat16 under autocast."""
    config = replace(
        run_config(load_params(Path("profiles/paper.yaml")), "resnet_m"),
        image_encoder=PAPER[encoder],
        text_encoder=TextEncoder("", PAPER_VOCABULARY, {"model_type": "bert", **BERT_BASE}, 256),
    )
    torch.manual_seed(0)
    net = CxrClip(config, PAPER_VOCABULARY).train()
    shape = Shape.of(net)
    figures: dict[str, float] = asdict(shape)
    for precision in ("fp32", "bf16"):
        run = replace(config, train=replace(config.train, precision=precision))
        sizes = []
        for studies in (2, 3):
            with kept(net) as held:
                loss = of(net, run).loss(made_up(run, studies, PAPER_TOKENS, PAPER_VOCABULARY))
                sizes.append(sum(held.values()))
            del loss
        figures[f"kept_{precision}"] = sizes[1] - sizes[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        of(net, fp32(config)).loss(made_up(config, 1, PAPER_TOKENS, PAPER_VOCABULARY))
    figures["flop"] = 3 * counter.get_total_flops()
    return figures


def project(paper: dict[str, float], system: System) -> dict[str, float]:
    """What the formulas give for one process of a system: gigabytes held and sent, and the least milliseconds that
    computing and sending can take at the published rates. Between nodes every ring leaves through each port in turn, so
    that the ports of a node together carry what one of its processes sends."""
    local = system.batch // system.world
    shape = Shape(**{field.name: int(paper[field.name]) for field in fields(Shape)})
    sent = sent_bytes(shape, system.world, system.batch)
    rate = min(system.link, system.ports)
    return {
        "studies": local,
        "state_gb": (state_bytes(shape) + FLOAT * shape.trained) / 1e9,  # DDP's buckets are a second copy of gradients
        "kept_gb": local * paper["kept_bf16"] / 1e9,
        "loss_mb": loss_bytes(shape, local, system.batch) / 1e6,
        "loss_whole_mb": FLOAT * 2 * PAIRS * system.batch**2 / 1e6,  # if each process held all logits
        "gradients_sent_gb": sent["gradients"] / 1e9,
        "embeddings_sent_mb": 2 * sent["embeddings"] / 1e6,  # there and, by NCCL's reduce-scatter, back
        "norm_sent_mb": sent["BatchNorm"] / 1e6,
        "compute_ms": 1e3 * local * paper["flop"] / system.operations,
        "gradients_ms": 1e3 * sent["gradients"] / rate,
        "embeddings_ms": 2e3 * sent["embeddings"] / rate,
    }


def fp32(config: RunConfig) -> RunConfig:
    """The same without autocast."""
    return replace(config, train=replace(config.train, precision="fp32"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="studies a step over all processes")
    parser.add_argument("--tokens", type=int, default=24, help="of a text of the demo")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--no-paper", action="store_true", help="leave the paper's encoders out: 3 GB less")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, Any] = {"batch": options.batch, "cores": cores, "load": round(os.getloadavg()[0], 1)}
    for encoder in ("resnet", "swin"):
        figures[f"demo_{encoder}"] = compare(encoder, options, cores)
    if not options.no_paper:
        for encoder in PAPER:
            paper = weigh(encoder)
            print(f"paper, {encoder}: {paper}", flush=True)
            figures[f"paper_{encoder}"] = paper
            for name, system in SYSTEMS.items():
                found = {key: round(value, 3) for key, value in project(paper, system).items()}
                print(f"  {name}, {system.batch} studies a step, by formula: {found}", flush=True)
    print(json.dumps(figures))


def compare(encoder: str, options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """[formula, measured] of each quantity for each number of processes."""
    whole = demo(encoder, options.batch)
    shape = Shape.of(CxrClip(whole, whole.text_encoder.vocabulary))
    print(f"demo, {encoder}: {shape}, batch {options.batch}")
    figures: dict[str, Any] = {}
    alone = {b: run(1, demo(encoder, b), options) for b in {options.batch // world for world in WORLDS}}
    for world in WORLDS:
        local = options.batch // world
        found = alone[local] if world == 1 else run(world, whole, options)
        parts = sent_bytes(shape, world, options.batch)
        # What a process computes with its share alone, times how many share a core, and then what it waits for.
        waits = calls(shape) * found["call_seconds"] + found["all_reduce_seconds"]
        expected = max(1.0, world / cores) * alone[local]["seconds"] + waits
        kept_alone = alone[local]["activations"]
        gathered = loss_bytes(shape, local, options.batch) - loss_bytes(shape, local, local) if world > 1 else 0
        line: dict[str, list[float]] = {
            "state": [state_bytes(shape), found["state"]],
            "activations": [kept_alone + gathered, found["activations"]],
            "loss": [loss_bytes(shape, local, options.batch), loss_kept(shape.dim, local, options.batch)],
            "sent": [sum(parts.values()), found["sent"]],
            "cpu_seconds": [alone[local]["cpu_seconds"], found["cpu_seconds"]],
            "seconds": [expected, found["seconds"]],
        }
        rounded = {key: [round(x, 4) for x in pair] for key, pair in line.items()}
        print(f"{world} processes, [formula, measured]: {rounded}")
        print("  sent by formula: " + ", ".join(f"{key} {value:.0f}" for key, value in parts.items()), flush=True)
        alone_seconds = {key: round(found[key], 5) for key in ("all_reduce_seconds", "call_seconds")}
        print(f"  alone: {alone_seconds}, {calls(shape)} calls", flush=True)
        figures[f"world_{world}"] = {**rounded, **alone_seconds}
    return figures


if __name__ == "__main__":
    main()
