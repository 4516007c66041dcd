"""The memory benchmark: its rows are what they say, and docs/memory.md shows the committed result."""

import json
from pathlib import Path

import memory_gpu
import pytest
import torch
import torch.nn.functional as F
from memory import paper_scope
from memory_gradients import take_gradient
from memory_rungs import RUNGS, make_job
from memory_tables import to_markdown
from step_measures import time_in_turns
from step_plans import make_plan
from torch import nn

from wasi_export.subspace import SubspaceLinear
from wasi_export.training.accounting import count_memory
from wasi_export.training.memory import draw_batch, make_model
from wasi_export.training.predict import count_steps, predict_step_memory

MODEL = "vit_tiny_patch16_224"
ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text(encoding="utf-8"))
MEASURED = [row for row in RESULT["rows"] if "measured_mb" in row]


def rung(name):
    return next(rung for rung in RUNGS if rung.name == name)


def test_the_page_shows_the_tables_of_the_committed_result():
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    assert to_markdown(RESULT) in page
    on_gpu = json.loads((ROOT / "benchmarks" / "results" / "memory_gpu.json").read_text(encoding="utf-8"))
    assert memory_gpu.to_markdown(on_gpu) in page


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['model']}-{row['batch']}-{row['rung']}")
def test_every_measured_peak_was_predicted_within_a_tenth(row):
    assert row["predicted_mb"] == pytest.approx(row["measured_mb"], rel=0.1)


def test_a_plan_has_the_fraction_asked_for():
    for fraction in (0.4, 0.6):
        plan = make_plan(MODEL, fraction, mode="none", size=224)
        share = sum(layer.parameters for layer in plan.layers) / sum(
            layer.dense_parameters for layer in plan.layers
        )
        assert len(plan.factored) == 48
        assert 0.9 * fraction < share <= fraction


def test_the_dense_rung_needs_what_a_hand_written_training_loop_needs():
    job = make_job(MODEL, 2, None, rung("dense"))
    model = make_model(job)
    optimizer = torch.optim.AdamW(model.parameters())
    with count_memory(model, optimizer) as account:
        for _ in range(2):
            images, labels = draw_batch(job)
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            del images, labels
    ours = count_steps(job, make_model(job)).peak.total
    # Within 1 %: the order in which both drop what they no longer need is not the same.
    assert ours == pytest.approx(account.peak.total, rel=0.01)


def test_checkpointing_is_that_of_timm():
    job = make_job(MODEL, 8, None, rung("dense, checkpointing"))
    assert make_model(job).grad_checkpointing
    saved = [predict_step_memory(make_job(MODEL, 8, None, one)).saved_mb for one in (rung("dense"), RUNGS[1])]
    assert saved[1] < 0.2 * saved[0]


def test_the_scope_of_the_paper_is_by_formula_what_torch_keeps():
    row = paper_scope(MODEL, 2, 0.4)
    for name in ("dense", "factored"):
        assert row[f"{name}_found_mb"] == pytest.approx(row[f"{name}_formula_mb"], abs=1e-6)


def test_the_error_of_a_gradient_is_seen_and_an_exact_rung_has_none():
    torch.manual_seed(0)
    model = make_model(make_job(MODEL, 2, 0.4, rung("compressed inputs")))
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([1, 2])
    gradients = {
        name: take_gradient(model, rung(name), images, labels)
        for name in ("factors", "update in backward", "compressed inputs")
    }
    exact = torch.cat([g.flatten() for g in gradients["factors"].values()])

    def error(name):
        found = torch.cat([gradients[name][key].flatten() for key in gradients["factors"]])
        return ((found - exact).norm() / exact.norm()).item()

    assert error("update in backward") < 1e-5
    assert error("compressed inputs") > 1e-3
    assert all(m.feature_basis is not None for m in model.modules() if isinstance(m, SubspaceLinear))


@pytest.mark.slow
def test_steps_are_timed_in_turns():
    jobs = {
        name: make_job(MODEL, 2, 0.4 if name == "fast" else None, rung(name)) for name in ("dense", "fast")
    }
    times = time_in_turns(jobs, 1, rounds=3)
    assert list(times) == ["dense", "fast"]
    assert all(len(taken) == 2 and min(map(min, taken)) > 0 for taken in times.values())
