"""Files of safetensors that anybody may have written."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save, save_file

from wasi_export.errors import IntegrityError, MalformedError
from wasi_export.untrusted.tensors import check_tensors, load_unchecked
from wasi_export.untrusted.values import check_finite


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_weights_pass(tmp_path: Path) -> None:
    weights = {
        "blocks.0.left": np.ones((3, 2), np.float32),
        "steps": np.array(7),
        "half": np.ones(1, np.float16),
    }
    save_file(weights, tmp_path / "x.safetensors")
    check_tensors(tmp_path / "x.safetensors")


def test_without_a_look_values_are_as_they_are(tmp_path: Path) -> None:
    save_file({"w": np.array([1, np.nan], np.float32)}, tmp_path / "x.safetensors")
    found = load_unchecked(tmp_path / "x.safetensors", "weights")
    np.testing.assert_array_equal(found["w"], np.array([1, np.nan], np.float32))


@pytest.mark.parametrize("data", [None, b"x"], ids=["missing", "noise"])
def test_a_file_without_tensors_is_told_by_what_it_should_hold(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"x\.safetensors holds no results of a machine: "):
        load_unchecked(tmp_path / "x.safetensors", "results of a machine")


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (save({"w": np.array([1, np.nan], np.float32)}), "'w' holds 1 NaN or infinite"),
        (save({"w": np.array([1, np.inf, -np.inf], np.float16)}), "'w' holds 2 NaN or infinite"),
        (save({"w": np.array([np.inf], np.float64)}), "'w' holds 1 NaN or infinite"),
        (save({"\x1b[2J": np.ones(1, np.float32)}), "no name of a tensor"),
        (save({"w" * 2000: np.ones(1, np.float32)}), "no name of a tensor"),
        (raw({"w": F32}, b"\0" * 3), "no safetensors"),
        (raw({"w": F32}, b"\0" * 5), "no safetensors"),
        (raw({"w": F32 | {"data_offsets": [-4, 0]}}, b"\0" * 4), "no safetensors"),
        (raw({"w": F32 | {"data_offsets": [0, 2**63]}}, b"\0" * 4), "no safetensors"),
        (raw({"w": F32 | {"shape": [2**62, 4]}}, b"\0" * 4), "no safetensors"),
        (raw({"w": F32 | {"shape": [2**40, 0], "data_offsets": [0, 0]}}), "absurd shape"),
        (raw({"w": F32 | {"shape": [1] * 17}}, b"\0" * 4), "absurd shape"),
        (raw({"w": F32 | {"dtype": "BF16", "shape": [2]}}, b"\0" * 4), "type"),
        (raw({"w": F32, "v": F32}, b"\0" * 4), "no safetensors"),
        (
            raw(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}' + b"[" * 9000),
            "no safetensors",
        ),
        ((2**63).to_bytes(8, "little"), "no safetensors"),
        (b"", "no safetensors"),
        (b"\x80\x04\x95cos\nsystem\n", "no safetensors"),  # the beginning of a pickle
    ],
)
def test_what_are_no_weights_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(MalformedError, match=reason):
        check_tensors(tmp_path / "x.safetensors")


@given(arrays.arrays(np.float32, arrays.array_shapes(max_side=4), elements=st.sampled_from([0.0, -np.inf])))
def test_a_mask_of_attention_may_be_infinite(mask: np.ndarray) -> None:
    check_finite("mask", mask)


@given(
    arrays.arrays(np.float32, arrays.array_shapes(max_side=4), elements=st.floats(width=32)),
    st.sampled_from([np.nan, np.inf]),
)
def test_any_other_infinity_and_any_nan_is_found(values: np.ndarray, bad: float) -> None:
    values.flat[0] = bad
    with pytest.raises(MalformedError):
        check_finite("w", values)
