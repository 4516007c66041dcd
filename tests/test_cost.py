"""Costs by formula; the figures of the paper's dense rows come out."""

import pytest
from linear_cost import linear_cost

from wasi_export.cost import FLOAT_BYTES, LinearForm, saved_input_bytes
from wasi_export.ranks import ActivationRanks, LayerPlan


def layer(name: str, d_in: int, d_out: int, rank: int | None = None, **activation: int) -> LayerPlan:
    return LayerPlan(
        name=name, in_features=d_in, out_features=d_out, rank=rank,
        method="plain" if rank else None, energy=1.0 if rank else None,
        activation=ActivationRanks(**activation), reason="test",
    )  # fmt: skip


VIT_B_32 = {
    "all": [(768, 2304), (768, 768), (768, 3072), (3072, 768)],
    "mlp": [(768, 3072), (3072, 768)],
}


@pytest.mark.parametrize(
    ("scope", "weight_mib", "training_mib"), [("all", 324.0, 2349.0), ("mlp", 216.0, 1341.0)]
)
def test_dense_training_memory_of_vit_b_32_is_the_papers(
    scope: str, weight_mib: float, training_mib: float
) -> None:
    """arXiv 2510.09160 table 1: batch 128, 50 tokens, MB of 2^20 bytes; q, k and v keep one input each."""
    costs = [linear_cost(layer("fc", d_in, d_out), batch=128, tokens=50) for d_in, d_out in VIT_B_32[scope]]
    extra_inputs = 2 * costs[0].saved_input_bytes if scope == "all" else 0
    assert 12 * sum(cost.weight_bytes for cost in costs) / 2**20 == pytest.approx(weight_mib)
    total = sum(cost.training_bytes for cost in costs) + extra_inputs
    assert 12 * total / 2**20 == pytest.approx(training_mib)


def test_dense_training_memory_of_the_mlps_of_swin_t_is_the_papers() -> None:
    """arXiv 2510.09160, Swin-T: batch 128, 224 px; depth, width and tokens of each stage."""
    stages = [(2, 96, 3136), (2, 192, 784), (6, 384, 196), (2, 768, 49)]
    total = sum(
        depth * linear_cost(layer("fc", *sizes), batch=128, tokens=tokens).training_bytes
        for depth, width, tokens in stages
        for sizes in ((width, 4 * width), (4 * width, width))
    )
    assert total / 2**20 == pytest.approx(3557, abs=0.5)


def test_a_pair_costs_its_rank_times_both_sides() -> None:
    form = LinearForm(1536, 384, 4 * 197, 112)
    assert form.parameters == 112 * (384 + 1536)
    assert form.macs == 4 * 197 * form.parameters
    cost = linear_cost(layer("fc1", 384, 1536, rank=112), batch=4, tokens=197)
    assert cost.weight_bytes == FLOAT_BYTES * form.parameters


def test_a_saved_input_costs_its_core_and_its_bases() -> None:
    planned = layer("fc1", 384, 1536, rank=112, feature=40, token=20, token_count=197)
    cost = linear_cost(planned, batch=4, tokens=197)
    assert cost.saved_input_bytes == 4 * (4 * 20 * 40 + 197 * 20 + 384 * 40)
    whole = linear_cost(layer("fc1", 384, 1536, rank=112), batch=4, tokens=197)
    assert whole.saved_input_bytes == 4 * (4 * 197 * 384)


# For each ε: the share of parameters that the scripts of the paper's code keep in its baseline of equal size,
# the activation memory that its search ends with, and what follows from both, in MB of 2^20 bytes: weights,
# training memory, and its ratio to the 1341 MB of dense training.
EPSILON_TABLE = [
    (0.4, 0.10, 0.7335, 21.6, 22.3, 60.0),
    (0.5, 0.15, 0.7335, 32.4, 33.1, 40.5),
    (0.6, 0.22, 0.7335, 47.5, 48.3, 27.8),
    (0.7, 0.29, 0.7335, 62.6, 63.4, 21.2),
    (0.8, 0.40, 0.7335, 86.4, 87.1, 15.4),
    (0.9, 0.57, 0.7335, 123.1, 123.8, 10.8),
]


@pytest.mark.parametrize(
    ("epsilon", "keep", "activation_mib", "weight_mib", "training_mib", "ratio"), EPSILON_TABLE
)
def test_the_table_over_epsilon_of_vit_b_32_comes_out(
    epsilon: float, keep: float, activation_mib: float, weight_mib: float, training_mib: float, ratio: float
) -> None:
    """24 MLP layers at the rank of each ε; a whole rank is up to 0.8 % off the ratio it stands for."""
    rank = int(keep * 614.4)  # of the break-even rank
    forms = [LinearForm(d_out, d_in, 50, rank) for d_in, d_out in VIT_B_32["mlp"]]
    weights = 12 * sum(FLOAT_BYTES * form.parameters for form in forms) / 2**20
    assert weights == pytest.approx(weight_mib, rel=0.008)
    assert weights + activation_mib == pytest.approx(training_mib, rel=0.008)
    assert 1341 / (weights + activation_mib) == pytest.approx(ratio, rel=0.008)
    assert rank == {0.4: 61, 0.5: 92, 0.6: 135, 0.7: 178, 0.8: 245, 0.9: 350}[epsilon]


@pytest.mark.parametrize(
    ("activation_mib", "ratio"), [(0.7335, 1534), (2.071, 543), (5.206, 216), (36.21, 31)]
)
def test_the_compression_of_saved_inputs_in_the_table_is_that_of_1125_mb(
    activation_mib: float, ratio: float
) -> None:
    saved = [saved_input_bytes(d_in, ActivationRanks(), batch=128, tokens=50) for d_in, _ in VIT_B_32["mlp"]]
    assert 12 * sum(saved) / 2**20 == pytest.approx(1125)
    assert 12 * sum(saved) / 2**20 / activation_mib == pytest.approx(ratio, rel=0.003)


def test_a_form_counts_as_the_layer_it_is_a_key_for() -> None:
    planned = layer("fc1", 384, 1536, rank=112)
    form = LinearForm(1536, 384, 197, 112)
    assert (form.parameters, form.macs) == (planned.parameters, 197 * planned.parameters)
    assert LinearForm(1536, 384, 197, None).parameters == planned.dense_parameters
