"""Where the time of a graph goes, by kind of operator, as the runtime's own profiler tells."""

import json
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from wasi_export.runtimes.session import session_options

ROUNDS, WARMUP = 20, 5


def operator_times(path: Path, image: NDArray[np.float32]) -> dict[str, float]:
    """Returns the ms that the nodes of each kind take in a run: medians over runs, one thread, wall time.

    Kinds are those of the optimised graph: a Gemm, an Attention.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads=1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = ort.InferenceSession(str(path), options)
        name = session.get_inputs()[0].name
        for _ in range(WARMUP + ROUNDS):
            session.run(None, {name: image})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    runs: list[Counter[str]] = [Counter()]
    for event in events:
        if event["name"] == "model_run":  # told after the nodes that it ran
            runs.append(Counter())
        elif event["name"].endswith("_kernel_time"):
            runs[-1][event["args"]["op_name"]] += event["dur"]
    counted = runs[WARMUP:-1]
    kinds = {kind for run in counted for kind in run}
    return {kind: median(run[kind] for run in counted) / 1000 for kind in sorted(kinds)}
