"""A module that keeps its input alone and runs again in the backward pass.

    forward     y = module(x) without a graph, on `chunk` samples at a time; x is saved, in fp32 or in bf16
    backward    for each chunk: y' = module(x') with a graph, and its gradients by autograd; those of the
                parameters are summed over the chunks

So between forward and backward the module holds one tensor of the size of its input, and while it runs the
workspace of one chunk. The gradient is the module's own, up to the order of the sums, where its samples do
not meet (no batch normalisation) and x is kept in fp32; the price is a second forward pass. What is random
in the module (dropout, stochastic depth) draws the same numbers again.

`torch.utils.checkpoint` is the same idea for the whole batch. Chunks need an own function: as many calls of
checkpoint would add up the gradients of a parameter one by one in its `.grad`, and nothing could tell when
the last one has come, which `backward_update.py` waits for.

Source: arXiv 1604.06174 (recomputation by segments).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from wasi_export.config import BoundaryType
from wasi_export.errors import UnsupportedModelError
from wasi_export.subspace.autocast import AutocastSetting
from wasi_export.subspace.chunks import chunks

Forward = Callable[..., Any]


@contextmanager
def recomputed(
    module: nn.Module, *, name: str, chunk: int | None = None, boundary: BoundaryType = "fp32"
) -> Iterator[None]:
    """Makes a module recompute, in place, until the block is left.

    Only passes that will be differentiated change; parameters, buffers and their names stay as they are.

    Args:
        module: takes samples along the first axis of its first argument, returns one tensor of as many.
        name: of the module, for errors.
        chunk: samples that run at a time; None: all. Calls with a further argument that may go sample by
            sample with the first (three axes or more, the first as long) run as a whole.
        boundary: how the input is kept.
    """
    original: Forward = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        parameters = [p for p in module.parameters() if p.requires_grad]
        differentiated = torch.is_grad_enabled() and (x.requires_grad or parameters)
        if not differentiated or torch.compiler.is_exporting():
            return original(x, *args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        others = [leaves[i] for i in positions]
        size = chunk
        if size is None or any(_may_be_per_sample(leaf, x) for leaf in leaves):
            size = len(x)
        call = _Call(name, original, leaves, spec, positions, chunk=size, boundary=boundary)
        return _Recompute.apply(call, x, *others, *parameters)

    with replaced_forward(module, forward):
        yield


@contextmanager
def replaced_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Gives a module another forward function, in place, until the block is left."""
    former = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if former is None:
            del module.forward  # the class's own again
        else:
            module.forward = former


def _may_be_per_sample(leaf: object, x: Tensor) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim >= 3 and len(x) == len(leaf) > 1


@dataclass(frozen=True)
class _Call:
    """One call of a module: all of its arguments but the first."""

    name: str
    forward: Forward
    leaves: list[Any]
    spec: TreeSpec
    positions: list[int]
    """Which of the leaves are differentiated."""
    chunk: int
    boundary: BoundaryType

    def __call__(self, x: Tensor, others: list[Tensor]) -> Tensor:
        leaves = list(self.leaves)
        for position, other in zip(self.positions, others, strict=True):
            leaves[position] = other
        args, kwargs = tree_unflatten(leaves, self.spec)
        y = self.forward(x, *args, **kwargs)
        if not isinstance(y, Tensor) or len(y) != len(x):
            raise UnsupportedModelError(
                f"{self.name} does not return one tensor of as many samples as it was given, and cannot be "
                "recomputed: set memory.block_recompute = false"
            )
        return y


@dataclass(frozen=True)
class _RandomState:
    """The random generators that a module on this device draws from."""

    device: torch.device
    cpu: Tensor
    devices: tuple[list[int], list[Tensor]]

    @classmethod
    def of(cls, x: Tensor) -> "_RandomState":
        return cls(
            x.device, torch.get_rng_state(), get_device_states(x) if x.device.type != "cpu" else ([], [])
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Sets the generators back, and puts them where they were at the end."""
        indices, states = self.devices
        kind = self.device.type if indices else "cuda"
        with torch.random.fork_rng(devices=indices, device_type=kind):
            torch.set_rng_state(self.cpu)
            if indices:
                set_device_states(indices, states, device_type=self.device.type)
            yield


class _Recompute(torch.autograd.Function):
    """y = call(x, others); its inputs are x, the other differentiated arguments and the parameters."""

    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, *shared: Tensor) -> Tensor:
        others = list(shared[: len(call.positions)])
        ctx.call, ctx.dtype, ctx.autocast = call, x.dtype, AutocastSetting.of(x)
        ctx.random = []
        y: Tensor | None = None
        for samples in chunks(x, call.chunk):
            ctx.random.append(_RandomState.of(x))
            part = call(x[samples], others)
            if len(part) == len(x):
                y = part
                break
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            y[samples] = part
        assert y is not None
        kept = x.to(torch.bfloat16) if call.boundary == "bf16" and x.dtype is torch.float32 else x
        ctx.save_for_backward(kept, *shared)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        x, *shared = ctx.saved_tensors
        others, parameters = shared[: len(call.positions)], shared[len(call.positions) :]
        others = [other.detach().requires_grad_() for other in others]
        needs_x = ctx.needs_input_grad[1]
        grad_x: Tensor | None = None
        sums: list[Tensor | None] = [None] * (len(others) + len(parameters))
        for samples, random in zip(chunks(x, call.chunk), ctx.random, strict=True):
            part = x[samples].to(ctx.dtype).detach().requires_grad_(needs_x)
            with random.again(), torch.enable_grad(), ctx.autocast.again():
                y = call(part, others)
            wanted = [*([part] if needs_x else []), *others, *parameters]
            found = list(torch.autograd.grad(y, wanted, grad_output[samples], allow_unused=True))
            del y
            if needs_x:
                grad_part = found.pop(0)
                if len(part) == len(x):
                    grad_x = grad_part
                elif grad_part is not None:
                    grad_x = torch.empty_like(x, dtype=ctx.dtype) if grad_x is None else grad_x
                    grad_x[samples] = grad_part
                del grad_part
            for index, grad in enumerate(found):
                known = sums[index]
                sums[index] = grad if known is None or grad is None else known.add_(grad)
            del found
        return None, grad_x, *sums
