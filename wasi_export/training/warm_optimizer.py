"""The state of an optimiser that trained on a board, taken over by the optimiser of a model in torch.

On a board `left` is not brought back to orthonormal columns as in training (`subspace/gauge.py`). The first
moves in torch do that, and take the moments with them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wasi_export.errors import ConfigError
from wasi_export.run_folder import MOMENTS, STEPS


def take_over(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives an optimiser that has taken no step the state of some of its parameters, in place.

    Raises:
        ConfigError: the state is of no parameter that the optimiser has.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = {name: p for name, p in model.named_parameters() if id(p) in held}
    steps = tensors.get(STEPS)
    for key, tensor in tensors.items():
        if key == STEPS:
            continue
        name, _, moment = key.rpartition(".")
        if moment not in MOMENTS or name not in parameters or parameters[name].shape != tensor.shape:
            raise ConfigError(
                f"the optimiser's state has {key} {list(tensor.shape)}, which training does not have: train "
                "what was trained on the board, or remove optimizer.safetensors"
            )
        state = optimizer.state[parameters[name]]
        state[moment] = tensor.to(parameters[name]).clone()
        if steps is not None:
            state["step"] = steps.clone().reshape(())
