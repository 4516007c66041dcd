"""Ranks of all layers together: the smallest predicted output error within the budgets of the whole model.

A layer with output energy E = Σ‖y‖² that keeps the K leading of its whitened singular values loses

    error(K) = weight · Σ_{j>K} s_j² / E        error(dense) = 0

the share of its output's energy that is gone, times how much the layer matters. The sum over the layers is
made smallest under limits on parameters, multiply-adds and latency at once, or the parameters are made fewest
under a limit on the sum: `choose_options` solves both. The choices for a layer are the multiples of 8
from 32 to below break-even, and to leave it dense.

Budgets are of the whole model; `ModelRest` is what no choice changes of it. Pure numpy; scipy solves.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wasi_export._extras import require
from wasi_export.config import SubspaceConfig
from wasi_export.cost import LinearForm
from wasi_export.errors import ConfigError
from wasi_export.knapsack import Limit, Option, choose_options
from wasi_export.ranks import DEFAULT_FRACTION, candidate_ranks, choose_rank


@dataclass(frozen=True)
class LayerSpectrum:
    """What is known of a layer before its rank is chosen."""

    name: str
    out_features: int
    in_features: int
    tokens: int
    """Rows of its input for one image."""
    squared_singular_values: NDArray[np.float64]
    """[min(O, I)], largest first; whitened: of W·C^½, plain: of W."""
    output_energy: float
    """What they are shares of; their sum where nothing else is known."""
    weight: float = 1.0
    """How much an error of this layer matters against one of another."""

    def lost(self, rank: int | None) -> float:
        """Returns the share of the output's energy that is lost at a rank; 0 for dense."""
        if rank is None or self.output_energy <= 0:
            return 0.0
        return float(self.squared_singular_values[rank:].sum()) / self.output_energy

    def error(self, rank: int | None) -> float:
        """Returns what is lost at a rank, weighted."""
        return self.weight * self.lost(rank)

    def form(self, rank: int | None) -> LinearForm:
        """Returns the layer at a rank; None: dense."""
        return LinearForm(self.out_features, self.in_features, self.tokens, rank)


@dataclass(frozen=True)
class Candidate:
    """One choice for a layer: what it loses and what it costs for one image."""

    rank: int | None
    """None: the layer stays dense."""
    error: float
    parameters: int
    macs: int
    latency_ms: float = 0.0
    """0 where latency is not looked at."""


@dataclass(frozen=True)
class ModelRest:
    """What the model has beside the weights of the targeted layers; MACs are of one image."""

    parameters: int = 0
    macs: int = 0


@dataclass(frozen=True)
class LayerTimes:
    """Measured times of one image on one machine."""

    form_ms: Mapping[LinearForm, float]
    """Of every form in `layer_forms`."""
    rest_ms: float
    """Of the model without the products with the weights of the targeted layers."""

    def model_ms(self, forms: Iterable[LinearForm]) -> float:
        """Returns the predicted latency of the model with its layers in these forms."""
        return self.rest_ms + sum(self.form_ms[form] for form in forms)


@dataclass(frozen=True)
class Budgets:
    """The most that a whole model may have; None: not limited."""

    parameters: float | None = None
    macs: float | None = None
    latency_ms: float | None = None
    rest: ModelRest = ModelRest()
    rest_ms: float = 0.0

    def limits(self) -> tuple[tuple[str, Limit], ...]:
        """Returns the field of `Candidate` that each budget given limits, and the limit."""
        each = (
            ("parameters", self.parameters, "parameters", self.rest.parameters),
            ("macs", self.macs, "MACs", self.rest.macs),
            ("latency_ms", self.latency_ms, "ms", self.rest_ms),
        )
        return tuple(
            (field, Limit(amount, unit, taken=taken))
            for field, amount, unit, taken in each
            if amount is not None
        )


def layer_forms(spectra: Iterable[LayerSpectrum]) -> tuple[LinearForm, ...]:
    """Returns the distinct forms that the layers can take, dense or factored: what needs a measured time."""
    return tuple(dict.fromkeys(s.form(rank) for s in spectra for rank in _choices(s)))


def candidates(spectrum: LayerSpectrum, times: LayerTimes | None = None) -> tuple[Candidate, ...]:
    """Returns what can be chosen for a layer: ranks from small to large, then dense.

    Without times the latency is 0. Measured ones are smoothed so that they never fall with the rank: where
    they do it is noise, and the search would look for it.
    """
    ranks = _choices(spectrum)
    forms = [spectrum.form(rank) for rank in ranks]
    latency = np.zeros(len(forms))
    if times is not None:
        isotonic = require("scipy.optimize", extra="train").isotonic_regression
        latency[:] = [times.form_ms[form] for form in forms]
        if len(forms) > 1:
            latency[:-1] = isotonic(latency[:-1]).x
    return tuple(
        Candidate(rank, spectrum.error(rank), form.parameters, form.macs, float(ms))
        for rank, form, ms in zip(ranks, forms, latency, strict=True)
    )


def allocate(
    candidates_by_layer: Mapping[str, Sequence[Candidate]], budgets: Budgets
) -> dict[str, Candidate]:
    """Returns the candidate of each layer with the smallest total error within all budgets.

    Raises:
        RankError: the budgets cannot be met; the message has the smallest that can.
    """
    limits = budgets.limits()
    groups = [
        [Option(c.error, tuple(getattr(c, field) for field, _ in limits)) for c in layer]
        for layer in candidates_by_layer.values()
    ]
    chosen = choose_options(groups, [limit for _, limit in limits])
    return _picked(candidates_by_layer, chosen)


def allocate_error(
    candidates_by_layer: Mapping[str, Sequence[Candidate]], max_error: float
) -> dict[str, Candidate]:
    """Returns the candidate of each layer, with the fewest parameters, whose errors sum up to `max_error`."""
    groups = [[Option(c.parameters, (c.error,)) for c in layer] for layer in candidates_by_layer.values()]
    return _picked(candidates_by_layer, choose_options(groups, [Limit(max_error, "of error")]))


def choose_ranks(
    spectra: Sequence[LayerSpectrum],
    config: SubspaceConfig,
    *,
    rest: ModelRest = ModelRest(),
    times: LayerTimes | None = None,
    memory_parameters: int | None = None,
) -> dict[str, tuple[int | None, str]]:
    """Returns the rank of each layer, or None where it stays dense, and the reason, as the config asks.

    Args:
        spectra: of the targeted layers, in model order.
        config: measure, budgets and allocation.
        rest: what the model has beside these layers; needed for budgets only.
        times: needed for `max_latency_ms` only.
        memory_parameters: the parameters that `max_train_memory_mb` leaves the model; needed for it only.

    Raises:
        ConfigError: there is a budget of latency or of memory without what it needs.
        RankError: an explicit rank is above what a layer has, or the budgets cannot be met.
    """
    if config.rank is not None or config.allocation != "output_error":
        return {
            s.name: choose_rank(np.sqrt(s.squared_singular_values), s.out_features, s.in_features, config)
            for s in spectra
        }
    for key, missing in (("max_train_memory_mb", memory_parameters), ("max_latency_ms", times)):
        if getattr(config, key) is not None and missing is None:
            raise ConfigError(
                f"{key} = {getattr(config, key):g} is met by a plan: make one with `wasi-export plan "
                "-o plan.json` and set subspace.plan"
            )
    by_layer = {s.name: candidates(s, times if config.max_latency_ms else None) for s in spectra}
    if config.epsilon is not None:
        chosen = allocate_error(by_layer, (1 - config.epsilon) * sum(s.weight for s in spectra))
        goal = f"epsilon {config.epsilon:g} over all layers"
    elif config.budgets:
        rest_ms = times.rest_ms if times else 0.0
        parameters = min((p for p in (config.max_params, memory_parameters) if p is not None), default=None)
        budgets = Budgets(parameters, config.max_macs, config.max_latency_ms, rest, rest_ms)
        chosen = allocate(by_layer, budgets)
        goal = " and ".join(f"{key} {getattr(config, key):,.10g}" for key in config.budgets)
    else:
        fraction = DEFAULT_FRACTION if config.fraction is None else config.fraction
        dense = sum(s.out_features * s.in_features for s in spectra)
        chosen = allocate(by_layer, Budgets(parameters=fraction * dense))
        goal = f"fraction {fraction:g} of all layers"
    return {
        name: (c.rank, f"{'dense: ' if c.rank is None else ''}output error, {goal}")
        for name, c in chosen.items()
    }


def _choices(spectrum: LayerSpectrum) -> tuple[int | None, ...]:
    """Returns the ranks that a layer can have, from small to large, then None for dense."""
    return (*candidate_ranks(spectrum.out_features, spectrum.in_features), None)


def _picked(
    candidates_by_layer: Mapping[str, Sequence[Candidate]], chosen: Sequence[int]
) -> dict[str, Candidate]:
    pairs = zip(candidates_by_layer.items(), chosen, strict=True)
    return {name: layer[index] for (name, layer), index in pairs}
