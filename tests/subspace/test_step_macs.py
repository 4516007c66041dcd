"""The formula for a step of `SubspaceLinear`, against torch's own count of the step."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from wasi_export.cost import linear_step_macs
from wasi_export.ranks import ActivationRanks, LayerPlan
from wasi_export.subspace.linear import SubspaceLinear

RANKS = [
    ActivationRanks(),
    ActivationRanks(feature=12),
    ActivationRanks(feature=12, token=5, token_count=17),
    ActivationRanks(token=5, token_count=17),
    ActivationRanks(feature=12, token=5, token_count=17, batch=2, batch_count=6),
    ActivationRanks(batch=2, batch_count=6),
]


def planned(d_in: int, d_out: int, rank: int | None, ranks: ActivationRanks) -> LayerPlan:
    return LayerPlan(
        name="fc", in_features=d_in, out_features=d_out, rank=rank, method=None, energy=None,
        activation=ranks, reason="test",
    )  # fmt: skip


def counted_macs(layer: torch.nn.Module, x: torch.Tensor) -> int:
    """Returns the multiply-adds of one forward and backward pass."""
    x = x.clone().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(48, 192, 16), (192, 48, 16), (48, 48, 40)])
def test_a_step_computes_what_the_formula_says(
    d_in: int, d_out: int, rank: int, ranks: ActivationRanks
) -> None:
    layer = SubspaceLinear(d_in, d_out, rank, activation=ranks)
    x = torch.randn(6, 17, d_in)
    plan = planned(d_in, d_out, rank, ranks)
    for moves_bases in (True, False):  # the first pass moves them, the second does not
        expected = linear_step_macs(plan, batch=6, tokens=17, moves_bases=moves_bases)
        assert counted_macs(layer, x) == expected.total


def test_a_dense_step_is_three_products() -> None:
    counted = counted_macs(torch.nn.Linear(48, 192), torch.randn(6, 17, 48))
    assert counted == linear_step_macs(planned(48, 192, None, ActivationRanks()), batch=6, tokens=17).total
