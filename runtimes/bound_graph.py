"""A graph whose state is bound to buffers: what it gives as `X.next` is written over X.

That it may be was checked when the graph was exported (`converters/step_graph/in_place.py`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from wasi_export.manifest import NEXT
from wasi_export.runtimes.session import open_model


class BoundGraph:
    """A session with its state; its other outputs are numbers."""

    def __init__(self, path: Path, options: ort.SessionOptions) -> None:
        """Loads the graph.

        Raises:
            HostError: it needs a newer onnxruntime.
            ModelFailedError: it does not load.
        """
        self._session = open_model(path, options)
        self.inputs: Mapping[str, Sequence[Any]] = {v.name: v.shape for v in self._session.get_inputs()}
        names = [value.name for value in self._session.get_outputs()]
        self._changed = [name for name in names if name.endswith(NEXT)]
        self._numbers = [name for name in names if not name.endswith(NEXT)]
        self._binding = self._session.io_binding()

    def bind(self, state: Mapping[str, ort.OrtValue]) -> None:
        """Makes the buffers of a state, those that are inputs here, the ones to work in."""
        for name in self.inputs.keys() & state.keys():
            self._binding.bind_ortvalue_input(name, state[name])
        for name in self._numbers:
            self._binding.bind_output(name)
        for name in self._changed:
            self._binding.bind_ortvalue_output(name, state[name.removesuffix(NEXT)])

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
        """Runs on inputs that are no state, writes the new state, and returns the numbers.

        What onnxruntime raises goes through.
        """
        for name, value in inputs.items():
            self._binding.bind_cpu_input(name, np.asarray(value, order="C"))  # a scalar stays one
        for name in self._numbers:
            self._binding.bind_output(name)
        self._session.run_with_iobinding(self._binding)
        found = self._binding.get_outputs()  # in the order of their first binding
        return {name: value.numpy().item() for name, value in zip(self._numbers, found, strict=False)}
