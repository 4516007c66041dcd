"""Costs by formula; the figures of the paper's dense rows come out."""

import pytest

from wasi_export.cost import linear_cost
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


def test_a_pair_costs_its_rank_times_both_sides() -> None:
    cost = linear_cost(layer("fc1", 384, 1536, rank=112), batch=4, tokens=197)
    assert cost.parameters == 112 * (384 + 1536)
    assert cost.forward_macs == 4 * 197 * cost.parameters


def test_a_saved_input_costs_its_core_and_its_bases() -> None:
    planned = layer("fc1", 384, 1536, rank=112, feature=40, token=20, token_count=197)
    cost = linear_cost(planned, batch=4, tokens=197)
    assert cost.saved_input_bytes == 4 * (4 * 20 * 40 + 197 * 20 + 384 * 40)
    whole = linear_cost(layer("fc1", 384, 1536, rank=112), batch=4, tokens=197)
    assert whole.saved_input_bytes == 4 * (4 * 197 * 384)
