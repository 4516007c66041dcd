"""What a plan is decided from, and the plan: measured once, decided as often as a budget is tried.

`measure_layers` runs the calibration images and takes the spectrum of each layer; `decide` turns ranks and
activation ranks into a `Plan` in milliseconds. Neither changes the model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor, nn

from wasi_export.allocate import LayerSpectrum, LayerTimes, ModelRest, choose_ranks
from wasi_export.config import FactorMethod, SubspaceConfig
from wasi_export.errors import NothingToCheckError
from wasi_export.progress import Track, silent
from wasi_export.ranks import ActivationRanks, LayerPlan, Plan, energy_rank
from wasi_export.subspace.factorize import plain_spectrum, whitened_spectrum
from wasi_export.subspace.inject import target_layers
from wasi_export.subspace.model_cost import ModelCost, measure_model_cost
from wasi_export.subspace.moments import InputMoments, PrincipalAxes, collect_moments


@dataclass(frozen=True)
class MeasuredLayer:
    """One targeted layer before anything is decided."""

    spectrum: LayerSpectrum
    method: FactorMethod
    """How the spectrum was taken."""
    note: str
    """Why that is not the method asked for; empty where it is."""
    activation: ActivationRanks
    """Ranks in which its input is kept, should it be factored."""


@dataclass(frozen=True)
class MeasuredModel:
    """The targeted layers in model order, and what the whole model costs."""

    layers: tuple[MeasuredLayer, ...]
    cost: ModelCost

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
    track: Track = silent,
) -> MeasuredModel:
    """Returns the spectra and activation ranks of the targeted layers; leaves the model as it is.

    Args:
        model: any module.
        batches: calibration inputs (B, C, H, W).
        config: which layers, how factored, how inputs are kept.
        total: number of batches, for the progress display.
        track: progress display.

    Raises:
        UnsupportedModelError: no layer matches.
        NothingToCheckError: there are no calibration inputs.
    """
    targets = target_layers(model, config)
    batches = iter(batches)
    if (first := next(batches, None)) is None:
        raise NothingToCheckError("no calibration images: raise subspace.calibration_images")
    cost = measure_model_cost(model, targets, first[:1])
    moments: Mapping[str, InputMoments] = {}
    if config.method == "whitened" or config.activation != "none":
        moments = collect_moments(model, targets, chain([first], batches), total=total, track=track)
    layers = tuple(
        _measure(name, linear, moments.get(name, InputMoments()), cost.tokens.get(name, 0), config)
        for name, linear in track(targets.items(), "spectra", len(targets))
    )
    return MeasuredModel(layers, cost)


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
        ConfigError: there is a budget of latency or of memory without what it needs.
        RankError: an explicit rank is above what a layer has, or the budgets cannot be met.
    """
    chosen = choose_ranks(
        measured.spectra, config, rest=measured.rest, times=times, memory_parameters=memory_parameters
    )
    layers = (_plan_layer(layer, *chosen[layer.spectrum.name]) for layer in measured.layers)
    return Plan(activation_mode=config.activation, layers=tuple(layers))


def _measure(
    name: str, linear: nn.Linear, seen: InputMoments, tokens: int, config: SubspaceConfig
) -> MeasuredLayer:
    feature = PrincipalAxes.of(seen.feature)
    token = PrincipalAxes.of(seen.token) if config.activation == "feature+token" else None
    weight = linear.weight.detach()
    spectrum = whitened_spectrum(weight, feature) if config.method == "whitened" else plain_spectrum(weight)
    squared = spectrum.singular_values.square().cpu().numpy()
    return MeasuredLayer(
        spectrum=LayerSpectrum(
            name=name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            tokens=tokens,
            squared_singular_values=squared,
            output_energy=float(squared.sum()),
        ),
        method=spectrum.method,
        note=spectrum.note,
        activation=ActivationRanks(
            feature=_energy_rank(feature, config) if config.activation != "none" else None,
            token=_energy_rank(token, config),
            token_count=None if token is None else seen.token_count,
        ),
    )


def _energy_rank(axes: PrincipalAxes | None, config: SubspaceConfig) -> int | None:
    """Returns the rank that keeps `activation_epsilon` of a mode's energy; None where that is all of it."""
    if axes is None:
        return None
    needed = energy_rank(axes.values.clamp_min(0).sqrt().cpu().numpy(), config.activation_epsilon)
    return needed if needed < len(axes.values) else None


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
