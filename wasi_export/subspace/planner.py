"""What a plan is decided from, and the plan: measured once, decided as often as a budget is tried.

`measure_layers` runs the calibration images and takes the spectrum of each layer; `decide` turns ranks and
activation ranks into a `Plan` in milliseconds. Neither changes the model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

from wasi_export.allocate import LayerSpectrum, LayerTimes, ModelRest, choose_ranks
from wasi_export.config import FactorMethod, SubspaceConfig
from wasi_export.errors import ConfigError, NothingToCheckError, some
from wasi_export.progress import Track, silent
from wasi_export.ranks import ActivationRanks, LayerPlan, Plan, break_even_rank
from wasi_export.subspace.activation_ranks import ModeEnergies, ranks_by_energy, ranks_by_memory
from wasi_export.subspace.factorize import plain_spectrum, whitened_spectrum
from wasi_export.subspace.kinds import Kind
from wasi_export.subspace.model_cost import ModelCost, measure_model_cost
from wasi_export.subspace.moments import (
    InputMoments,
    PrincipalAxes,
    collect_gradients,
    collect_moments,
    leading_axes,
    mode_energies,
)
from wasi_export.subspace.targets import target_layers

Scalar = Callable[[nn.Module, Tensor], Tensor]
"""Takes a model and a batch of inputs to the scalar whose gradients tell which errors matter."""


@dataclass(frozen=True)
class MeasuredLayer:
    """One layer that can be factored, before anything is decided."""

    spectrum: LayerSpectrum
    method: FactorMethod
    """How the spectrum was taken."""
    note: str
    """Why that is not the method asked for; empty where it is."""
    activation: ActivationRanks
    """Ranks in which its input is kept, should it be factored; those of `activation_epsilon`."""
    energies: ModeEnergies
    """Of the modes of its input that may be compressed."""
    leading: Float[Tensor, "d_out n"]
    """Directions of the output, best first; as many as a pair can have below break-even."""
    feature_axes: Float[Tensor, "d_in r_feature"] | None = None
    """Where the feature basis starts."""
    token_axes: Float[Tensor, "tokens r_token"] | None = None
    """Where the token basis starts."""
    gradients: Float[Tensor, "d_out d_out"] | None = None
    """Second moment of the gradient at the output, per row; None: not asked for."""


@dataclass(frozen=True)
class MeasuredModel:
    """The targeted layers in model order, and what the whole model costs."""

    layers: tuple[MeasuredLayer, ...]
    refused: Mapping[str, LayerPlan]
    """Targeted layers that cannot be factored."""
    names: tuple[str, ...]
    """Of all targeted layers, in model order."""
    cost: ModelCost
    """Without MACs where no inputs were read."""
    batch_size: int | None = None
    """Of training; None: not known."""

    @property
    def spectra(self) -> tuple[LayerSpectrum, ...]:
        """Those of the layers."""
        return tuple(layer.spectrum for layer in self.layers)

    @property
    def rest(self) -> ModelRest:
        """What the model has beside the weights of the layers."""
        return self.cost.rest({s.name: s.form(None).parameters for s in self.spectra})

    def with_activations(self, activations: Mapping[str, ActivationRanks]) -> "MeasuredModel":
        """Returns the same with other activation ranks for some layers."""
        layers = (
            replace(layer, activation=activations.get(layer.spectrum.name, layer.activation))
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))


def measure_layers(
    model: nn.Module,
    batches: Iterable[Tensor],
    config: SubspaceConfig,
    *,
    total: int,
    batch_size: int | None = None,
    scalar: Scalar | None = None,
    track: Track = silent,
) -> MeasuredModel:
    """Returns the spectra and activation ranks of the targeted layers; leaves the model as it is.

    Args:
        model: any module.
        batches: calibration inputs (B, C, H, W); not read where nothing depends on them.
        config: which layers, how factored, how inputs are kept.
        total: number of batches, for the progress display.
        batch_size: of training, for `config.activation_memory_mb`.
        scalar: for `config.sensitivity`.
        track: progress display.

    Raises:
        UnsupportedModelError: no layer matches.
        NothingToCheckError: there are no calibration inputs, and there must be.
    """
    read = config.method != "plain" or config.activation != "none" or bool(config.budgets)
    batches = iter(batches)
    first = list(islice(batches, 1)) if read else []
    if read and not first:
        raise NothingToCheckError("no calibration images: raise subspace.calibration_images")
    image = first[0][:1] if first else None
    targets = target_layers(model, config, image)
    kinds = {name: kind for name, kind in targets.items() if isinstance(kind, Kind)}
    moments: Mapping[str, InputMoments] = {}
    gradients: Mapping[str, Tensor] = {}
    if image is None:
        cost = ModelCost(sum(p.numel() for p in model.parameters()), macs=0, tokens=dict.fromkeys(kinds, 0))
    else:
        cost = measure_model_cost(model, kinds, image)
        inputs = list(chain(first, batches))
        modules = {name: kind.module for name, kind in kinds.items()}
        moments = collect_moments(model, modules, inputs, total=total, track=track)
        if config.sensitivity != "none" and scalar is not None:
            gradients = collect_gradients(model, kinds, inputs, scalar, total=total, track=track)
    layers = tuple(
        _measure(
            name,
            kind,
            moments.get(name, InputMoments()),
            gradients.get(name),
            cost.tokens.get(name, 0),
            config,
        )
        for name, kind in track(kinds.items(), "spectra", len(kinds))
    )
    refused = {name: kind.plan(name) for name, kind in targets.items() if not isinstance(kind, Kind)}
    return MeasuredModel(_weighted(layers), refused, tuple(targets), cost, batch_size)


def decide(
    measured: MeasuredModel,
    config: SubspaceConfig,
    *,
    times: LayerTimes | None = None,
    memory_parameters: int | None = None,
) -> Plan:
    """Returns the plan that the config asks for.

    Args:
        measured: what `measure_layers` found.
        config: measure, budgets and allocation.
        times: measured on the machine that a budget of latency is for.
        memory_parameters: what a budget of memory leaves the model.

    Raises:
        ConfigError: there is a budget of latency, of memory or of activations without what it needs, or the
            plan that is given is of other layers.
        RankError: an explicit rank is above what a layer has, or the budgets cannot be met.
    """
    if config.plan is not None:
        return load_plan(config.plan, measured.names)
    chosen = choose_ranks(
        measured.spectra, config, rest=measured.rest, times=times, memory_parameters=memory_parameters
    )
    factored = [layer for layer in measured.layers if chosen[layer.spectrum.name][0] is not None]
    measured = measured.with_activations(_activations_by_memory(factored, config, measured.batch_size))
    plans = dict(measured.refused)
    for layer in measured.layers:
        plans[layer.spectrum.name] = _plan_layer(layer, *chosen[layer.spectrum.name])
    return Plan(activation_mode=config.activation, layers=tuple(plans[name] for name in measured.names))


def load_plan(path: Path, targets: Iterable[str]) -> Plan:
    """Returns the plan in a file, which decides for all targeted layers and for no other.

    Raises:
        IntegrityError: the file is missing or is not a plan.
        ConfigError: the plan is of other layers.
    """
    plan = Plan.load(path)
    planned, wanted = [layer.name for layer in plan.layers], list(targets)
    differences = [
        f"it {verb} {some(names, 3)} ({len(names)})"
        for verb, names in (
            ("lacks", [name for name in wanted if name not in planned]),
            ("also has", [name for name in planned if name not in wanted]),
        )
        if names
    ]
    if differences:
        raise ConfigError(
            f"{path} is not a plan of the layers that subspace.include and exclude choose: "
            f"{'; '.join(differences)}: set them as they were for the plan, or make the plan again"
        )
    return plan


def _measure(
    name: str,
    kind: Kind,
    seen: InputMoments,
    gradients: Tensor | None,
    tokens: int,
    config: SubspaceConfig,
) -> MeasuredLayer:
    feature = PrincipalAxes.of(seen.feature)
    token = PrincipalAxes.of(seen.token) if "token" in config.activation else None
    batch = PrincipalAxes.of(seen.batch) if "batch" in config.activation else None
    if config.method == "plain":
        spectrum = plain_spectrum(kind.weight)
    else:
        spectrum = whitened_spectrum(kind.weight, feature)
    squared = spectrum.singular_values.square().cpu().numpy()
    energies = ModeEnergies(
        in_features=kind.in_features,
        tokens=seen.token_count or tokens,
        feature=mode_energies(feature) if config.activation != "none" else None,
        token=mode_energies(token),
        batch=mode_energies(batch),
    )
    activation = ranks_by_energy(energies, config.activation_epsilon)
    by_memory = config.activation_memory_mb is not None  # then any rank may be chosen
    most = math.ceil(break_even_rank(kind.out_features, kind.in_features))
    sequential = config.method == "sequential" and spectrum.method == "whitened"
    return MeasuredLayer(
        spectrum=LayerSpectrum(
            name=name,
            out_features=kind.out_features,
            in_features=kind.in_features,
            tokens=tokens,
            squared_singular_values=squared,
            output_energy=float(squared.sum()),
        ),
        method="sequential" if sequential else spectrum.method,
        note=spectrum.note,
        activation=activation,
        energies=energies,
        leading=spectrum.basis[:, :most].float(),
        feature_axes=leading_axes(feature, kind.in_features if by_memory else activation.feature),
        token_axes=leading_axes(token, seen.token_count if by_memory else activation.token),
        gradients=gradients,
    )


def _weighted(layers: tuple[MeasuredLayer, ...]) -> tuple[MeasuredLayer, ...]:
    """Returns the layers, weighed by what an error of their output does to the scalar where that is known.

    The squared change of the scalar by an error with covariance E is tr(G·E); for one that is spread evenly
    over the directions of the output it is its energy times the mean eigenvalue of G.
    """
    known = [
        float(layer.gradients.diagonal().mean()) * layer.spectrum.output_energy
        for layer in layers
        if layer.gradients is not None
    ]
    if len(known) < len(layers) or sum(known) <= 0:
        return layers
    scale = len(known) / sum(known)
    return tuple(
        replace(layer, spectrum=replace(layer.spectrum, weight=weight * scale))
        for layer, weight in zip(layers, known, strict=True)
    )


def _activations_by_memory(
    layers: Sequence[MeasuredLayer], config: SubspaceConfig, batch_size: int | None
) -> dict[str, ActivationRanks]:
    """Returns ranks for all layers within `activation_memory_mb`; none where there is no such budget."""
    if config.activation_memory_mb is None or config.allocation == "perplexity":
        return {}
    if batch_size is None:
        raise ConfigError(
            f"activation_memory_mb = {config.activation_memory_mb:g} is for a training batch, whose size is "
            "not known here: give the batch_size"
        )
    energies = {layer.spectrum.name: layer.energies for layer in layers}
    return ranks_by_memory(energies, int(config.activation_memory_mb * 1e6), batch_size=batch_size)


def _plan_layer(layer: MeasuredLayer, rank: int | None, reason: str) -> LayerPlan:
    spectrum = layer.spectrum
    return LayerPlan(
        name=spectrum.name,
        in_features=spectrum.in_features,
        out_features=spectrum.out_features,
        rank=rank,
        method=None if rank is None else layer.method,
        energy=None if rank is None else 1 - spectrum.lost(rank),
        activation=ActivationRanks() if rank is None else layer.activation,
        tokens=spectrum.tokens,
        error=spectrum.error(rank),
        reason="; ".join(filter(None, (reason, layer.note))),
    )
