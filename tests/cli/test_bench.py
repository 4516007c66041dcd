import pytest
from helpers import make_bundle, make_model, require_schema
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.report import Benchmark


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "plain.onnx"
    path.write_bytes(make_model())
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_bundles_and_plain_models_are_measured_side_by_side(bundle, model):
    result = run(bundle, model, "--rounds", 4, "--warmup", 1, "--batch", 2, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    require_schema("benchmark", result.stdout)
    first, second = Benchmark.model_validate_json(result.stdout).latency
    assert (first.model, second.model) == (str(bundle), str(model))
    assert first.ratio_to_first == 1
    assert {len(latency.samples_ms) for latency in (first, second)} == {4}
    assert (first.batch, first.threads) == (2, 1)


def test_the_table_says_how_it_was_measured(bundle):
    result = run(bundle, "--rounds", 3)
    assert result.exit_code == 0
    assert "p99 ms" in result.stdout
    assert "Batch 1, threads 1, 3 rounds after warm-up" in result.stdout
    assert "onnxruntime" in result.stdout


def test_a_model_file_that_does_not_exist_exits_2(tmp_path):
    result = run(tmp_path / "nothing.onnx")
    assert result.exit_code == 2
    assert result.stderr == f"error: no model file {tmp_path / 'nothing.onnx'}: check the path\n"


def test_a_batch_that_the_model_does_not_take_exits_2(tmp_path):
    path = tmp_path / "fixed.onnx"
    path.write_bytes(make_model(batch="1"))
    result = run(path, "--batch", 2)
    assert result.exit_code == 2
    assert "takes batch 1 only, got batch 2" in result.stderr


@pytest.mark.parametrize(("option", "value"), [("--threads", 0), ("--rounds", 0), ("--batch", -1)])
def test_a_count_out_of_range_exits_2(bundle, option, value):
    result = run(bundle, option, value)
    assert result.exit_code == 2
    assert option in result.stderr
