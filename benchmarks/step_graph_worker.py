"""A fresh process of `benchmarks/step_graph.py` that takes steps in onnxruntime: no torch, no onnx."""

import json
import sys
import time

START = time.perf_counter()

from pathlib import Path  # noqa: E402  # the clock starts before the imports

import numpy as np  # noqa: E402
from step_graph_memory import memory_mib  # noqa: E402

from wasi_export.manifest import TrainingGraph  # noqa: E402
from wasi_export.runtimes.training_session import TrainingSession  # noqa: E402


def main() -> None:
    """Prints what was measured, as JSON."""
    way, case, batch, steps, folder = sys.argv[1:]
    imported = memory_mib("VmRSS")
    place = Path(folder) / f"{case} {way}"
    session = TrainingSession.load(
        place, TrainingGraph.model_validate_json((place / "training.json").read_text())
    )
    generator, samples = np.random.default_rng(0), []
    images = generator.standard_normal((int(batch), 3, 224, 224), np.float32)
    labels = generator.integers(0, 10, int(batch))
    for _ in range(int(steps) + 1):
        began = time.process_time()
        session.step(images, labels, lr=1e-3, weight_decay=0.05, clip_norm=1.0)
        samples.append(1e3 * (time.process_time() - began))
        if len(samples) == 1:
            start_s = time.perf_counter() - START
    peak = memory_mib("VmHWM")
    found = {"peak_mib": peak, "less_import_mib": peak - imported, "start_s": start_s}
    print(json.dumps({"samples_ms": samples[1:], **found}))


if __name__ == "__main__":
    main()
