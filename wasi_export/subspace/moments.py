"""Second moments of the inputs of layers, as rows, from a calibration pass.

For a layer with input X (B, …, I), N = … tokens: `feature` is Σ x·xᵀ over all tokens (I×I), what whitening
and the feature basis need; `token` is Σ over samples of X·Xᵀ (N×N), for the token basis, up to 1024 tokens;
`batch` is the moment of the samples of the first batch (B×B), for the rank of the batch mode.
`collect_gradients` does the same for the gradients at their outputs, from backward passes.
The product of a batch is of the precision of its input, and the sum of the products is fp64: the order of the
batches does not matter, and their size changes no more than the rounding of the products.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from wasi_export.progress import Track, silent
from wasi_export.subspace.conv import input_rows
from wasi_export.subspace.kinds import Kind
from wasi_export.subspace.observe import observed
from wasi_export.subspace.tucker import token_count

MOST_TOKENS = 1024
"""Of an input with a token moment. The 3136 pixels of a Swin's first stage would need one of 79 MB a layer,
and its eigenvectors."""

GRADIENT_SAMPLES = 8
"""Samples that run at a time where gradients are taken, so that this needs less memory than training."""


@dataclass(frozen=True)
class PrincipalAxes:
    """Eigenvalues [n] of a second moment, largest first, and the eigenvectors [n, n] as columns; fp64."""

    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, moment: Tensor | None) -> "PrincipalAxes | None":
        """Returns the axes of a moment; None where it is missing or not finite."""
        if moment is None or not torch.isfinite(moment).all():
            return None
        values, vectors = torch.linalg.eigh(moment)
        return cls(values.flip(0), vectors.flip(1))


def leading_axes(axes: PrincipalAxes | None, rank: int | None) -> Float[Tensor, "n rank"] | None:
    """Returns the first axes as an fp32 basis; None where there are none, or the mode is whole (no rank)."""
    return None if axes is None or rank is None else axes.vectors[:, :rank].float().contiguous()


def mode_energies(axes: PrincipalAxes | None) -> NDArray[np.float64] | None:
    """Returns the eigenvalues [n], largest first; None where there are no axes."""
    return None if axes is None else axes.values.cpu().numpy()


@dataclass
class InputMoments:
    """Second moments of one layer's input; None until it has seen one."""

    feature: Tensor | None = None
    token: Tensor | None = None
    token_count: int | None = None
    batch: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Adds a batch of inputs (B, …, I), in place."""
        flat = x.reshape(-1, x.shape[-1])
        feature = (flat.T @ flat).double()
        tokens = token_count(x)
        if self.feature is None:
            self.feature, self.token_count = feature, tokens if 1 < tokens <= MOST_TOKENS else None
            rows = x.reshape(len(x), -1)
            self.batch = (rows @ rows.T).double()
        else:
            self.feature = self.feature + feature
        if tokens != self.token_count:
            self.token = self.token_count = None
            return
        x = x.reshape(len(x), tokens, -1)
        token = torch.einsum("bni,bmi->nm", x, x).double()
        self.token = token if self.token is None else self.token + token


@torch.no_grad()
def collect_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Tensor],
    *,
    total: int,
    track: Track = silent,
) -> dict[str, InputMoments]:
    """Returns the input moments of the named layers, dense or factored, over the batches (B, C, H, W).

    The model runs in evaluation mode and is left in the mode it was in.
    """
    moments = {name: InputMoments() for name in layers}
    hooks = (layer.register_forward_pre_hook(_recorder(moments[name])) for name, layer in layers.items())
    device = next(model.parameters()).device
    with observed(model, hooks):
        for images in track(batches, "calibrate", total):
            model(images.to(device))
    return moments


def collect_gradients(
    model: nn.Module,
    layers: Mapping[str, Kind],
    batches: Iterable[Tensor],
    scalar: Callable[[nn.Module, Tensor], Tensor],
    *,
    total: int,
    track: Track = silent,
) -> dict[str, Tensor]:
    """Returns the mean over all rows of g·gᵀ (O×O), g the gradient of a scalar at a named layer's output.

    The model runs in evaluation mode and is left in the mode it was in; the gradients of its parameters are
    not touched. A layer that the scalar does not depend on is missing.

    Args:
        model: any module.
        layers: by name.
        batches: inputs (B, C, H, W); some samples of them run at a time.
        scalar: of the model and inputs.
        total: number of batches, for the progress display.
        track: progress display.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = (kind.module.register_forward_hook(keep(name)) for name, kind in layers.items())
    device = next(model.parameters()).device
    with observed(model, hooks):
        for batch in track(batches, "sensitivity", total):
            for images in torch.split(batch.to(device), GRADIENT_SAMPLES):
                images = images.detach()
                if images.is_floating_point():
                    images.requires_grad_()  # so that frozen layers have an output gradient as well
                with torch.enable_grad():
                    value = scalar(model, images)
                found = torch.autograd.grad(value, list(outputs.values()), allow_unused=True)
                for name, grad in zip(outputs, found, strict=True):
                    if grad is not None:
                        flat = layers[name].output_rows(grad).reshape(-1, layers[name].out_features)
                        sums[name] = sums.get(name, 0) + (flat.T @ flat).double()
                        rows[name] = rows.get(name, 0) + len(flat)
                outputs.clear()
    return {name: moment / rows[name] for name, moment in sums.items()}


def _recorder(moments: InputMoments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(input_rows(layer, inputs[0]))

    return record
