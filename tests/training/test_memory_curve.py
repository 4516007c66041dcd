import pytest
import torch

from wasi_export.config import MemoryConfig, ModelConfig, TrainConfig
from wasi_export.manifest import InputSpec
from wasi_export.training.memory import StepJob, make_model
from wasi_export.training.memory_curve import MOMENTS, record_step_curve
from wasi_export.training.predict import count_steps


def job(**memory: object) -> StepJob:
    return StepJob(
        model=ModelConfig(
            name="vit_tiny_patch16_224", img_size=32, kwargs={"embed_dim": 64, "depth": 2, "num_heads": 2}
        ),
        train=TrainConfig(clip_grad=1.0, memory=MemoryConfig.model_validate(memory)),
        input=InputSpec(height=32, width=32, mean=(0.5,) * 3, std=(0.5,) * 3),
        num_classes=10,
        batch_size=4,
    )


def test_a_curve_has_the_peak_and_the_phases_of_one_step():
    state = torch.random.get_rng_state()
    curve = record_step_curve(job())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [phase.name for phase in curve.phases] == ["forward", "backward", "clipping", "update"]
    assert len(curve.at_ms) <= MOMENTS
    assert list(curve.at_ms) == sorted(curve.at_ms)
    assert max(curve.total_bytes) == count_steps(job(), make_model(job())).peak.total
    parameters = 4 * sum(parameter.numel() for parameter in make_model(job()).parameters())
    assert set(curve.held_bytes["parameters"]) == {parameters}
    assert curve.held_bytes["optimizer"][0] == pytest.approx(2 * parameters, rel=0.01)


def test_memory_grows_forward_and_turns_into_gradients_backward():
    curve = record_step_curve(job())
    forward, backward, *_ = curve.phases
    activations, gradients = curve.held_bytes["activations"], curve.held_bytes["gradients"]
    moments = range(len(curve.at_ms))
    within = [i for i in moments if forward.begin_ms <= curve.at_ms[i] <= forward.end_ms]
    after = [i for i in moments if curve.at_ms[i] > backward.end_ms]
    assert activations[within[0]] < activations[within[-1]]
    assert {gradients[i] for i in within} == {0}
    assert gradients[after[0]] == curve.held_bytes["parameters"][0]
    assert activations[after[0]] < 0.1 * max(activations)


def test_an_update_in_the_backward_pass_leaves_no_gradients_to_the_end():
    curve = record_step_curve(job(block_recompute=True, update_in_backward=True))
    whole = record_step_curve(job())
    assert [phase.name for phase in curve.phases] == ["forward", "backward", "clipping", "update"]
    assert max(curve.held_bytes["gradients"]) < 0.7 * max(whole.held_bytes["gradients"])
    assert max(curve.total_bytes) < max(whole.total_bytes)


def test_a_batch_in_parts_has_a_phase_for_each():
    names = [phase.name for phase in record_step_curve(job(micro_batch=2)).phases]
    assert names == ["forward", "backward", "forward", "backward", "clipping", "update"]
