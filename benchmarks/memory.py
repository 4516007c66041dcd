"""Peak memory, time and gradient of a training step, dense and on every rung of the memory ladder.

    python benchmarks/memory.py --json benchmarks/results/memory.json                 # predicts every row
    python benchmarks/memory.py --json benchmarks/results/memory.json --measure       # and measures them
    python benchmarks/memory.py --json benchmarks/results/memory.json --times 2       # on two threads
    python benchmarks/memory.py --json benchmarks/results/memory.json --gradients runs/small
    python benchmarks/memory.py --table benchmarks/results/memory.json

`predicted` runs the steps on fake tensors, as `wasi-export plan` does, `accounted` is the part of it that is
torch's own tensors, `measured` is the growth of the resident set of a fresh process over three steps. Times
are of whole steps (forward, backward, clipping, update), of all rungs in turns, without the first. The
gradients are of a factored run of real weights on a batch of its own training images, against those of the
same model without any switch and without compressed inputs.

What is in the file is kept: an interrupted benchmark goes on where it stopped, row by row.
"""

import argparse
import itertools
import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kept import read_result, write_result
from linear_cost import linear_cost
from memory_gradients import gradient_errors
from memory_rungs import RUNGS, SIZE, Rung, make_job
from memory_tables import to_markdown
from step_measures import saved_by_layers, time_in_turns
from step_plans import make_plan

from wasi_export.runtimes.host import describe_host
from wasi_export.training.memory import StepJob, measure_step_memory
from wasi_export.training.predict import predict_step_memory

MODELS = ("vit_small_patch16_224", "vit_base_patch32_224")
BATCHES = (32, 128)
FRACTIONS = (0.4, 0.2)
TIMED = ("dense", "factors", "compressed inputs", "fast", "small", "streamed", "streamed, right")

Row = dict[str, Any]


def predict(job: StepJob) -> Row:
    """Returns the predicted figures of a row."""
    predicted = predict_step_memory(job)
    accounted = predicted.peak_mb - predicted.kernels_mb
    return {"predicted_mb": predicted.peak_mb, "accounted_mb": accounted, "parts": predicted.model_dump()}


def measure(job: StepJob) -> Row:
    """Returns the measured figures of a row."""
    measured = measure_step_memory(job)
    return {
        "measured_mb": measured.peak_mb,
        "alone_wall_s": measured.step_seconds,
        "alone_cpu_s": measured.step_cpu_seconds,
    }


def paper_scope(model: str, batch: int, fraction: float) -> Row:
    """Returns weights and saved inputs of the factored layers in 10^6 bytes, by formula and as in torch."""
    plan = make_plan(model, fraction, mode="feature", size=SIZE)
    dense = [
        layer.model_copy(update={"rank": None, "activation": type(layer.activation)()})
        for layer in plan.layers
    ]
    row: Row = {"model": model, "batch": batch, "fraction": fraction}
    for name, layers, rung in (
        ("dense", dense, RUNGS[0]),
        ("factored", plan.layers, next(rung for rung in RUNGS if rung.compressed)),
    ):
        job = make_job(model, batch, fraction if rung.factored else None, rung)
        found = saved_by_layers(job, {layer.name for layer in layers})
        costs = [linear_cost(layer, batch=batch, tokens=layer.tokens or 0) for layer in layers]
        row[f"{name}_formula_mb"] = sum(cost.training_bytes for cost in costs) / 1e6
        row[f"{name}_found_mb"] = (found + sum(cost.weight_bytes for cost in costs)) / 1e6
    return row


def update_rows(result: Row, path: Path, options: argparse.Namespace) -> None:
    """Adds what is asked for and missing, writing the file after each row."""

    def find(table: str, key: Row) -> Row | None:
        return next((row for row in result[table] if key.items() <= row.items()), None)

    for model, batch, fraction, rung in grid(options):
        key: Row = {"model": model, "batch": batch, "fraction": fraction, "rung": rung.name}
        row = find("rows", key)
        if row is None:
            row = key | predict(make_job(model, batch, fraction, rung))
            result["rows"].append(row)
            write_result(path, result)
        if options.measure and "measured_mb" not in row:
            row |= measure(make_job(model, batch, fraction, rung))
            print(json.dumps({k: v for k, v in row.items() if k != "parts"}), flush=True)
            write_result(path, result)
    for model, batch, fraction in itertools.product(options.models, options.batches, options.fractions):
        key = {"model": model, "batch": batch, "fraction": fraction}
        if find("paper_scope", key) is None:
            result["paper_scope"].append(paper_scope(model, batch, fraction))
        key |= {"threads": options.times}
        if options.times and find("times", key) is None:
            jobs = {
                rung.name: make_job(model, batch, fraction if rung.factored else None, rung)
                for rung in RUNGS
                if rung.name in (options.rungs or TIMED)
            }
            for name, times in time_in_turns(jobs, options.times).items():
                wall, cpu = zip(*times, strict=True)
                result["times"].append(key | {"rung": name, "wall_s": wall, "cpu_s": cpu})
        write_result(path, result)
    if options.gradients:
        result["gradients"] = gradient_errors(options.gradients)
        write_result(path, result)


def grid(options: argparse.Namespace) -> Iterable[tuple[str, int, float | None, Rung]]:
    """Yields model, batch, fraction (None: dense) and rung of every row asked for."""
    for model, batch in itertools.product(options.models, options.batches):
        for rung in RUNGS:
            if options.rungs and rung.name not in options.rungs:
                continue
            for fraction in options.fractions if rung.factored else [None]:
                yield model, batch, fraction, rung


def commit_hash() -> str:
    """Returns the commit that is measured, marked when the tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def new_result() -> Row:
    """Returns a result without rows."""
    return {
        "protocol": __doc__,
        "commit": commit_hash(),
        "host": json.loads(describe_host().model_dump_json()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rungs": [asdict(rung) for rung in RUNGS],
        "rows": [],
        "times": [],
        "gradients": [],
        "paper_scope": [],
    }


def main() -> None:
    """Runs the benchmark, writes the result and prints its tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="the result, kept and added to")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of a result and stop")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--fractions", nargs="+", type=float, default=FRACTIONS)
    parser.add_argument("--rungs", nargs="+", choices=[rung.name for rung in RUNGS], help="default: all")
    parser.add_argument("--measure", action="store_true", help="measure the rows, one thread")
    parser.add_argument("--times", type=int, metavar="THREADS", help="time steps in turns")
    parser.add_argument("--gradients", type=Path, metavar="RUN", help="a run folder with factored layers")
    options = parser.parse_args()
    if options.table or not options.json:
        if not options.table:
            parser.error("give --json or --table")
        print(to_markdown(read_result(options.table)))
        return
    result = read_result(options.json) if options.json.is_file() else new_result()
    update_rows(result, options.json, options)


if __name__ == "__main__":
    main()
