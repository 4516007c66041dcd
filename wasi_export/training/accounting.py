"""Which bytes torch holds, operator by operator, and what they are at the highest point.

A dispatch mode sees every tensor that an operator returns, and a finaliser on its storage sees it go. So the
figure is exact for what torch allocates, repeats to the byte, and needs no real memory: under torch's
`FakeTensorMode` the same steps run on shapes alone (`predict.py`). What a kernel takes and gives back inside
itself is not seen.

What a storage is follows from when it was made: before the steps (parameter, buffer or batch), by an
optimiser's step (state, or scratch that is soon gone), or else activation, workspace or gradient, of which
the last is known once autograd has accumulated it.
"""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wasi_export.step_memory import Kind

KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class LiveBytes:
    """Bytes alive at one moment, by what they are."""

    parameters: int = 0
    """Parameters and buffers."""
    inputs: int = 0
    """The batch."""
    optimizer: int = 0
    """State of the optimiser, and its scratch."""
    gradients: int = 0
    """Accumulated gradients of parameters."""
    activations: int = 0
    """Saved activations and the workspace of the operators."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.parameters + self.inputs + self.optimizer + self.gradients + self.activations


@dataclass
class _Storage:
    size: int
    kind: Kind


class MemoryAccount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of all tensors that operators return while it is entered."""

    def __init__(self) -> None:
        """Makes an account in which nothing is alive."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = LiveBytes()
        """At the moment of the largest total."""
        self.saved_bytes = 0
        """Most activations alive where a backward pass begins: what the forward pass keeps."""
        self.kind: Kind = "activations"
        """Of the storages made from now on."""
        self.moments: list[tuple[float, tuple[int, ...]]] = []
        """Seconds on the clock `perf_counter` and bytes by `KINDS`, after each change."""
        self._live: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._storages: dict[int, _Storage] = {}
        self._in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and counts what it returns."""
        in_backward = torch._C._current_autograd_node() is not None
        if in_backward and not self._in_backward:
            self.saved_bytes = max(self.saved_bytes, self._live["activations"])
        self._in_backward = in_backward
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return _one(args[0])
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.count(leaf)
        return result

    def count(self, tensor: Tensor, kind: Kind | None = None) -> None:
        """Counts the storage of a tensor, once; a kind that is given replaces the one it had."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._storages.get(key)
        if known is None:
            known = self._storages[key] = _Storage(storage.nbytes(), kind or self.kind)
            weakref.finalize(storage, self._forget, key).atexit = False
            self._add(known.kind, known.size)
        elif kind is not None and kind != known.kind:
            self._live[known.kind] -= known.size
            known.kind = kind
            self._add(kind, known.size)

    def _forget(self, key: int) -> None:
        gone = self._storages.pop(key)
        self._live[gone.kind] -= gone.size
        self._note()

    def _add(self, kind: Kind, size: int) -> None:
        self._live[kind] += size
        if sum(self._live.values()) > self.peak.total:
            self.peak = LiveBytes(**self._live)
        self._note()

    def _note(self) -> None:
        self.moments.append((time.perf_counter(), tuple(self._live.values())))


def _one(tensor: Tensor) -> bool | int | float:
    """Returns the number that stands for the unknown value of a fake scalar: true, 1 or 1.0."""
    if tensor.dtype is torch.bool:
        return True
    return 1.0 if tensor.is_floating_point() else 1


@contextmanager
def count_memory(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[MemoryAccount]:
    """Counts the memory of the operators in the block.

    Args:
        model: its parameters and buffers are counted from the start; gradients are recognised by them.
        optimizer: what is made in its steps is its state.
    """
    account = MemoryAccount()
    for tensor in (*model.parameters(), *model.buffers()):
        account.count(tensor, "parameters")

    def begin(*_: Any) -> None:
        account.kind = "optimizer"

    def end(*_: Any) -> None:
        account.kind = "activations"

    def accumulated(parameter: Tensor) -> None:
        if parameter.grad is not None:
            account.count(parameter.grad, "gradients")

    handles = [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
    handles += [
        p.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        with account:
            yield account
    finally:
        for handle in handles:
            handle.remove()
