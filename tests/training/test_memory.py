import sys

import pytest

from wasi_export.artifact import InputSpec
from wasi_export.config import ModelConfig, TrainConfig
from wasi_export.errors import ModelFailedError
from wasi_export.ranks import LayerPlan, Plan
from wasi_export.training.memory import StepJob, measure_step_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

LAYERS = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}
DEPTH = 12


def job(*, batch_size: int = 2, plan: Plan | None = None, weight_decay: float = 0.0) -> StepJob:
    return StepJob(
        model=ModelConfig(name="vit_tiny_patch16_224", img_size=32),
        train=TrainConfig(weight_decay=weight_decay),
        input=InputSpec(height=32, width=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        num_classes=10,
        plan=plan,
        batch_size=batch_size,
    )


def factored(rank: int) -> Plan:
    layers = (
        LayerPlan(
            name=f"blocks.{block}.{name}",
            in_features=in_features,
            out_features=out_features,
            rank=rank,
            method="plain",
            energy=1.0,
            reason="",
        )
        for block in range(DEPTH)
        for name, (out_features, in_features) in LAYERS.items()
    )
    return Plan(activation_mode="none", layers=tuple(layers))


def test_a_dense_step_needs_four_times_the_parameters_and_repeats():
    first, second = measure_step_memory(job()), measure_step_memory(job())
    parameters = 5.4e6
    assert first.peak_mb > 4 * 4 * parameters / 1e6  # weights, gradients and two moments, in fp32
    assert first.peak_mb < 2 * 4 * 4 * parameters / 1e6
    assert second.peak_mb == pytest.approx(first.peak_mb, rel=0.05)


def test_factors_save_what_the_dense_weights_took():
    saved_parameters = DEPTH * sum(o * i - 32 * (o + i) for o, i in LAYERS.values())
    saved_mb = measure_step_memory(job()).peak_mb - measure_step_memory(job(plan=factored(32))).peak_mb
    assert saved_mb > 0.9 * 16 * saved_parameters / 1e6  # 16 bytes a parameter; the allocator rounds


def test_a_larger_batch_needs_more():
    assert measure_step_memory(job(batch_size=64)).peak_mb > 1.2 * measure_step_memory(job()).peak_mb


def test_a_failure_tells_its_last_line():
    wrong = job().model_copy(update={"train": TrainConfig(opt="nonsense")})
    with pytest.raises(ModelFailedError, match=r"ended with 1: .*no optimizer 'nonsense'"):
        measure_step_memory(wrong)
