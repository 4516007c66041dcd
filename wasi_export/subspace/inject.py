"""Puts `SubspaceLinear` layers into any torch module, as a plan says."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from wasi_export.config import SubspaceConfig
from wasi_export.errors import UnsupportedModelError
from wasi_export.progress import Track, silent
from wasi_export.ranks import LayerPlan, Plan
from wasi_export.subspace.conv import SubspaceConv1x1
from wasi_export.subspace.kinds import Kind, kind_of
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.planner import MeasuredLayer, MeasuredModel, decide, measure_layers
from wasi_export.subspace.refit import refit_layers


def factorize_model(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: SubspaceConfig,
    *,
    total: int,
    batch_size: int | None = None,
    track: Track = silent,
) -> Plan:
    """Replaces the targeted layers by pairs of factors, in place; returns what was decided.

    Args:
        model: any module; its other parameters are left as they are.
        batches: calibration inputs (B, C, H, W); not read where nothing depends on them.
        config: which layers, which method, which ranks.
        total: number of batches, for the progress display.
        batch_size: of training, for `config.activation_memory_mb`.
        track: progress display.

    Raises:
        UnsupportedModelError: no layer matches.
        ConfigError: there is a budget of activations and no `batch_size`.
        RankError: an explicit rank is above what a layer has, or the budgets cannot be met.
        NothingToCheckError: there are no calibration inputs.
    """
    kept: list[Tensor] = []
    measured = measure_layers(
        model, _keep(batches, kept), config, total=total, batch_size=batch_size, track=track
    )
    plan = decide(measured, config)
    factor_layers(model, measured, plan, images=torch.cat(kept) if kept else None, track=track)
    return plan


def factor_layers(
    model: nn.Module,
    measured: MeasuredModel,
    plan: Plan,
    *,
    images: Tensor | None = None,
    track: Track = silent,
) -> None:
    """Replaces the layers that the plan factors, in place.

    Args:
        model: that was measured.
        measured: gives the directions of the factors and the first bases of the inputs.
        plan: decided from it, or made elsewhere for the same model.
        images: calibration inputs (B, C, H, W), all at once; for the method `sequential`.
        track: progress display.

    Raises:
        UnsupportedModelError: the plan is not of this model.
    """
    known = {layer.spectrum.name: layer for layer in measured.layers}
    pairs = {decision.name: _empty_pair(model, decision) for decision in plan.factored}
    for name, (kind, layer) in pairs.items():
        if name not in known:
            raise UnsupportedModelError(
                f"the plan factors {name}, which is not among the targets: plan and subspace.include differ"
            )
        _fill(layer, kind, known[name])
    if any(decision.method == "sequential" for decision in plan.factored) and images is not None:
        gradients = {name: known[name].gradients for name in pairs}
        refit_layers(model, pairs, images, gradients=gradients, track=track)
    else:
        for name, (_, layer) in pairs.items():
            model.set_submodule(name, layer)


def install_layers(model: nn.Module, plan: Plan) -> None:
    """Puts factored layers where the plan says, in place, ready for `load_state_dict`.

    Until then they are those of `Kind.empty_layer`; no random number is drawn.

    Raises:
        UnsupportedModelError: the model has no such layer, or one of another shape.
    """
    for decision in plan.factored:
        _, layer = _empty_pair(model, decision)
        model.set_submodule(decision.name, layer)


@torch.no_grad()
def fold_layers(model: nn.Module, names: Iterable[str]) -> None:
    """Multiplies the factors of some layers out, in place: dense layers again, W = left·right."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SubspaceLinear)
        sizes, bias = (layer.in_features, layer.out_features), layer.bias is not None
        if isinstance(layer, SubspaceConv1x1):
            dense: nn.Linear | nn.Conv2d = nn.Conv2d(*sizes, 1, stride=layer.stride, bias=bias)
        else:
            dense = nn.Linear(*sizes, bias=bias)
        dense.to(layer.left).train(layer.training)
        dense.weight.copy_((layer.left @ layer.right).view_as(dense.weight))
        if dense.bias is not None and layer.bias is not None:
            dense.bias.copy_(layer.bias)
        model.set_submodule(name, dense)


def subspace_layers(model: nn.Module) -> Iterator[tuple[str, SubspaceLinear]]:
    """Yields the factored layers with their names."""
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLinear):
            yield name, module


def _keep(batches: Iterable[Tensor], kept: list[Tensor]) -> Iterator[Tensor]:
    """Yields the batches and puts them into a list."""
    for batch in batches:
        kept.append(batch)
        yield batch


def _empty_pair(model: nn.Module, decision: LayerPlan) -> tuple[Kind, SubspaceLinear]:
    """Returns the layer of a model that a plan factors, and the factored one that is to take its place."""
    try:
        module = model.get_submodule(decision.name)
    except AttributeError:
        module = None
    kind = None if module is None else kind_of(module)
    sizes = (decision.out_features, decision.in_features)
    if not isinstance(kind, Kind) or (kind.out_features, kind.in_features) != sizes:
        raise UnsupportedModelError(
            f"the plan factors {decision.name} ({decision.out_features}×{decision.in_features}), "
            f"the model has {module}: give the model that the plan was made for"
        )
    return kind, kind.empty_layer(decision)


@torch.no_grad()
def _fill(layer: SubspaceLinear, kind: Kind, measured: MeasuredLayer) -> None:
    """Copies factors, bias and the bases' starting points into a layer, in place."""
    left = measured.leading[:, : layer.rank].to(kind.weight.device)
    layer.left.copy_(left)
    layer.right.copy_(left.T @ kind.weight.float())
    if layer.bias is not None and kind.bias is not None:
        layer.bias.copy_(kind.bias)
    bases = ((layer.feature_basis, measured.feature_axes), (layer.token_basis, measured.token_axes))
    for basis, axes in bases:
        if basis is not None and axes is not None:
            basis.copy_(axes[:, : basis.shape[1]])
