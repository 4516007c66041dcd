"""Training steps in onnxruntime-training 1.19.2, the last of its kind, in an environment of its own.

The model, the clipped gradient and the measures are those of the other ways of `benchmarks/step_graph.py`, in
a fresh process of the environment's python, without torch. The optimizer is not: it offers plain SGD and
AdamW, and this is its SGD, without momentum and weight decay, which spares it a tensor and some arithmetic
for each weight. One thread; the memory pattern stays on, as here it saves memory (1407 MiB, not 1481, of a
dense step of 32).

What has to be got round:

- `onnxruntime.training` imports torch in its `__init__`, for parts that a step does not use. With an empty
  package of the same path in its place, its modules are imported without.
- The optimizer's graph gets the IR version of the installed onnx; the runtime takes at most 10.
- No gradient is built for the LayerNormalization of opset 17 and 18, so the forward graph has opset 16, in
  which the runtime's own fusion finds the norms. Only torch's older exporter writes it:
  `step_graph_ort_forward.py`.
"""

import json
import sys
import time

START = time.perf_counter()

from importlib.util import find_spec  # noqa: E402  # the clock starts before the imports
from pathlib import Path  # noqa: E402
from types import ModuleType  # noqa: E402

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402
from step_graph_memory import memory_mib  # noqa: E402

IR_VERSION = 10  # the newest that onnxruntime 1.19 reads


def main() -> None:
    """Prints what was measured, or facts of the artifacts that were written, as JSON."""
    stub_package()
    if sys.argv[1] == "artifacts":
        print(json.dumps(write_artifacts(Path(sys.argv[2]))))
    else:
        way, case, batch, steps, folder = sys.argv[1:]
        print(json.dumps(measure(Path(folder) / f"{case} {way}", int(batch), int(steps))))


def stub_package() -> None:
    """Puts an empty package in the place of `onnxruntime.training`, whose own imports torch."""
    package = find_spec("onnxruntime")
    assert package is not None
    stub = ModuleType("onnxruntime.training")
    stub.__path__ = [str(Path(place) / "training") for place in package.submodule_search_locations or ()]
    sys.modules["onnxruntime.training"] = onnxruntime.training = stub


def write_artifacts(place: Path) -> dict[str, float]:
    """Writes the artifacts of a forward graph beside it; returns facts of the training graph."""
    import onnx
    from onnxruntime.training import artifacts
    from onnxruntime.training.onnxblock import optim

    start = time.process_time()
    artifacts.generate_artifacts(
        onnx.load(place / "forward.onnx"),
        requires_grad=json.loads((place / "trainable.json").read_text()),
        loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=optim.SGD(clip_grad=optim.ClipGradNorm(1.0)),
        artifact_directory=place,
    )
    seconds = time.process_time() - start
    update = onnx.load(place / "optimizer_model.onnx")
    update.ir_version = IR_VERSION
    onnx.save(update, place / "optimizer_model.onnx")
    path = place / "training_model.onnx"
    return {
        "nodes": len(onnx.load(path).graph.node),
        "mb": path.stat().st_size / 1e6,
        "export_s": seconds,
    }


def measure(place: Path, batch: int, steps: int) -> dict[str, object]:
    """Returns time and memory of steps, as `step_graph_worker.py`."""
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    imported = memory_mib("VmRSS")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    state = CheckpointState.load_checkpoint(place / "checkpoint")
    module = Module(place / "training_model.onnx", state, session_options=options)  # and no graph to evaluate
    optimizer = Optimizer(place / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(1e-3)
    generator, samples = np.random.default_rng(0), []
    images = generator.standard_normal((batch, 3, 224, 224), np.float32)
    labels = generator.integers(0, 10, batch)
    module.train()
    for _ in range(steps + 1):
        began = time.process_time()
        module(images, labels)
        optimizer.step()
        module.lazy_reset_grad()
        samples.append(1e3 * (time.process_time() - began))
        if len(samples) == 1:
            start_s = time.perf_counter() - START
    peak = memory_mib("VmHWM")
    found = {"peak_mib": peak, "less_import_mib": peak - imported, "start_s": start_s}
    return {"samples_ms": samples[1:], **found}


if __name__ == "__main__":
    main()
