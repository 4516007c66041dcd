"""Puts `SubspaceLinear` layers into any torch module, by name patterns and a plan."""

from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from wasi_export.config import SubspaceConfig
from wasi_export.errors import UnsupportedModelError
from wasi_export.progress import Track, silent
from wasi_export.ranks import (
    ActivationRanks,
    LayerPlan,
    Plan,
    choose_rank,
    energy_rank,
    explained_energy,
)
from wasi_export.subspace.factorize import Spectrum, plain_spectrum, whitened_spectrum
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.moments import InputMoments, PrincipalAxes, collect_moments


def target_layers(model: nn.Module, config: SubspaceConfig) -> dict[str, nn.Linear]:
    """Returns the Linear layers whose names match `include` and not `exclude`, in model order.

    Raises:
        UnsupportedModelError: there is none.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    targets = {name: layer for name, layer in linears.items() if _is_target(name, config)}
    if not targets:
        raise UnsupportedModelError(
            f"no Linear layer matches {', '.join(config.include)}; the model has "
            f"{', '.join(list(linears)[:6]) or 'none'}: set subspace.include"
        )
    return targets


def factorize_model(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: SubspaceConfig,
    *,
    total: int,
    track: Track = silent,
) -> Plan:
    """Replaces the targeted Linear layers by pairs of factors, in place; returns what was decided.

    Args:
        model: any module; its other parameters are left as they are.
        batches: calibration inputs (B, C, H, W); not read for plain factors without compressed activations.
        config: which layers, which method, which ranks.
        total: number of batches, for the progress display.
        track: progress display.

    Raises:
        UnsupportedModelError: no layer matches.
        RankError: an explicit rank is above what a layer has.
    """
    targets = target_layers(model, config)
    moments: Mapping[str, InputMoments] = {}
    if config.method == "whitened" or config.activation != "none":
        moments = collect_moments(model, targets, batches, total=total, track=track)
    decisions = []
    for name, linear in track(targets.items(), "factorize", len(targets)):
        seen = moments.get(name, InputMoments())
        feature = PrincipalAxes.of(seen.feature)
        token = PrincipalAxes.of(seen.token) if config.activation == "feature+token" else None
        weight = linear.weight.detach()
        spectrum = (
            whitened_spectrum(weight, feature) if config.method == "whitened" else plain_spectrum(weight)
        )
        activation = ActivationRanks(
            feature=_energy_rank(feature, config) if config.activation != "none" else None,
            token=_energy_rank(token, config),
            token_count=None if token is None else seen.token_count,
        )
        decision = _decide(name, linear, spectrum, activation, config)
        decisions.append(decision)
        if decision.rank is not None:
            layer = _empty_layer(linear, decision)
            _fill(layer, linear, spectrum, feature, token)
            model.set_submodule(name, layer)
    return Plan(activation_mode=config.activation, layers=tuple(decisions))


def install_layers(model: nn.Module, plan: Plan) -> None:
    """Puts empty factored layers where the plan says, in place, ready for `load_state_dict`.

    Raises:
        UnsupportedModelError: the model has no such layer, or one of another shape.
    """
    for decision in plan.factored:
        linear = dict(model.named_modules()).get(decision.name)
        if not isinstance(linear, nn.Linear) or linear.weight.shape != (
            decision.out_features,
            decision.in_features,
        ):
            raise UnsupportedModelError(
                f"the plan factors {decision.name} ({decision.out_features}×{decision.in_features}), "
                f"the model has {linear}: give the model that the plan was made for"
            )
        model.set_submodule(decision.name, _empty_layer(linear, decision))


def subspace_layers(model: nn.Module) -> Iterator[tuple[str, SubspaceLinear]]:
    """Yields the factored layers with their names."""
    for name, module in model.named_modules():
        if isinstance(module, SubspaceLinear):
            yield name, module


def _is_target(name: str, config: SubspaceConfig) -> bool:
    included = any(fnmatchcase(name, pattern) for pattern in config.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in config.exclude)


def _decide(
    name: str, linear: nn.Linear, spectrum: Spectrum, activation: ActivationRanks, config: SubspaceConfig
) -> LayerPlan:
    values = spectrum.singular_values.cpu().numpy()
    rank, reason = choose_rank(values, linear.out_features, linear.in_features, config)
    return LayerPlan(
        name=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        rank=rank,
        method=None if rank is None else spectrum.method,
        energy=None if rank is None else explained_energy(values, rank),
        activation=ActivationRanks() if rank is None else activation,
        reason="; ".join(filter(None, (reason, spectrum.note))),
    )


def _energy_rank(axes: PrincipalAxes | None, config: SubspaceConfig) -> int | None:
    """Returns the rank that keeps `activation_epsilon` of a mode's energy; None where that is all of it."""
    if axes is None:
        return None
    needed = energy_rank(axes.values.clamp_min(0).sqrt().cpu().numpy(), config.activation_epsilon)
    return needed if needed < len(axes.values) else None


def _empty_layer(linear: nn.Linear, decision: LayerPlan) -> SubspaceLinear:
    assert decision.rank is not None
    layer = SubspaceLinear(
        decision.in_features,
        decision.out_features,
        decision.rank,
        bias=linear.bias is not None,
        activation=decision.activation,
    )
    return layer.to(linear.weight.device, linear.weight.dtype).train(linear.training)


@torch.no_grad()
def _fill(
    layer: SubspaceLinear,
    linear: nn.Linear,
    spectrum: Spectrum,
    feature: PrincipalAxes | None,
    token: PrincipalAxes | None,
) -> None:
    """Copies factors, bias and the bases' starting points into a layer, in place."""
    left, right = spectrum.truncate(layer.rank)
    layer.left.copy_(left)
    layer.right.copy_(right)
    if layer.bias is not None:
        layer.bias.copy_(linear.bias)
    for basis, axes in ((layer.feature_basis, feature), (layer.token_basis, token)):
        if basis is not None and axes is not None:
            basis.copy_(axes.vectors[:, : basis.shape[1]])
