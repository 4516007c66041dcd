"""Ranks under budgets: what is promised of every plan, and the messages of those that cannot be."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wasi_export.allocate import (
    Budgets,
    Candidate,
    LayerSpectrum,
    LayerTimes,
    ModelRest,
    allocate,
    candidates,
    choose_ranks,
    layer_forms,
)
from wasi_export.config import SubspaceConfig
from wasi_export.errors import ConfigError, RankError
from wasi_export.knapsack import RELATIVE_GAP
from wasi_export.ranks import RANK_FLOOR, RANK_STEP, break_even_rank, candidate_ranks

BY_ERROR = SubspaceConfig(allocation="output_error")


def spectrum(
    name: str, *, decay: float = 0.05, weight: float = 1.0, out: int = 384, tokens: int = 50
) -> LayerSpectrum:
    """Returns a layer 384 wide whose squared singular values fall as exp(-decay·j)."""
    squared = np.exp(-decay * np.arange(min(out, 384)))
    return LayerSpectrum(name, out, 384, tokens, squared, float(squared.sum()), weight)


def total(chosen: dict[str, Candidate], field: str) -> float:
    return sum(getattr(candidate, field) for candidate in chosen.values())


def ranks_of(spectra: list[LayerSpectrum], config: SubspaceConfig, **more: object) -> dict[str, int | None]:
    return {name: rank for name, (rank, _) in choose_ranks(spectra, config, **more).items()}  # type: ignore[arg-type]


def test_candidates_are_whole_blocks_below_break_even_and_dense() -> None:
    layer = spectrum("fc1", out=1536)
    ranks = [candidate.rank for candidate in candidates(layer)]
    assert ranks[-1] is None
    assert ranks[:-1] == list(range(RANK_FLOOR, 307, RANK_STEP))
    assert 304 < break_even_rank(1536, 384) < 312


def test_a_candidate_loses_the_energy_behind_its_rank_times_the_weight() -> None:
    layer = spectrum("fc1", weight=3.0)
    by_rank = {candidate.rank: candidate for candidate in candidates(layer)}
    squared = layer.squared_singular_values
    assert by_rank[64].error == pytest.approx(3 * squared[64:].sum() / squared.sum())
    assert by_rank[None].error == 0
    assert (by_rank[64].parameters, by_rank[64].macs) == (64 * 768, 50 * 64 * 768)
    assert by_rank[None].parameters == 384 * 384


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.floats(0.002, 0.3), st.floats(0.1, 10)), min_size=2, max_size=8),
    st.floats(0.2, 0.95),
)
def test_no_allocation_of_the_same_size_is_predicted_to_be_better_than_ours(
    layers: list[tuple[float, float]], fraction: float
) -> None:
    """Neither the uniform one, nor any that moves one step of rank from one layer to another."""
    spectra = [spectrum(str(i), decay=decay, weight=weight) for i, (decay, weight) in enumerate(layers)]
    by_layer = {s.name: candidates(s) for s in spectra}
    chosen = allocate(by_layer, Budgets(parameters=fraction * 384**2 * len(layers)))
    error = total(chosen, "error") / (1 + RELATIVE_GAP)
    uniform = max(
        rank for rank in candidate_ranks(384, 384) if rank * 768 <= max(fraction * 384**2, 32 * 768)
    )
    assert error <= sum(s.error(uniform) for s in spectra) + 1e-9
    for giving, taking in ((g, t) for g in spectra for t in spectra if g is not t):
        here, there = chosen[giving.name].rank, chosen[taking.name].rank
        if here is not None and there is not None and here > RANK_FLOOR and there + RANK_STEP < 192:
            moved = giving.error(here - RANK_STEP) + taking.error(there + RANK_STEP)
            slack = RELATIVE_GAP * total(chosen, "error") + 1e-9
            assert chosen[giving.name].error + chosen[taking.name].error <= moved + slack


def test_the_heavier_of_two_equal_layers_gets_the_higher_rank() -> None:
    ranks = ranks_of([spectrum("light"), spectrum("heavy", weight=20.0)], BY_ERROR)
    assert ranks["heavy"] is None or (ranks["light"] or 0) < ranks["heavy"]
    assert ranks_of([spectrum("a"), spectrum("b")], BY_ERROR) in (
        {"a": 72, "b": 80},
        {"a": 80, "b": 72},
        {"a": 76, "b": 76},
    )


def test_the_flatter_spectrum_gets_the_higher_rank() -> None:
    ranks = ranks_of([spectrum("steep", decay=0.2), spectrum("flat", decay=0.01)], BY_ERROR)
    assert ranks["steep"] is not None
    assert ranks["flat"] is None or ranks["steep"] < ranks["flat"]


def test_every_budget_of_the_whole_model_is_kept() -> None:
    spectra = [spectrum(str(i), decay=0.01 * (i + 1), tokens=50 + 10 * i) for i in range(4)]
    rest = ModelRest(parameters=10_000, macs=1_000_000)
    form_ms = {form: form.macs / 1e7 for form in layer_forms(spectra)}
    times = LayerTimes(form_ms, rest_ms=0.5)
    by_layer = {s.name: candidates(s, times) for s in spectra}
    for limits in (
        {"parameters": 300_000},
        {"macs": 2e7},
        {"latency_ms": 2.0},
        {"parameters": 350_000, "latency_ms": 2.2},
    ):
        chosen = allocate(by_layer, Budgets(**limits, rest=rest, rest_ms=0.5))
        assert rest.parameters + total(chosen, "parameters") <= limits.get("parameters", np.inf)
        assert rest.macs + total(chosen, "macs") <= limits.get("macs", np.inf)
        latency = times.model_ms(s.form(chosen[s.name].rank) for s in spectra)
        assert latency <= limits.get("latency_ms", np.inf) + 1e-9
        assert any(candidate.rank is not None for candidate in chosen.values())


def test_a_budget_above_the_dense_model_leaves_it_dense() -> None:
    assert ranks_of([spectrum("fc1")], SubspaceConfig(allocation="output_error", max_params=10**6)) == {
        "fc1": None
    }


def test_a_budget_below_the_smallest_model_names_that() -> None:
    config = SubspaceConfig(allocation="output_error", max_params=50_000)
    smallest = 2 * 32 * 768 + 1000
    with pytest.raises(RankError, match=f"at least {smallest:,} parameters are needed, got 50,000"):
        choose_ranks([spectrum("a"), spectrum("b")], config, rest=ModelRest(parameters=1000))


def test_a_fraction_holds_for_all_layers_together() -> None:
    spectra = [spectrum("a", decay=0.2), spectrum("b", decay=0.01), spectrum("c", out=1536)]
    config = SubspaceConfig(allocation="output_error", fraction=0.5)
    ranks = ranks_of(spectra, config)
    dense = sum(s.form(None).parameters for s in spectra)
    used = sum(s.form(ranks[s.name]).parameters for s in spectra)
    assert 0.45 * dense < used <= 0.5 * dense
    assert len({ranks[name] for name in ("a", "b")}) == 2


def test_epsilon_holds_for_the_mean_over_layers_with_the_fewest_parameters() -> None:
    spectra = [spectrum("a", decay=0.2), spectrum("b", decay=0.01)]
    ranks = ranks_of(spectra, SubspaceConfig(allocation="output_error", epsilon=0.9))
    assert sum(s.error(ranks[s.name]) for s in spectra) <= 0.1 * len(spectra)
    for s in spectra:
        rank = ranks[s.name]
        if rank is not None and rank > RANK_FLOOR:
            fewer = ranks | {s.name: rank - RANK_STEP}
            assert sum(t.error(fewer[t.name]) for t in spectra) > 0.1 * len(spectra)


@pytest.mark.parametrize(
    "config", [{}, {"rank": 32}, {"fraction": 0.5}, {"epsilon": 0.9}], ids=lambda config: str(config)
)
@pytest.mark.parametrize("allocation", ["uniform", "output_error"])
def test_of_no_layers_no_ranks_are_chosen_whatever_the_allocation(
    allocation: str, config: dict[str, float]
) -> None:
    assert ranks_of([], SubspaceConfig.model_validate({"allocation": allocation, **config})) == {}


def test_uniform_allocation_and_an_explicit_rank_are_each_layers_own() -> None:
    spectra = [spectrum("a", decay=0.2), spectrum("b", decay=0.01)]
    assert ranks_of(spectra, SubspaceConfig(fraction=0.5)) == {"a": 96, "b": 96}
    assert ranks_of(spectra, SubspaceConfig(allocation="output_error", rank=24)) == {"a": 24, "b": 24}


def test_the_reason_names_the_budgets_and_says_when_a_layer_stays_dense() -> None:
    config = SubspaceConfig(allocation="output_error", max_params=200_000, max_macs=10**9)
    chosen = choose_ranks([spectrum("a", decay=0.2), spectrum("b", decay=0.001)], config)
    assert chosen["a"][1] == "output error, max_params 200,000 and max_macs 1,000,000,000"
    assert chosen["b"] == (None, f"dense: {chosen['a'][1]}")


@pytest.mark.parametrize("key", ["max_latency_ms", "max_train_memory_mb"])
def test_a_budget_that_must_be_measured_for_asks_for_a_plan(key: str) -> None:
    config = SubspaceConfig(allocation="output_error", **{key: 5})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=f"{key} = 5 is met by a plan: make one with `wasi-export plan"):
        choose_ranks([spectrum("a")], config)


def test_the_parameters_that_a_memory_comes_to_are_a_budget() -> None:
    config = SubspaceConfig(allocation="output_error", max_train_memory_mb=100, max_params=10**6)
    chosen = choose_ranks([spectrum("a")], config, memory_parameters=64 * 768)
    assert chosen == {"a": (64, "output error, max_params 1,000,000 and max_train_memory_mb 100")}


def test_noise_in_the_times_is_no_reason_for_a_rank() -> None:
    layer = spectrum("a")
    noisy = {
        form: 1.0 + (0.2 if form.rank == 64 else 0.0) + (form.rank or 999) / 1000
        for form in layer_forms([layer])
    }
    latency = {c.rank: c.latency_ms for c in candidates(layer, LayerTimes(noisy, 0.0))}
    assert latency[64] == latency[72]
    ranks = [rank for rank in latency if rank is not None]
    assert all(latency[a] <= latency[b] for a, b in itertools.pairwise(ranks))
    assert latency[None] == noisy[layer.form(None)]
