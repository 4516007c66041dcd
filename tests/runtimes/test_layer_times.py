"""Times of layers: measured, remembered, and put together to the latency of a model."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import make_model

from wasi_export.converters.linear_graph import linear_graph
from wasi_export.cost import LinearForm
from wasi_export.errors import IntegrityError
from wasi_export.runtimes.layer_times import measure_forms, measure_layer_times

DENSE = LinearForm(256, 256, 64, None)
SMALL = LinearForm(256, 256, 64, 32)


def counting(calls: list[LinearForm]) -> Callable[[LinearForm], bytes]:
    """Returns `linear_graph`, which notes the forms it is asked for."""

    def graph(form: LinearForm) -> bytes:
        calls.append(form)
        return linear_graph(form)

    return graph


def test_a_form_with_a_quarter_of_the_products_takes_less_time() -> None:
    times = measure_forms([DENSE, SMALL], linear_graph)
    assert 0 < times[SMALL] < times[DENSE]


def test_what_was_measured_once_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[LinearForm] = []
    first = measure_forms([DENSE, SMALL, SMALL], counting(calls), cache=tmp_path)
    assert sorted(calls, key=str) == sorted([DENSE, SMALL], key=str)
    again = measure_forms([SMALL], counting(calls), cache=tmp_path)
    assert len(calls) == 2
    assert again == {SMALL: first[SMALL]}
    more = LinearForm(256, 256, 64, 40)
    assert measure_forms([more, DENSE], counting(calls), cache=tmp_path)[DENSE] == first[DENSE]
    assert calls[2:] == [more]


def test_times_of_other_threads_are_kept_apart(tmp_path: Path) -> None:
    calls: list[LinearForm] = []
    for threads in (1, 2):
        measure_forms([SMALL], counting(calls), threads=threads, cache=tmp_path)
    assert len(calls) == len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_of_times_is_named(tmp_path: Path) -> None:
    measure_forms([SMALL], linear_graph, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_text("{}")
    with pytest.raises(IntegrityError, match=rf"{path.name} is not a file of layer times: delete it"):
        measure_forms([SMALL], linear_graph, cache=tmp_path)


def test_the_rest_of_a_model_is_what_its_layers_do_not_take(tmp_path: Path) -> None:
    """The model is some microseconds of products; with no layer of its own that is all rest."""
    (tmp_path / "model.onnx").write_bytes(make_model())
    forms = [LinearForm(2, 48, 1, None), LinearForm(2, 48, 1, 1)]
    times = measure_layer_times(tmp_path / "model.onnx", forms[:1], forms, linear_graph)
    assert set(times.form_ms) == set(forms)
    assert times.rest_ms >= 0
    assert times.model_ms(forms[:1]) == pytest.approx(times.rest_ms + times.form_ms[forms[0]])
