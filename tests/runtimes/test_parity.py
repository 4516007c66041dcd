import numpy as np
import pytest
from helpers import make_bundle, make_model

from wasi_export.artifact import Bundle, Golden
from wasi_export.errors import ModelFailedError, NothingToCheckError, ParityError
from wasi_export.runtimes.parity import (
    ParityResult,
    _relative,
    measure_parity,
    relative_error,
    require_parity,
    worst,
)


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(make_bundle(tmp_path / "bundle"))


def test_every_batch_size_is_run_with_optimisation_off_and_on(bundle):
    results = measure_parity(bundle.model_path, bundle.golden())
    assert [(r.optimised, r.batch) for r in results] == [(o, b) for o in (False, True) for b in (1, 2, 7)]
    assert 0 < worst(results).max_error < 1e-6
    require_parity(results, 1e-6)


@pytest.mark.parametrize("index", [0, 4])
def test_an_error_in_any_golden_image_is_found_at_every_batch_size(bundle, index):
    golden = bundle.golden()
    golden.outputs[index, 1] += 0.25 * np.abs(golden.outputs).max()
    scale = np.abs(golden.outputs).max()
    error = np.abs(golden.outputs - bundle.golden().outputs).max() / scale
    results = measure_parity(bundle.model_path, golden)
    assert all(result.max_error == pytest.approx(error, rel=1e-4) for result in results)
    with pytest.raises(ParityError, match=r"differ from the reference by .* at batch .*tolerance is 1e-05"):
        require_parity(results, 1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_an_infinite_error(bundle, value):
    golden = bundle.golden()
    golden.outputs[2, 0] = value
    results = measure_parity(bundle.model_path, golden)
    assert worst(results).max_error == np.inf
    with pytest.raises(ParityError, match="by inf"):
        require_parity(results, 1e30)


def test_a_baked_batch_size_fails(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", model=make_model(batch="1")))
    with pytest.raises(ModelFailedError, match=r"failed on images \[2, 3, 4, 4\]"):
        measure_parity(bundle.model_path, bundle.golden())


@pytest.mark.parametrize("classes", [1, 4])
def test_outputs_of_another_shape_fail(bundle, classes):
    golden = bundle.golden()
    other = Golden(golden.images, np.repeat(golden.outputs[:, :1], classes, axis=1), golden.labels)
    message = rf"gives outputs \[1, 2\].*the reference has \[1, {classes}\]"
    with pytest.raises(ModelFailedError, match=message):
        measure_parity(bundle.model_path, other)


def test_a_reference_of_zeros_has_no_scale(bundle):
    golden = bundle.golden()
    golden.outputs[:] = 0
    assert worst(measure_parity(bundle.model_path, golden)).max_error == np.inf


def test_fewer_golden_images_than_a_batch_are_taken_again_and_again(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", golden_images=2))
    assert worst(measure_parity(bundle.model_path, bundle.golden())).max_error < 1e-6


@pytest.mark.parametrize(("factor", "error"), [(2, 0.5), (0.5, 1), (-1, 2), (np.nan, np.inf)])
def test_the_relative_error_is_of_norms(bundle, factor, error):
    golden = bundle.golden()
    golden.outputs[:] *= factor
    assert relative_error(bundle.model_path, golden) == pytest.approx(error, rel=1e-4)


def test_without_golden_images_there_is_nothing_to_check(tmp_path):
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", golden_images=0))
    with pytest.raises(NothingToCheckError, match="golden data holds no images"):
        measure_parity(bundle.model_path, bundle.golden())


def test_no_error_is_no_error_of_any_scale():
    assert [_relative(0.0, scale) for scale in (0.0, 2.0, np.inf)] == [0.0] * 3
    assert _relative(1.0, 4.0) == 0.25
    assert _relative(-1.0, 4.0) == -0.25


def test_a_result_says_where_it_was_measured():
    assert str(ParityResult(7, True, 0.00123)) == "1.2e-03 at batch 7, optimisation all"
    assert str(ParityResult(1, False, 0.5)) == "5.0e-01 at batch 1, optimisation off"
