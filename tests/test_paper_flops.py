"""The paper's counts, against figures that follow from its formulas."""

import pytest

from wasi_export.paper_flops import dense_step_flops, wasi_step_flops

FC1 = {"out_features": 3072, "in_features": 768, "batch": 128, "tokens": 50}
FC2 = {"out_features": 768, "in_features": 3072, "batch": 128, "tokens": 50}
EPSILON_08 = {"rank": 245, "mode_ranks": (40, 12, 60)}
EPSILON_09 = {"rank": 350, "mode_ranks": (70, 20, 150)}


@pytest.mark.parametrize("layer", [FC1, FC2], ids=["fc1", "fc2"])
def test_a_dense_step_of_a_vit_b_32_mlp_layer_takes_90_6_gigaflops(layer: dict[str, int]) -> None:
    """Three products of 2·6400·768·3072 operations, less one addition an output."""
    assert dense_step_flops(**layer).total / 1e9 == pytest.approx(90.6, abs=0.05)


@pytest.mark.parametrize(
    ("layer", "ranks", "gigaflops"),
    [(FC1, EPSILON_08, 40.7), (FC1, EPSILON_09, 64.4), (FC2, EPSILON_08, 47.8), (FC2, EPSILON_09, 81.7)],
    ids=["fc1-0.8", "fc1-0.9", "fc2-0.8", "fc2-0.9"],
)
def test_a_step_of_the_paper_costs_what_a_hand_count_gives(
    layer: dict[str, int], ranks: dict[str, object], gigaflops: float
) -> None:
    """Batch 128 at ranks like those of ε = 0.8 and 0.9; the hand count left small terms out."""
    assert wasi_step_flops(**layer, **ranks).total / 1e9 == pytest.approx(gigaflops, rel=0.005)  # type: ignore[arg-type]


def test_the_printed_count_of_one_per_multiply_add_is_not_what_is_counted() -> None:
    """At 1 a multiply-add for f_LR, fc1 at ε = 0.9 would seem 10 gigaflops cheaper."""
    corrected = wasi_step_flops(**FC1, **EPSILON_09)  # type: ignore[arg-type]
    T, N, O, I, (r1, r2, r3) = 6400, 50, 3072, 768, (70, 20, 150)
    f_lr = T * O * r1 + r1 * r2 * r3 * N + r1 * r3 * I * N + I * O * N * r1
    assert f_lr / 1e9 == pytest.approx(10.0, abs=0.1)
    products = T * 350 * (2 * O - 1) + T * I * (2 * 350 - 1)
    assert corrected.backward == products + 2 * f_lr


def test_ranks_belong_to_their_own_modes() -> None:
    """A rank on the long mode costs more than on the short one; swapped, it would be the reverse."""
    feature = wasi_step_flops(**FC1, rank=245, mode_ranks=(1, 1, 40)).overhead
    token = wasi_step_flops(**FC1, rank=245, mode_ranks=(1, 40, 1)).overhead
    short_mode_terms = 2 * 768 * 40**2 - 2 * 50 * 40**2  # QR of 768×40 against that of 50×40
    assert feature > token
    assert feature - token > short_mode_terms
