"""Torch's own account of training steps, real and predicted. Against fresh processes: test_memory.py."""

import pytest
import torch

from wasi_export.config import MemoryConfig, ModelConfig, TrainConfig
from wasi_export.errors import ConfigError
from wasi_export.manifest import InputSpec
from wasi_export.ranks import ActivationRanks, LayerPlan, Plan
from wasi_export.training.memory import StepJob, make_model
from wasi_export.training.predict import KERNEL_BYTES, count_steps, predict_step_memory

DEPTH, WIDTH, PATCH, SIZE, BATCH = 6, 64, 4, 32, 16
BOUNDARY_MB = 4 * BATCH * ((SIZE // PATCH) ** 2 + 1) * WIDTH / 1e6
"""Bytes of what goes from block to block."""


def job(memory=None, *, rank=None, feature=None, model=None, **train):
    """Returns steps of a narrow deep transformer, in which activations outweigh parameters."""
    return StepJob(
        model=model
        or ModelConfig(
            name="vit_tiny_patch16_224",
            img_size=SIZE,
            kwargs={"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "patch_size": PATCH},
        ),
        train=TrainConfig(memory=memory or MemoryConfig(), **train),
        input=InputSpec(height=SIZE, width=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        num_classes=10,
        plan=None if rank is None else plan(rank, feature),
        batch_size=BATCH,
    )


def plan(rank, feature):
    shapes = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (4 * WIDTH, WIDTH),
        "mlp.fc2": (WIDTH, 4 * WIDTH),
    }
    return Plan(
        activation_mode="none" if feature is None else "feature",
        layers=tuple(
            LayerPlan(
                name=f"blocks.{block}.{name}",
                in_features=in_features,
                out_features=out_features,
                rank=rank,
                method="plain",
                energy=1.0,
                activation=ActivationRanks(feature=feature),
                reason="",
            )
            for block in range(DEPTH)
            for name, (out_features, in_features) in shapes.items()
        ),
    )


def peaks(*jobs):
    return [predict_step_memory(one).peak_mb for one in jobs]


def assert_falls(values):
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)


def test_every_switch_for_the_factored_layers_lowers_the_peak():
    assert_falls(
        peaks(
            job(),
            job(rank=16),
            job(rank=16, feature=8),
            job(MemoryConfig(mlp_recompute=True), rank=16, feature=8),
            job(MemoryConfig(mlp_recompute=True, micro_batch=4), rank=16, feature=8),
            job(MemoryConfig(level="small"), rank=16, feature=8),
        )
    )


def test_every_switch_for_the_blocks_lowers_the_peak():
    switches = (
        {},
        {"block_recompute": True},
        {"block_chunk": 4},
        {"boundary": "bf16"},
        {"update_in_backward": True},
    )
    memory, jobs = {}, []
    for switch in switches:
        memory |= switch
        jobs.append(job(MemoryConfig(**memory)))
    assert_falls(peaks(*jobs))


def test_a_recomputed_model_keeps_its_boundaries_alone():
    saved = {
        boundary: predict_step_memory(job(MemoryConfig(block_recompute=True, boundary=boundary))).saved_mb
        for boundary in ("fp32", "bf16")
    }
    # The inputs of the blocks, of the last norm and its output; the images' patches and the head are small.
    assert saved["fp32"] == pytest.approx((DEPTH + 2) * BOUNDARY_MB, rel=0.03)
    assert saved["bf16"] == pytest.approx((DEPTH / 2 + 2) * BOUNDARY_MB, rel=0.04)


def test_attention_keeps_no_probabilities():
    # A block of width C keeps twice the residual stream, two norms' outputs, q, k, v, attention's, 2·4C.
    saved = predict_step_memory(job()).saved_mb
    assert saved == pytest.approx((16 * DEPTH + 2) * BOUNDARY_MB, rel=0.03)
    tokens, heads = (SIZE // PATCH) ** 2 + 1, 2
    assert 4 * BATCH * heads * tokens**2 * DEPTH / 1e6 > 0.1 * saved  # what they would add is not lost in 3 %


@pytest.mark.parametrize(
    "memory",
    [
        {},
        {"level": "fast"},
        {"level": "small"},
        {"level": "streamed"},
        {"micro_batch": 3},
    ],
    ids=str,
)
def test_a_prediction_is_the_account_of_real_steps_to_the_byte(memory):
    steps = job(MemoryConfig(**memory), rank=16)
    torch.manual_seed(0)
    account = count_steps(steps, make_model(steps))
    predicted = predict_step_memory(steps)
    assert predicted.peak_mb == pytest.approx((account.peak.total + KERNEL_BYTES) / 1e6, abs=1e-6)
    assert predicted.saved_mb == pytest.approx(account.saved_bytes / 1e6, abs=1e-6)
    parts = (
        predicted.parameters_mb,
        predicted.optimizer_mb,
        predicted.gradients_mb,
        predicted.inputs_mb,
        predicted.activations_mb,
        predicted.kernels_mb,
    )
    assert sum(parts) == pytest.approx(predicted.peak_mb)


def test_an_optimizer_with_less_state_needs_less():
    state = {
        opt: predict_step_memory(job(MemoryConfig(micro_batch=1), opt=opt))
        for opt in ("adamw", "lion", "adafactor")
    }
    parameters = state["adamw"].parameters_mb
    assert state["adamw"].optimizer_mb == pytest.approx(2 * parameters, rel=0.01)
    assert state["lion"].optimizer_mb == pytest.approx(parameters, rel=0.01)
    assert state["adafactor"].optimizer_mb < 0.2 * parameters


@pytest.mark.slow
def test_the_memory_predicted_is_not_taken_and_no_random_number_is_drawn():
    huge = ModelConfig(name="vit_giant_patch14_224")  # 1 billion parameters
    large = StepJob(
        model=huge,
        train=TrainConfig(),
        input=InputSpec(height=224, width=224, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        num_classes=10,
        batch_size=1024,
    )
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert predict_step_memory(large).peak_mb > 1e6  # a terabyte
    assert torch.rand(1) == expected


@pytest.mark.slow
def test_other_families_are_predicted():
    for name in ("swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224", "mobilevit_xxs"):
        steps = job(model=ModelConfig(name=name)).model_copy(
            update={"input": InputSpec(height=224, width=224, mean=(0.5,) * 3, std=(0.5,) * 3)}
        )
        assert predict_step_memory(steps).saved_mb > 10, name


def test_what_the_training_would_refuse_the_prediction_refuses():
    with pytest.raises(ConfigError, match="mlp_recompute finds no MLP"):
        predict_step_memory(job(MemoryConfig(mlp_recompute=True)))
