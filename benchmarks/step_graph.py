"""Time and memory of a training step: the ONNX graph in onnxruntime, beside torch.

    python benchmarks/step_graph.py                       # all rows that are not in the result; half an hour
    python benchmarks/step_graph.py --batches 8           # of these batches alone
    python benchmarks/step_graph.py --ort-training PYTHON # and in onnxruntime-training, whose python this is
    python benchmarks/step_graph.py --docs                # table into docs/adapt.md, no run
    python benchmarks/step_graph.py --json                # prints the result

vit_tiny_patch16_224 with 10 classes and random weights: dense with all of it trained, dense with the last two
blocks trained, factored at f = 0.2 with factors and head trained. SGD with momentum, clipped gradient, one
thread. Every step runs in a fresh process; the processes of a row are taken in turns, three rounds. Time is
the median of CPU time over the steps of all rounds, the first step of a process left out. Memory is the peak
of the resident set (VmHWM), in MiB: of the process, and less what it was after its imports. Start is from the
process's beginning to the end of its first step, imports included.

onnxruntime-training 1.19.2, the last of its kind, takes part where the python of an environment with it is
given (`step_graph_ort_training.py`), dense with all of it trained and factored. Momentum is not among its
optimizers: its steps are plain SGD. A row that lacks it is then measured anew, all ways of it, as they are
taken in turns.

The result is written after each row.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import new_parser, new_result, read_result, to_json, write_result
from pages import fill
from step_graph_models import CASES, write_case
from step_graph_ort_forward import ORT_CASES, ORT_TRAINING, write_ort_training

from wasi_export.views import markdown_table

RESULT, PAGE = Path("benchmarks/results/step_graph.json"), Path("docs/adapt.md")
MARK, END = "<!-- benchmarks/step_graph.py -->\n", "<!-- end of benchmarks/step_graph.py -->"
BATCHES, ROUNDS, STEPS = (1, 8, 32), 3, {1: 12, 8: 5, 32: 3}
WAYS = ("onnxruntime", "onnxruntime, recompute", "torch eager", "torch, checkpointing")
COLUMNS = (
    "trained", "batch", "step", "ms", "time over torch eager", "peak MiB", "less import", "over torch eager",
    "start s",
)  # fmt: skip


def main() -> None:
    """Measures what is missing."""
    parser = new_parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument(
        "--ort-training", metavar="PYTHON", help="of an environment with onnxruntime-training"
    )
    parser.add_argument("--docs", action="store_true", help="table into the page, no run")
    options = parser.parse_args()
    result = read_result(RESULT, new_result(__doc__, torch=torch.__version__, rows=[]))
    if not (options.docs or options.json):
        measure(result, options.batches, options.ort_training)
    if options.docs:
        fill(PAGE, MARK, END, to_markdown(result))
    if options.json:
        print(to_json(result))


def measure(result: dict[str, Any], batches: tuple[int, ...], ort_training: str | None = None) -> None:
    """Adds the rows that are missing or lack a way; `ort_training` is the python of that environment."""
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            names = (*WAYS, ORT_TRAINING) if ort_training and case in ORT_CASES else WAYS
            known = {
                row["batch"]
                for row in result["rows"]
                if row["case"] == case and row["ways"].keys() >= {*names}
            }
            missing = [batch for batch in batches if batch not in known]
            facts = write_case(case, Path(folder)) if missing else {}
            if missing and ort_training and case in ORT_CASES:
                facts[ORT_TRAINING] = write_ort_training(case, Path(folder), ort_training)
            for batch in missing:
                ways = {way: [] for way in names}
                for _ in range(ROUNDS):
                    for way, runs in ways.items():
                        runs.append(run(way, case, batch, Path(folder), ort_training))
                row = {"case": case, "batch": batch, "graphs": facts, "ways": ways}
                others = [old for old in result["rows"] if (old["case"], old["batch"]) != (case, batch)]
                result["rows"] = [*others, row]
                write_result(RESULT, result)


def run(way: str, case: str, batch: int, folder: Path, ort_training: str | None = None) -> dict[str, Any]:
    """Returns what a fresh process measured of its steps."""
    python, worker = sys.executable, "step_graph_worker.py"
    if way.startswith("torch"):
        worker = "step_graph_torch.py"
    elif way == ORT_TRAINING:
        assert ort_training
        python, worker = ort_training, "step_graph_ort_training.py"
    command = [python, str(Path(__file__).with_name(worker)), way, case, str(batch), str(STEPS[batch])]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way}, {case}, batch {batch} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of all rows."""
    lines = []
    for row in sorted(result["rows"], key=lambda row: (list(CASES).index(row["case"]), row["batch"])):
        eager = summary(row["ways"]["torch eager"])
        for way, runs in row["ways"].items():
            own = summary(runs)
            lines.append(
                (
                    CASES[row["case"]].what,
                    str(row["batch"]),
                    way,
                    f"{own['ms']:.0f}",
                    f"{own['ms'] / eager['ms']:.2f}",
                    f"{own['peak_mib']:.0f}",
                    f"{own['less_import_mib']:.0f}",
                    f"{own['less_import_mib'] / eager['less_import_mib']:.2f}",
                    f"{own['start_s']:.1f}",
                )
            )
    return markdown_table(COLUMNS, "lrlrrrrrr", lines)


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the medians of a way over its processes."""
    samples = np.concatenate([run["samples_ms"] for run in runs])
    keys = ("peak_mib", "less_import_mib", "start_s")
    return {"ms": float(np.median(samples))} | {k: float(np.median([run[k] for run in runs])) for k in keys}


if __name__ == "__main__":
    main()
