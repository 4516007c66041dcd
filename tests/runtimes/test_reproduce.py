"""What two machines compute of a bundle: the same where they are the same, and told where they are not."""

import numpy as np
import pytest

from wasi_export.artifact import Bundle
from wasi_export.manifest import MODEL
from wasi_export.runtimes.reproduce import LOSSES, PARAMETER, compare, compute, difference, write
from wasi_export.untrusted.tensors import load_unchecked


@pytest.fixture
def opened(learning_bundle):
    return Bundle.open(learning_bundle)


@pytest.fixture
def results(opened):
    return compute(opened, seconds=60, steps=20)


def checks_of(opened, results):
    return {check.name: check for check in compare(opened, results, name="board")}


def test_a_machine_computes_what_it_computed(opened, results, tmp_path):
    write(results, tmp_path / "results")
    checks = checks_of(opened, load_unchecked(tmp_path / "results", "results of a machine"))
    assert {name: check.status for name, check in checks.items()} == {
        "model.onnx as here": "passed",
        "training as here": "passed",
    }
    assert all(check.value == 0 for check in checks.values())
    assert "20 steps on board" in checks["training as here"].detail


@pytest.mark.parametrize(
    ("name", "check"),
    [(MODEL, "model.onnx as here"), (PARAMETER + "left", "training as here")],
)
@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_a_machine_that_computes_something_else_is_told(opened, results, name, check, wrong):
    results[name].flat[0] += wrong
    found = checks_of(opened, results)
    assert found[check].status == "failed"
    assert [other.status for other_name, other in found.items() if other_name != check] == ["passed"]


def test_what_is_begun_depends_on_the_time_and_something_always_is(opened):
    found = compute(opened, seconds=0, steps=20)
    assert len(found[LOSSES]) == 1
    assert len(found[MODEL]) == 2
    assert {check.status for check in compare(opened, found, name="board")} == {"passed"}


def test_a_bundle_without_training_has_outputs_alone(finished_bundle):
    assert set(compute(Bundle.open(finished_bundle), seconds=60, steps=20)) == {MODEL}


def test_a_difference_is_of_the_scale():
    own = np.array([0, 4], np.float32)
    assert difference(own, own + np.float32(0.5)) == pytest.approx(0.125)
    assert difference(own, own[:1]) == float("inf")
    assert difference(np.zeros(2, np.float32), np.zeros(2, np.float32)) == 0
