import sys

import pytest

from wasi_export.artifact import InputSpec
from wasi_export.config import MemoryConfig, ModelConfig, TrainConfig
from wasi_export.errors import ModelFailedError
from wasi_export.ranks import LayerPlan, Plan
from wasi_export.training.memory import StepJob, measure_step_memory
from wasi_export.training.predict import predict_step_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]

LAYERS = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}
DEPTH = 12


def job(
    *, batch_size: int = 2, plan: Plan | None = None, memory: dict[str, object] | None = None, size: int = 32
) -> StepJob:
    return StepJob(
        model=ModelConfig(name="vit_tiny_patch16_224", img_size=size),
        train=TrainConfig(memory=MemoryConfig.model_validate(memory or {})),
        input=InputSpec(height=size, width=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
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


@pytest.mark.parametrize(
    ("rank", "memory", "batch_size"),
    [
        (None, {}, 8),
        (32, {}, 64),
        (32, {"block_recompute": True}, 64),
        (32, {"level": "fast"}, 64),
        (32, {"level": "small"}, 64),
        (32, {"level": "streamed"}, 64),
    ],
    ids=str,
)
def test_the_predicted_peak_is_within_a_tenth_of_the_measured_one(rank, memory, batch_size):
    steps = job(batch_size=batch_size, plan=None if rank is None else factored(rank), memory=memory, size=64)
    measured, predicted = measure_step_memory(steps), predict_step_memory(steps)
    assert predicted.peak_mb == pytest.approx(measured.peak_mb, rel=0.1)
    assert measured.process_mb > measured.peak_mb + 100  # the libraries alone


def test_a_failure_tells_its_last_line():
    wrong = job().model_copy(update={"train": TrainConfig(opt="nonsense")})
    with pytest.raises(ModelFailedError, match=r"ended with 1: .*no optimizer 'nonsense'"):
        measure_step_memory(wrong)
