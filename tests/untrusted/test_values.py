"""What is just within the limits of names, shapes and numbers, and what is just beyond."""

import numpy as np
import pytest

from wasi_export.errors import MalformedError
from wasi_export.untrusted.values import MAX_AXES, MAX_AXIS, MAX_NAME, check_finite, check_name, check_shape


def test_a_name_has_as_many_characters_as_the_limit_and_no_more():
    assert MAX_NAME == 1024
    check_name("x" * MAX_NAME, "tensor")
    with pytest.raises(MalformedError, match=f"^'{'x' * 60}' is no name of a tensor$"):
        check_name("x" * (MAX_NAME + 1), "tensor")


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x7f", "\x9f"])
def test_a_name_can_be_printed(character):
    with pytest.raises(MalformedError, match="is no name of a value"):
        check_name(f"a{character}b", "value")


@pytest.mark.parametrize("shape", [(), (0,), (MAX_AXIS,), (1,) * MAX_AXES])
def test_a_shape_that_can_be_held_passes(shape):
    check_shape("x", shape)


@pytest.mark.parametrize("shape", [(-1,), (2, -1), (MAX_AXIS + 1,), (1,) * (MAX_AXES + 1)])
def test_an_absurd_shape_is_refused(shape):
    with pytest.raises(MalformedError, match="'x' has the absurd shape") as caught:
        check_shape("x", shape)
    assert str(list(shape[:MAX_AXES])) in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        np.array([1.0, -2.0]), np.array([0.0, -np.inf]), np.array([-np.inf]), np.array([1, 2]),
        np.array([True]), np.array([1, 2], np.uint8), np.array([], np.float32),
    ],
)  # fmt: skip
def test_numbers_and_masks_pass(values):
    check_finite("x", values)


@pytest.mark.parametrize(
    ("values", "count"),
    [([1.0, np.nan], 1), ([np.nan, np.inf, 1.0], 2), ([0.0, np.inf], 1), ([1.0, -np.inf], 1)],
)
def test_what_is_no_number_is_counted(values, count):
    with pytest.raises(MalformedError, match=f"'x' holds {count} NaN or infinite numbers"):
        check_finite("x", np.array(values))


@pytest.mark.parametrize("kind", ["U3", "S3", "O", "M8[s]", "c8", "V4"])
def test_what_is_of_another_type_is_refused(kind):
    with pytest.raises(MalformedError, match="'x' is of type"):
        check_finite("x", np.zeros(1, kind))


def test_the_limits_are_those_of_int32_and_of_numpy():
    assert (MAX_AXIS, MAX_AXES) == (2147483647, 16)


def test_a_mask_has_nothing_below_zero_but_minus_infinity():
    with pytest.raises(MalformedError):
        check_finite("x", np.array([-1.0, -np.inf]))


@pytest.mark.parametrize("name", ["", "blocks.0.mlp.fc1.left", "é"])
def test_a_name_of_ours_is_one(name):
    check_name(name, "tensor")
