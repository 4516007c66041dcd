"""Ranks of saved inputs by energy and by memory."""

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from wasi_export.cost import saved_input_bytes
from wasi_export.errors import RankError
from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.activation_ranks import ModeEnergies, ranks_by_energy, ranks_by_memory

BATCH = 8


def falling(count: int, rate: float) -> NDArray[np.float64]:
    return rate ** np.arange(count)


STEEP = ModeEnergies(12, 6, feature=falling(12, 0.3), token=falling(6, 0.3))
FLAT = ModeEnergies(12, 6, feature=falling(12, 0.9), token=falling(6, 0.9))


def lost(energies: ModeEnergies, ranks: ActivationRanks) -> float:
    modes = ((energies.feature, ranks.feature), (energies.token, ranks.token), (energies.batch, ranks.batch))
    return sum(float(v[r:].sum() / v.sum()) for v, r in modes if v is not None and r is not None)


def taken(energies: ModeEnergies, ranks: ActivationRanks) -> int:
    return saved_input_bytes(energies.in_features, ranks, batch=BATCH, tokens=energies.tokens)


@pytest.mark.parametrize("epsilon", [0.5, 0.9, 0.99, 1.0])
def test_an_energy_is_kept_in_every_mode_by_the_smallest_rank(epsilon: float) -> None:
    ranks = ranks_by_energy(FLAT, epsilon)
    for values, rank in ((FLAT.feature, ranks.feature), (FLAT.token, ranks.token)):
        assert values is not None
        share = np.cumsum(values) / values.sum()
        if rank is None:
            assert share[-2] < epsilon
        else:
            assert share[rank - 1] >= epsilon
            assert rank == 1 or share[rank - 2] < epsilon


def test_ranks_come_with_the_sizes_they_are_for() -> None:
    energies = ModeEnergies(12, 6, falling(12, 0.3), falling(6, 0.3), falling(16, 0.3))
    ranks = ranks_by_energy(energies, 0.9)
    assert (ranks.token_count, ranks.batch_count) == (6, 16)
    assert ranks_by_energy(ModeEnergies(12, 6, falling(12, 0.3)), 0.9) == ActivationRanks(feature=2)


@pytest.mark.parametrize("budget", [800, 1500, 3000])
def test_no_other_ranks_within_the_memory_lose_less(budget: int) -> None:
    layers = {"steep": STEEP, "flat": FLAT}
    chosen = ranks_by_memory(layers, budget, batch_size=BATCH)
    assert sum(taken(layers[name], ranks) for name, ranks in chosen.items()) <= budget
    options = [
        [(lost(e, r), taken(e, r)) for f, t in product([None, *range(1, 12)], [None, *range(1, 6)])
         for r in [e.ranks(f, t, None)]]
        for e in layers.values()
    ]  # fmt: skip
    best = min(
        sum(loss for loss, _ in pair) for pair in product(*options) if sum(cost for _, cost in pair) <= budget
    )
    found = sum(lost(layers[name], ranks) for name, ranks in chosen.items())
    assert found == pytest.approx(best, rel=2e-3)  # the solver stops within 1e-3


def test_the_layer_whose_energy_falls_slowly_gets_more() -> None:
    chosen = ranks_by_memory({"steep": STEEP, "flat": FLAT}, 2000, batch_size=BATCH)
    assert taken(STEEP, chosen["steep"]) < taken(FLAT, chosen["flat"])


def test_more_memory_loses_no_more_and_enough_loses_nothing() -> None:
    whole = taken(FLAT, ActivationRanks())
    losses = [
        lost(FLAT, ranks_by_memory({"flat": FLAT}, budget, batch_size=BATCH)["flat"])
        for budget in (400, 800, 1200, 1600, whole)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] == 0


def test_the_batch_mode_is_used_only_where_its_energies_are_given() -> None:
    alike = ModeEnergies(12, 6, FLAT.feature, FLAT.token, batch=falling(BATCH, 0.01))
    budget = taken(FLAT, ActivationRanks(feature=2, token=2, token_count=6))
    assert ranks_by_memory({"fc": FLAT}, budget, batch_size=BATCH)["fc"].batch is None
    chosen = ranks_by_memory({"fc": alike}, budget, batch_size=BATCH)["fc"]
    assert chosen.batch is not None
    assert chosen.batch_count == BATCH
    assert taken(alike, chosen) <= budget


def test_a_memory_below_the_smallest_ranks_is_refused_with_what_is_needed() -> None:
    least = taken(STEEP, STEEP.ranks(1, 1, None))
    with pytest.raises(RankError, match=rf"at least {least} bytes of saved inputs .*are needed, got 100"):
        ranks_by_memory({"steep": STEEP}, 100, batch_size=BATCH)


def test_no_layers_need_no_memory() -> None:
    assert ranks_by_memory({}, 1, batch_size=BATCH) == {}
