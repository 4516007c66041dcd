"""Second moments of the inputs of Linear layers, from a calibration pass.

For a layer with input X (B, …, N, I): `feature` is Σ x·xᵀ over all tokens (I×I), what whitening and the
feature basis need; `token` is Σ over images of X·Xᵀ (N×N), for the token basis, kept for 3-D inputs only.
Sums are fp64, so that their order does not matter and neither does the batch size.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wasi_export.progress import Track, silent


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


@dataclass
class InputMoments:
    """Second moments of one layer's input; None until it has seen one."""

    feature: Tensor | None = None
    token: Tensor | None = None
    token_count: int | None = None

    def add(self, x: Tensor) -> None:
        """Adds a batch of inputs (B, …, I), in place."""
        flat = x.reshape(-1, x.shape[-1])
        feature = (flat.T @ flat).double()
        if self.feature is None:
            self.feature, self.token_count = feature, x.shape[1] if x.ndim == 3 else None
        else:
            self.feature = self.feature + feature
        if x.ndim != 3 or x.shape[1] != self.token_count:
            self.token = self.token_count = None
            return
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
    """Returns the input moments of the named layers over the batches (B, C, H, W).

    The model runs in evaluation mode and is left in the mode it was in.
    """
    moments = {name: InputMoments() for name in layers}

    hooks = [layer.register_forward_pre_hook(_recorder(moments[name])) for name, layer in layers.items()]
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for images in track(batches, "calibrate", total):
            model(images.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    return moments


def _recorder(moments: InputMoments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        moments.add(inputs[0])

    return record
