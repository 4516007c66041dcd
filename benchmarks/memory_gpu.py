"""Peak memory and time of a training step on a GPU, dense and on the rungs of the memory ladder.

    python benchmarks/memory_gpu.py --json benchmarks/results/memory_gpu.json     # minutes, needs a GPU
    python benchmarks/memory_gpu.py --docs benchmarks/results/memory_gpu.json     # fills docs/memory.md

Whole steps at 224 px in fp32 (forward, backward, clipping, update) with random weights and images. *peak* is
what torch's allocator had handed out at most from before the model was made (`max_memory_allocated`):
weights, gradients, optimiser state, buffers, activations, workspace. *ms* is the median of five steps after
two, the device waited for after each; one rung is timed after the other, so the first one is timed again
at the end.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from kept import read_result, write_result
from memory_rungs import RUNGS, Rung, make_job
from pages import fill

from wasi_export.training.ladder import saving_memory
from wasi_export.training.memory import StepJob, draw_batch, make_model
from wasi_export.training.optim import create_optimizer
from wasi_export.training.step import TrainingStep

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
BATCH, MICRO_BATCH, FRACTION = 128, 32, 0.2
GPU_RUNGS = (
    *(
        r
        for r in RUNGS
        if r.name in ("dense", "dense, checkpointing", "factors", "compressed inputs", "fast")
    ),
    Rung("fast, micro_batch = 32", "", {"level": "fast", "micro_batch": MICRO_BATCH}),
    Rung("small, micro_batch = 32", "", {"level": "small", "micro_batch": MICRO_BATCH}),
    *(r for r in RUNGS if r.name == "streamed"),
    Rung(
        "streamed, block_chunk = 32",
        "",
        {"level": "streamed", "block_chunk": MICRO_BATCH},
    ),
)
WARM, TIMED = 2, 5
PAGE = Path("docs/memory.md")


def main() -> None:
    """Measures every row, or writes the table of a result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--json", type=Path, help="measure, and write the result here")
    action.add_argument("--docs", type=Path, help="fill the page from this result")
    options = parser.parse_args()
    if options.docs:
        fill(PAGE, "<!-- gpu -->\n", "<!-- end of gpu -->", to_markdown(read_result(options.docs)))
        return
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use")
    rows = []
    for model in MODELS:
        for rung in (*GPU_RUNGS, GPU_RUNGS[0]):
            job = make_job(model, BATCH, FRACTION if rung.factored else None, rung)
            rows.append({"model": model, "rung": rung.name} | measure(job))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "protocol": __doc__,
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__},
        "fraction": FRACTION,
        "batch": BATCH,
        "rows": rows,
    }
    write_result(options.json, result)


def measure(job: StepJob) -> dict[str, Any]:
    """Returns the peak in 10^6 bytes, and the median time of a step in ms."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    accelerator = Accelerator()
    model = make_model(job).to(accelerator.device)
    optimizer = create_optimizer(model, job.train)
    step = TrainingStep(
        accelerator, accelerator.prepare(model), accelerator.prepare(optimizer), job.train, seed=0
    )
    images, labels = (tensor.to(accelerator.device) for tensor in draw_batch(job))
    times = []
    with saving_memory(model, optimizer, job.train):
        for index in range(WARM + TIMED):
            torch.cuda.synchronize()
            began = time.perf_counter()
            step(images, labels, index)
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return {"peak_mb": round(peak, 1), "ms": round(statistics.median(times[WARM:]), 2)}


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of a result: of each model and batch, every rung beside plain torch."""
    device, torch_version = result["device"], result["versions"]["torch"]
    lines = [
        f"One {device}, torch {torch_version}, fp32, batch {result['batch']}, f = {result['fraction']:g}:",
        "",
        "| model | | peak MB | dense over it | ms | dense over it |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model in MODELS:
        dense, *rows, again = (row for row in result["rows"] if row["model"] == model)
        for row in (dense, *rows, again | {"rung": "dense, timed again"}):
            memory, time_ratio = dense["peak_mb"] / row["peak_mb"], dense["ms"] / row["ms"]
            figures = f"{row['peak_mb']:,.0f} | {memory:.2f} | {row['ms']:.1f} | {time_ratio:.2f}"
            lines.append(f"| {model} | {row['rung']} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
