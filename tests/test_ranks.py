"""Which rank a layer gets: properties over random spectra and shapes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from wasi_export.config import SubspaceConfig
from wasi_export.errors import IntegrityError, RankError
from wasi_export.ranks import (
    RANK_FLOOR,
    RANK_STEP,
    LayerPlan,
    Plan,
    break_even_rank,
    candidate_ranks,
    choose_rank,
    energy_rank,
    round_rank,
)

ROUNDING = 1e-12  # sums of at most 64 doubles, taken in two orders

spectra = st.integers(1, 64).flatmap(
    lambda n: arrays(np.float64, n, elements=st.floats(0, 1e3, allow_subnormal=False))
).map(lambda values: np.sort(values)[::-1])  # fmt: skip
epsilons = st.floats(0.01, 1.0)
sizes = st.integers(1, 4096)


def layer(rank: int | None = None) -> LayerPlan:
    return LayerPlan(
        name="blocks.0.mlp.fc1", in_features=192, out_features=768, rank=rank,
        method="whitened" if rank else None, energy=0.9 if rank else None, reason="test",
    )  # fmt: skip


@given(spectra, epsilons)
def test_energy_rank_keeps_the_energy_and_no_smaller_rank_does(
    spectrum: NDArray[np.float64], epsilon: float
) -> None:
    rank = energy_rank(spectrum, epsilon)
    assert 1 <= rank <= len(spectrum)
    energy = spectrum**2
    assert energy[:rank].sum() >= (epsilon - ROUNDING) * energy.sum()
    if rank > 1:
        assert energy[: rank - 1].sum() < (epsilon + ROUNDING) * energy.sum()


@given(spectra, epsilons, epsilons)
def test_energy_rank_grows_with_epsilon(spectrum: NDArray[np.float64], one: float, other: float) -> None:
    assert energy_rank(spectrum, min(one, other)) <= energy_rank(spectrum, max(one, other))


def test_energy_rank_of_known_energies() -> None:
    spectrum = np.sqrt([8.0, 1.0, 1.0])
    assert [energy_rank(spectrum, epsilon) for epsilon in (0.5, 0.79, 0.85, 0.95, 1.0)] == [1, 1, 2, 3, 3]


def test_a_spectrum_of_zeros_has_rank_one() -> None:
    assert energy_rank(np.zeros(4), 0.9) == 1


@given(st.floats(0, 4096))
def test_round_rank_rounds_down_to_whole_blocks_and_keeps_the_floor(rank: float) -> None:
    rounded = round_rank(rank)
    assert rounded % RANK_STEP == 0
    assert rounded >= RANK_FLOOR
    if rank >= RANK_FLOOR:
        assert rank - RANK_STEP < rounded <= rank


@pytest.mark.parametrize(
    ("rank", "rounded"), [(0, 32), (31, 32), (39.9, 32), (127, 120), (128, 128), (135.9, 128), (136, 136)]
)
def test_round_rank_at_its_edges(rank: float, rounded: int) -> None:
    assert round_rank(rank) == rounded


@given(sizes, sizes)
def test_at_break_even_a_pair_has_the_parameters_of_the_dense_layer(
    out_features: int, in_features: int
) -> None:
    rank = break_even_rank(out_features, in_features)
    assert rank * (out_features + in_features) == pytest.approx(out_features * in_features)


@given(
    spectra, sizes, sizes,
    st.one_of(
        st.floats(0.01, 0.99).map(lambda f: SubspaceConfig(fraction=f)),
        epsilons.map(lambda e: SubspaceConfig(epsilon=e)),
        st.integers(1, 64).map(lambda r: SubspaceConfig(rank=r)),
    ),
)  # fmt: skip
def test_a_factored_layer_always_has_fewer_parameters_than_the_dense_one(
    spectrum: NDArray[np.float64], out_features: int, in_features: int, config: SubspaceConfig
) -> None:
    if config.rank and config.rank > min(out_features, in_features):
        return
    rank, reason = choose_rank(spectrum, out_features, in_features, config)
    assert reason
    if rank is not None:
        assert rank * (out_features + in_features) < out_features * in_features


@given(st.integers(64, 4096), st.integers(64, 4096), st.floats(0.05, 0.95))
def test_a_fraction_is_an_upper_bound_of_the_parameters_except_at_the_floor(
    out_features: int, in_features: int, fraction: float
) -> None:
    rank, reason = choose_rank(np.ones(64), out_features, in_features, SubspaceConfig(fraction=fraction))
    if rank is None or "raised to the floor" in reason:
        assert fraction * break_even_rank(out_features, in_features) < RANK_FLOOR
    else:
        assert rank * (out_features + in_features) <= fraction * out_features * in_features


def test_without_a_measure_the_fraction_is_four_tenths() -> None:
    rank, reason = choose_rank(np.ones(384), 1536, 384, SubspaceConfig())
    assert (rank, reason) == (120, "fraction 0.4")


def test_the_floor_is_named_in_the_reason() -> None:
    rank, reason = choose_rank(np.ones(192), 192, 192, SubspaceConfig(fraction=0.2))
    assert (rank, reason) == (32, "fraction 0.2, raised to the floor of 32")


def test_epsilon_is_rounded_up_so_that_the_energy_is_kept() -> None:
    spectrum = np.concatenate([np.ones(33), np.zeros(351)])
    rank, reason = choose_rank(spectrum, 384, 384, SubspaceConfig(epsilon=1.0))
    assert (rank, reason) == (40, "rank 33 keeps epsilon 1")


def test_a_rank_by_epsilon_has_no_floor() -> None:
    spectrum = np.concatenate([np.ones(3), np.zeros(381)])
    rank, reason = choose_rank(spectrum, 384, 384, SubspaceConfig(epsilon=1.0))
    assert (rank, reason) == (8, "rank 3 keeps epsilon 1")


def test_a_rank_at_break_even_leaves_the_layer_dense_and_says_so() -> None:
    rank, reason = choose_rank(np.ones(64), 64, 64, SubspaceConfig(rank=32))
    assert rank is None
    assert reason == "dense: rank 32 is not below break-even 32 (rank as given)"


def test_a_rank_above_the_full_rank_is_refused_with_the_largest_useful_one() -> None:
    message = r"rank 193 is above 192, the full rank of 768×192: choose at most 153"
    with pytest.raises(RankError, match=message):
        choose_rank(np.ones(192), 768, 192, SubspaceConfig(rank=193))


def test_a_factored_layer_has_the_parameters_of_its_pair() -> None:
    assert layer(rank=64).parameters == 64 * (768 + 192)
    assert layer(rank=None).parameters == 768 * 192


def test_a_plan_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan(activation_mode="feature", layers=(layer(rank=64), layer(rank=None)))
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json(indent=2), encoding="utf-8")
    assert Plan.load(path) == plan
    assert plan.factored == (layer(rank=64),)


@pytest.mark.parametrize("content", [None, "", "{}", '{"layers": 3}'])
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(IntegrityError, match=r"plan\.json is not a plan"):
        Plan.load(path)


@given(sizes, sizes)
def test_candidate_ranks_are_all_blocks_from_the_floor_to_below_break_even(
    out_features: int, in_features: int
) -> None:
    ranks = candidate_ranks(out_features, in_features)
    break_even = break_even_rank(out_features, in_features)
    assert all(rank % RANK_STEP == 0 and RANK_FLOOR <= rank < break_even for rank in ranks)
    assert len(ranks) == len(set(ranks))
    following = (ranks[-1] + RANK_STEP) if ranks else RANK_FLOOR
    assert following >= break_even
