"""The paper's search for activation ranks: by the error they make in the gradient, within a memory budget.

For a layer with input X (B, N, I) and output gradient dY, and each ε of a grid, every mode keeps the smallest
rank whose explained energy is at least ε, or is whole where that takes all of it; X̃ is X in those ranks, and

    perplexity(ε) = ‖dYᵀ·X̃ - dYᵀ·X‖_F         bytes(ε) = 4·(core + bases)

from one batch. Chosen is the ε of each layer with the smallest sum of perplexities whose bytes fit, by the
integer programme of `choose_options` in place of the paper's table over layers and budget.

Source: arXiv 2510.09160 section 3.3, arXiv 2505.05086.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wasi_export.config import ActivationMode
from wasi_export.cost import saved_input_bytes
from wasi_export.knapsack import Limit, Option, choose_options
from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.activation_ranks import ModeEnergies, ranks_by_energy
from wasi_export.subspace.kinds import Kind
from wasi_export.subspace.moments import InputMoments, PrincipalAxes, leading_axes, mode_energies
from wasi_export.subspace.observe import observed
from wasi_export.subspace.tucker import Bases, compress, reconstruct, token_count

EPSILONS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The paper's grid."""


@dataclass(frozen=True)
class PerplexityPoint:
    """What one ε does to one layer's saved input and to the gradient made from it."""

    epsilon: float
    ranks: ActivationRanks
    gradient_error: float
    """‖G̃ - G‖_F of the weight's gradient."""
    saved_bytes: int
    """Of a training batch."""


def measure_perplexity(
    model: nn.Module,
    layers: Mapping[str, Kind],
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    mode: ActivationMode,
    batch_size: int,
    epsilons: Sequence[float] = EPSILONS,
) -> dict[str, tuple[PerplexityPoint, ...]]:
    """Returns the points of each named layer, from one forward and one backward pass.

    The model runs in evaluation mode, so that dropout is no error; its gradients are not touched.

    Args:
        model: the dense model.
        layers: what can be factored of it, by name.
        images: one batch (B, C, H, W).
        loss: takes the model's output to a scalar.
        mode: which modes of the inputs are compressed.
        batch_size: of the training whose memory is counted.
        epsilons: the grid.
    """
    points: dict[str, tuple[PerplexityPoint, ...]] = {}

    def measure(name: str, kind: Kind) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def attach(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            def look(grad_output: Tensor) -> None:
                # While the backward pass is here: only one layer's gradient is alive at a time.
                x, dY = kind.rows(inputs[0].detach()), kind.output_rows(grad_output)
                points[name] = _points(x, dY, mode, batch_size, epsilons)

            output.register_hook(look)  # type: ignore[no-untyped-call]

        return attach

    hooks = (kind.module.register_forward_hook(measure(name, kind)) for name, kind in layers.items())
    images = images.detach().requires_grad_()  # so that frozen layers have an output gradient as well
    with observed(model, hooks), torch.enable_grad():
        torch.autograd.grad(loss(model(images)), images)
    return {name: points[name] for name in layers if name in points}


def choose_activations(
    points: Mapping[str, Sequence[PerplexityPoint]], budget_bytes: int
) -> dict[str, PerplexityPoint]:
    """Returns the point of each layer with the smallest total gradient error within a budget.

    Raises:
        RankError: the budget is below what the smallest ranks of the grid take.
    """
    groups = [[Option(p.gradient_error, (p.saved_bytes,)) for p in layer] for layer in points.values()]
    chosen = choose_options(groups, [Limit(budget_bytes, "bytes of saved inputs")])
    return {name: layer[i] for (name, layer), i in zip(points.items(), chosen, strict=True)}


@torch.no_grad()
def _points(
    x: Tensor, grad_output: Tensor, mode: ActivationMode, batch_size: int, epsilons: Sequence[float]
) -> tuple[PerplexityPoint, ...]:
    moments = InputMoments()
    moments.add(x)
    feature = PrincipalAxes.of(moments.feature)
    token = PrincipalAxes.of(moments.token) if "token" in mode else None
    batch = PrincipalAxes.of(moments.batch) if "batch" in mode else None
    energies = ModeEnergies(
        in_features=x.shape[-1],
        tokens=token_count(x),
        feature=mode_energies(feature),
        token=mode_energies(token),
        batch=mode_energies(batch),
    )
    dY = grad_output.reshape(-1, grad_output.shape[-1])
    found = []
    for epsilon in epsilons:
        ranks = ranks_by_energy(energies, epsilon)
        modes = ((feature, ranks.feature), (token, ranks.token), (batch, ranks.batch))
        leading = (leading_axes(axes, rank) for axes, rank in modes)
        bases = Bases(*(None if basis is None else basis.to(x) for basis in leading))
        residual = reconstruct(compress(x, bases), bases).reshape(x.shape) - x
        error = dY.T @ residual.reshape(-1, x.shape[-1])
        saved = saved_input_bytes(x.shape[-1], ranks, batch=batch_size, tokens=token_count(x))
        found.append(PerplexityPoint(epsilon, ranks, float(torch.linalg.norm(error)), saved))
    return tuple(found)
