import json
import time

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from wasi_export.errors import ConfigError, UsageError
from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.gauge import GaugeFix
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.training.models import create_model
from wasi_export.training.profile import TRACED_STEPS, WARMUP_STEPS, StepProfiler, Unprofiled
from wasi_export.training.profile_parts import kind_of, module_ranges, part_times

UNMEASURED = WARMUP_STEPS + TRACED_STEPS
MS = 1e-3


def run_steps(profiler, seconds, phases=("forward",)):
    """Takes one step of each length, in one epoch; a step sleeps as long in every phase."""
    with profiler:
        for length in profiler.loading(seconds):
            for phase in phases:
                with profiler.phase(phase):
                    time.sleep(length)
            profiler.end_step()
    return profiler


@pytest.fixture
def model(tiny):
    return create_model(tiny().model, 10)


def test_phases_are_medians_over_the_steps_after_the_first_ones(model):
    seconds = [50 * MS] * UNMEASURED + [4 * MS, 5 * MS, 40 * MS]
    result = run_steps(StepProfiler(model), seconds, ("forward", "backward")).result()
    assert result.steps == 3
    assert [phase.name for phase in result.phases] == ["data", "forward", "backward", "other"]
    for phase in result.phases[1:3]:
        assert 5 <= phase.wall_ms < 40  # sleeping takes as long as it is told to, or longer
        assert phase.cpu_ms < phase.wall_ms
    assert sum(phase.share for phase in result.phases) == pytest.approx(1)
    assert result.step_ms >= 10


def test_waiting_for_a_batch_is_the_phase_data(model):
    def slow(items):
        for item in items:
            time.sleep(8 * MS)
            yield item

    profiler = StepProfiler(model)
    with profiler:
        for _ in profiler.loading(slow(range(UNMEASURED + 2))):
            profiler.end_step()
    data, other = profiler.result().phases
    assert data.wall_ms >= 8
    assert data.share > 0.5 > other.share


@pytest.mark.parametrize("passes", [0, 3, 7])
def test_moves_of_bases_and_gauge_are_parts_wherever_in_its_period_a_layer_is(passes):
    layer = SubspaceLinear(64, 64, 16, activation=ActivationRanks(feature=16))
    layer.passes = passes
    optimizer = torch.optim.AdamW(layer.parameters())
    GaugeFix({"fc": layer}, "adamw").attach(optimizer)
    profiler = StepProfiler(layer)
    with profiler:
        for x in profiler.loading(torch.randn(UNMEASURED + 1, 8, 64)):
            with profiler.phase("forward"):
                loss = layer(x).square().mean()
            with profiler.phase("backward"):
                loss.backward()
            with profiler.phase("update"):
                optimizer.step()
                optimizer.zero_grad()
            profiler.end_step()
    result = profiler.result()
    parts = {part.name: part for part in result.parts}
    assert sum(part.forward_ms for part in result.parts) == pytest.approx(result.phases[1].wall_ms)  # 1 step
    assert parts["basis"].forward_ms > 0
    assert parts["gauge"].update_ms > 0


def test_what_happens_between_two_epochs_is_no_part_of_a_step(model):
    profiler = StepProfiler(model)
    with profiler:
        for _ in range(5):
            for _ in profiler.loading(range(3)):
                profiler.end_step()
            time.sleep(0.1)  # an evaluation
    assert profiler.result().step_ms < 50


def test_too_few_steps_are_a_clear_error(model):
    with pytest.raises(ConfigError, match=r"needs 12 training steps or more, this took 11"):
        run_steps(StepProfiler(model), [0.0] * UNMEASURED).result()
    assert run_steps(StepProfiler(model), [0.0] * (UNMEASURED + 1)).result().steps == 1


def test_a_profiler_that_measures_nothing_gives_the_batches():
    profiler = Unprofiled()
    with profiler, profiler.phase("forward"):
        assert list(profiler.loading([1, 2])) == [1, 2]


def test_the_trace_is_a_file_that_a_browser_shows(model, tmp_path):
    run_steps(StepProfiler(model, trace=tmp_path / "new" / "trace.json"), [0.0] * (UNMEASURED + 1))
    names = {
        event.get("name")
        for event in json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]
    }
    assert "phase.forward" in names


def test_a_trace_that_cannot_be_written_is_a_clear_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the trace"):
        run_steps(StepProfiler(model, trace=tmp_path / "file" / "trace.json"), [0.0] * UNMEASURED)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Linear(2, 2), "dense linear"),
        (SubspaceLinear(4, 4, 2), "factored linear"),
        (nn.Conv2d(1, 1, 1), "convolution"),
        (nn.LayerNorm(2), "norm"),
        (nn.BatchNorm2d(2), "norm"),
        (nn.GELU(), None),
        (nn.Sequential(), None),
    ],
)
def test_a_module_counts_for_its_kind(module, kind):
    assert kind_of(module) == kind


def test_the_parts_of_a_transformer_are_told(model):
    assert {kind_of(module) for module in model.modules()} - {None} == {
        "attention", "convolution", "dense linear", "mlp", "norm",
    }  # fmt: skip


class Mixed(nn.Module):
    """Two big products, one in a layer and one in a named range, and little else."""

    def __init__(self):
        super().__init__()
        self.layer, self.weight = nn.Linear(512, 512), nn.Parameter(torch.randn(512, 512))

    def forward(self, x):
        x = self.layer(x)
        with record_function("wasi.basis"):
            return x @ self.weight


def recorded(model, x):
    """Returns the time of one forward and backward pass by phase and part, in µs, and the events."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recording, module_ranges(model):
        with record_function("phase.forward"):
            loss = model(x).sum()
        with record_function("phase.backward"):
            loss.backward()
        torch.randn(512, 512) @ torch.randn(512, 512)  # in no phase
    events = recording.events()
    return part_times(events), events


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_an_operator_counts_for_the_range_around_it_and_so_does_its_gradient(phase):
    x = torch.randn(512, 512)
    recorded(Mixed(), x)  # warm
    times = recorded(Mixed(), x)[0][phase]
    assert set(times) == {"dense linear", "basis", "other"}
    assert times["other"] < 0.5 * sum(times.values())
    assert 0.1 < times["basis"] / times["dense linear"] < 10


def test_the_parts_of_a_phase_add_up_to_it():
    times, events = recorded(Mixed(), torch.randn(64, 512))
    assert set(times) == {"forward", "backward"}
    for phase, parts in times.items():
        (whole,) = (event for event in events if event.name == f"phase.{phase}")
        assert sum(parts.values()) == pytest.approx(whole.cpu_time_total, rel=1e-6)


def test_a_model_keeps_no_hook_of_the_profiler(model):
    with module_ranges(model):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
