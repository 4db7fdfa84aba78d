"""A training step on a GPU that is not there: torch's fake tensors know where they are and what shape they have, and
each operation on them that would start a kernel is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
FREE = {  # operations that start no kernel
    *("aten::detach", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", "aten::view"),
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"),
}
KERNELS = {"cxr::keyed_attention_backward": 2}  # launches of an operation that has several
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}  # for which Python waits for the device


class Trace(TorchDispatchMode):
    """While entered, counts launches by operation, the bytes that they read and write, and waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation, and count it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        read, written = ([x for x in tree_leaves(of) if isinstance(x, Tensor)] for of in ((args, kwargs), out))
        if name.startswith("prim::") or not any(x.device.type == "cuda" for x in (*read, *written)):
            return out
        places = {x.device.type for x in (*read, *written)}
        copies = name in ("aten::_to_copy", "aten::copy_") and len(places) > 1
        if name in WAITS or (copies and not (kwargs or {}).get("non_blocking")):
            self.waits[name] += 1
        if not func.is_view and name not in FREE:
            self.launches[name] += KERNELS.get(name, 1)
            self.bytes += sum(x.numel() * x.element_size() for x in (*read, *written))
        return out


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """Fake tensors may be on a CUDA device here, autocast works there, and ``Tensor.backward`` runs in Python: torch's
    own engine asks the driver about the device. Modules stay where they are: see ``onto_cuda``."""
    tensor = torch.tensor

    def unpinned(*values: Any, pin_memory: bool = False, **how: Any) -> Tensor:
        return tensor(*values, **how)

    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        mock.patch.object(torch, "tensor", unpinned),
        mock.patch.object(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
        mock.patch.object(Tensor, "backward", backward),
        mock.patch.object(nn.Module, "to", lambda module, *_, **__: module),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        yield mode


def onto_cuda(module: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on the GPU."""
    for part in module.modules():
        for name, p in part._parameters.items():
            if p is not None:
                like = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=CUDA)
                part._parameters[name] = nn.Parameter(like, p.requires_grad)
        for name, b in part._buffers.items():
            if b is not None:
                part._buffers[name] = torch.empty_strided(b.shape, b.stride(), dtype=b.dtype, device=CUDA)


@torch.no_grad()
def backward(root: Tensor, gradient: Tensor | None = None) -> None:
    """What autograd's engine does: each node once all that follow it are done, its gradients added up and cast to what
    it put out."""
    given: dict[Any, list[Tensor | None]] = {root.grad_fn: [torch.ones_like(root) if gradient is None else gradient]}
    waits: Counter[Any] = Counter()
    seen, todo = {root.grad_fn}, [root.grad_fn]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                waits[node] += 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    ready = [root.grad_fn]
    while ready:
        node = ready.pop()
        grads = given.pop(node, [])
        grads += [None] * (len(node._input_metadata) - len(grads))  # outputs that nothing was made of
        if hasattr(node, "variable"):
            (grad,) = grads or [None]
            if grad is not None:
                node.variable.grad = grad if node.variable.grad is None else node.variable.grad + grad
            continue
        found: Any = [None] * len(node.next_functions)
        if any(grad is not None for grad in grads):
            found = node(*grads) if callable(node) else node.apply(*grads)
        for (after, place), grad in zip(
            node.next_functions, found if isinstance(found, tuple) else [found], strict=False
        ):
            if after is None:
                continue
            if grad is not None:
                shape, dtype = tuple(after._input_metadata[place].shape), after._input_metadata[place].dtype
                grad = grad if tuple(grad.shape) == shape else grad.sum_to_size(shape)
                grad = grad.to(dtype)
                slots = given.setdefault(after, [])
                slots += [None] * (place + 1 - len(slots))
                had = slots[place]
                slots[place] = grad if had is None else had + grad
            waits[after] -= 1
            if not waits[after]:
                ready.append(after)
