"""Which memory switches act on which modules of a model while it trains.

    block_recompute       the outermost modules of a class named …Block that hold no batch normalisation
    mlp_recompute         timm's `Mlp` of two factored Linear layers, without dropout or norm between them
    update_in_backward    those blocks, and every other module for itself

Recomputed blocks may hold recomputed MLPs: what then exists of a block while it runs is smaller still.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.mlp import factored_mlp
from wasi_export.training.backward_update import updates_in_backward
from wasi_export.training.recompute import recomputed, replaced_forward

M = TypeVar("M")

BLOCK_CLASSES = ("Block", "BertLayer")
"""How the names of the classes end that a model repeats, in timm and in transformers' text encoders."""


@contextmanager
def saving_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, *, mixed_precision: str = "no"
) -> Iterator[None]:
    """Makes the training steps of a model use the switches of `config.memory`, in place, until it is left.

    Names in the state_dict, evaluation and export are as without.

    Args:
        model: dense or factored, not yet wrapped for several processes.
        optimizer: of the model.
        config: of the training.
        mixed_precision: accelerate's; with `fp16` gradients are scaled until the step.

    Raises:
        ConfigError: a switch finds nothing to act on, or cannot act on this model or optimiser.
    """
    memory = config.memory
    _require_possible(config, mixed_precision)
    blocks = recomputable_blocks(model)
    with ExitStack() as switches:
        if memory.micro_batch is not None:
            _require_no_batch_norm(model)
        if memory.mlp_recompute:
            for mlp in _required(
                recomputable_mlps(model), "mlp_recompute", "MLP of two factored layers"
            ).values():
                switches.enter_context(_recomputed_mlp(mlp))
        if memory.block_recompute:
            for name, block in _required(blocks, "block_recompute", "block").items():
                switches.enter_context(
                    recomputed(block, name=name, chunk=memory.block_chunk, boundary=memory.boundary)
                )
        if memory.update_in_backward:
            switches.enter_context(updates_in_backward(model, blocks.values(), optimizer, config))
        yield


def recomputable_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the outermost blocks without batch normalisation, by name, in model order."""
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in blocks)
        if not inside and type(module).__name__.endswith(BLOCK_CLASSES) and not _batch_norms(module):
            blocks[name] = module
    return blocks


def recomputable_mlps(model: nn.Module) -> dict[str, Mlp]:
    """Returns the MLPs of two factored Linear layers with nothing but an activation between, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Mlp)
        and type(module.fc1) is SubspaceLinear  # a factored 1×1 convolution is one too, on other axes
        and type(module.fc2) is SubspaceLinear
        and isinstance(module.norm, nn.Identity)
        and module.drop1.p == 0
        and next(module.act.parameters(), None) is None
    }


def _recomputed_mlp(mlp: Mlp) -> AbstractContextManager[None]:
    """Makes an MLP keep its codes alone, in place, until the context is left."""
    original: Callable[[Tensor], Tensor] = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return original(x)
        y: Tensor = mlp.drop2(factored_mlp(x, mlp.fc1, mlp.act, mlp.fc2))
        return y

    return replaced_forward(mlp, forward)


def _require_possible(config: TrainConfig, mixed_precision: str) -> None:
    memory = config.memory
    if memory.update_in_backward and mixed_precision == "fp16":
        raise ConfigError(
            "memory.update_in_backward would use the scaled gradients of mixed precision fp16: use bf16"
        )


def _required(modules: dict[str, M], switch: str, wanted: str) -> dict[str, M]:
    if not modules:
        raise ConfigError(f"memory.{switch} finds no {wanted} in this model: set memory.{switch} = false")
    return modules


def _require_no_batch_norm(model: nn.Module) -> None:
    if names := _batch_norms(model):
        raise ConfigError(
            f"memory.micro_batch splits a batch that {names[0] or 'the model'} normalises as a whole: "
            "leave it out"
        )


def _batch_norms(module: nn.Module) -> list[str]:
    return [name for name, inner in module.named_modules() if isinstance(inner, _BatchNorm)]
