"""Budgets of training memory, and the paper's search, over a real configuration."""

from collections.abc import Callable

import pytest

from wasi_export.config import Config
from wasi_export.cost import saved_input_bytes
from wasi_export.datasets import load_data
from wasi_export.errors import RankError
from wasi_export.ranks import Plan
from wasi_export.training.beginning import first_model
from wasi_export.training.planning import PlannedModel, plan_model

MODEL = {
    "name": "vit_tiny_patch16_224",
    "img_size": 32,
    "in_chans": 1,
    "kwargs": {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2},
}


FIXED = {"calibration_images": 32, "dense_epochs": 0}


def saved_bytes(plan: Plan) -> int:
    """Returns the bytes of the saved inputs of all factored layers."""
    return sum(
        saved_input_bytes(layer.in_features, layer.activation, batch=8, tokens=layer.tokens or 0)
        for layer in plan.factored
    )


@pytest.fixture(scope="module")
def planned() -> Callable[..., PlannedModel]:
    """Returns what plans the same small model under some keys of `subspace`."""

    def plan(**subspace: object) -> PlannedModel:
        batch = {"source": "digits", "batch_size": 8}
        values = {"model": MODEL, "data": batch, "subspace": {**FIXED, **subspace}}
        config = Config.from_mapping(values)
        images, _ = load_data(config.data)
        return plan_model(config, first_model(config, images.classes), images)

    return plan


@pytest.fixture(scope="module")
def smallest(planned: Callable[..., PlannedModel]) -> PlannedModel:
    return planned(rank=32)


def test_the_dense_totals_are_those_of_the_model(smallest: PlannedModel) -> None:
    assert smallest.dense.parameters > smallest.planned.parameters
    assert smallest.dense.macs > smallest.planned.macs
    assert smallest.dense.train_memory_mb > smallest.planned.train_memory_mb
    assert smallest.dense.latency_ms is None


def test_a_budget_of_memory_is_used_up_and_kept(
    planned: Callable[..., PlannedModel], smallest: PlannedModel
) -> None:
    low, high = smallest.planned.train_memory_mb, smallest.dense.train_memory_mb
    budget = low + 0.6 * (high - low)
    made = planned(allocation="output_error", max_train_memory_mb=budget)
    assert 0.97 * budget < made.planned.train_memory_mb <= budget
    assert smallest.planned.parameters < made.planned.parameters < made.dense.parameters
    assert any(f"max_train_memory_mb {budget:,.10g}" in layer.reason for layer in made.plan.layers)


def test_a_memory_that_the_dense_model_fits_in_leaves_it_dense(
    planned: Callable[..., PlannedModel], smallest: PlannedModel
) -> None:
    made = planned(allocation="output_error", max_train_memory_mb=2 * smallest.dense.train_memory_mb)
    assert made.planned == made.dense
    assert made.plan.factored == ()


def test_a_memory_below_the_smallest_names_it_and_what_helps(planned: Callable[..., PlannedModel]) -> None:
    message = (
        r"max_train_memory_mb = 1 is below \d+, the predicted peak at the smallest ranks with batch size 8: "
        r'set train.subspace.memory.level = "small" \(\d+\) or lower data.batch_size'
    )
    with pytest.raises(RankError, match=message):
        planned(allocation="output_error", max_train_memory_mb=1)


def test_the_epochs_before_the_factorisation_are_predicted_and_bound_by_the_budget(
    planned: Callable[..., PlannedModel], smallest: PlannedModel
) -> None:
    assert smallest.first_train_memory_mb is None
    whole = planned(rank=32, dense_epochs=1)
    assert whole.first_train_memory_mb == whole.dense.train_memory_mb == smallest.dense.train_memory_mb
    lora_mb = planned(rank=32, dense_epochs=1, dense_method="lora").first_train_memory_mb
    assert lora_mb is not None
    assert lora_mb < smallest.dense.train_memory_mb
    message = rf"is below {lora_mb:.0f}, the predicted peak of the epochs before layers are factored"
    with pytest.raises(RankError, match=message):
        planned(
            allocation="output_error", dense_epochs=1, dense_method="lora", max_train_memory_mb=lora_mb - 1
        )


def test_the_papers_search_chooses_activation_ranks_within_a_memory(
    planned: Callable[..., PlannedModel], smallest: PlannedModel
) -> None:
    saved: dict[float, int] = {}
    for budget_mb in (0.03, 0.4):
        made = planned(rank=32, allocation="perplexity", activation_memory_mb=budget_mb)
        ranks = [layer.activation for layer in made.plan.factored]
        assert [layer.rank for layer in made.plan.layers] == [layer.rank for layer in smallest.plan.layers]
        assert len({rank.feature for rank in ranks}) > 1
        saved[budget_mb] = saved_bytes(made.plan)
        assert saved[budget_mb] <= budget_mb * 1e6
    assert saved[0.03] < saved[0.4]


def test_a_memory_of_activations_below_the_smallest_is_refused(planned: Callable[..., PlannedModel]) -> None:
    with pytest.raises(RankError, match=r"at least [\d,]+ bytes of saved inputs are needed, got 1,000"):
        planned(rank=32, allocation="perplexity", activation_memory_mb=0.001)


@pytest.mark.parametrize(
    "allocation",
    [{"rank": 32}, {"allocation": "output_error", "max_params": 150_000}],
    ids=lambda a: next(iter(a)),
)
@pytest.mark.parametrize("activation", ["feature", "feature+token", "feature+token+batch"])
def test_activation_ranks_are_chosen_within_a_memory_whatever_the_allocation(
    planned: Callable[..., PlannedModel], allocation: dict[str, object], activation: str
) -> None:
    budget_mb = 0.1
    plan = planned(**allocation, activation=activation, activation_memory_mb=budget_mb).plan
    saved = saved_bytes(plan)
    assert plan.factored
    assert 0.8 * budget_mb * 1e6 < saved <= budget_mb * 1e6
    assert any(layer.activation.feature is not None for layer in plan.factored)
    if "token" not in activation:
        assert all(layer.activation.token is None for layer in plan.factored)
    if "batch" not in activation:
        assert all(layer.activation.batch is None for layer in plan.factored)


def test_the_batch_mode_is_compressed_on_request(planned: Callable[..., PlannedModel]) -> None:
    plan = planned(rank=32, activation="feature+token+batch", activation_epsilon=0.5).plan
    assert all(layer.activation.batch is not None for layer in plan.factored)
    assert all(layer.activation.batch_count is not None for layer in plan.factored)
