"""Latency, size and error of exported models: dense and low-rank, fp32 and int8, beside torch and OpenVINO.

    python benchmarks/inference.py                          # all models that are not in the result; an hour
    python benchmarks/inference.py --models vit_small_patch16_224
    python benchmarks/inference.py --beside                 # other runtimes and operators, again
    python benchmarks/inference.py --brief                  # on another processor: f = 0.2 and 0.4 alone
    python benchmarks/inference.py --docs                   # tables into docs/inference.md, no run
    python benchmarks/inference.py --json                   # prints the result

Weights are random, which latency does not depend on. Every Linear of a block has the rank that the fraction f
gives it, as `subspace.fraction` does (multiples of 8); rows "in 16s" have them in multiples of 16. All graphs
of a model run in turns, batch 1, one thread, CPU time of the process; errors are against torch, of fp32 the
largest one over the scale of the output at batch 1, 2 and 7, of int8 the norm of the error over that of the
output.

Other runtimes: torch, torch.compile, OpenVINO where it is installed, and onnxruntime with its optimiser off.
Operators: wall time by onnxruntime's profiler.

The result is written after each model.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from inference_operators import operator_times
from inference_tables import to_brief_markdown, to_markdown
from kept import new_parser, new_result, read_result, to_json, write_result
from numpy.typing import NDArray
from pages import fill
from step_plans import CLASSES, make_plan
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wasi_export.artifact import Golden
from wasi_export.config import ModelConfig
from wasi_export.converters.check import check_factors
from wasi_export.converters.inference import export_inference, reference_outputs
from wasi_export.converters.quantize import to_int8
from wasi_export.manifest import InputSpec
from wasi_export.ranks import Plan
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.parity import measure_parity, relative_error, worst
from wasi_export.runtimes.session import Session
from wasi_export.subspace.inject import install_layers, subspace_layers
from wasi_export.training.models import create_model

RESULT, PAGE = Path("benchmarks/results/inference.json"), Path("docs/inference.md")
MARK, END = "<!-- benchmarks/inference.py -->\n", "<!-- end -->"
BRIEF = Path("benchmarks/results/inference_brief.json")
BRIEF_MARK, BRIEF_END = "<!-- benchmarks/inference.py: brief -->\n", "<!-- end of brief -->"
MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit3_small_patch16_224",
    "vit_base_patch32_224",
    "vit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
)
FRACTIONS, ALIGNED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9), (0.2, 0.4)
PEER_ROWS = ("dense", "f = 0.4")
"""Graphs that other runtimes run as well."""
SIZE, OPSET, ROUNDS, PEER_ROUNDS = 224, 23, 25, 15
SPEC = InputSpec(height=SIZE, width=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def main() -> None:
    """Measures what is missing."""
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--beside", action="store_true", help="other runtimes and operators, again")
    parser.add_argument("--brief", action="store_true", help="f = 0.2 and 0.4 alone, for another processor")
    parser.add_argument("--docs", action="store_true", help="tables into the page, no run")
    options = parser.parse_args()
    path, fractions = (BRIEF, ALIGNED) if options.brief else (RESULT, FRACTIONS)
    result = read_result(path, new_result(__doc__, models=[]))
    known = {measured["model"]: measured for measured in result["models"]}
    if not (options.docs or options.json):
        for name in options.models:
            new = name not in known
            if new:
                known[name] = {"model": name, "rows": measure_graphs(name, fractions)}
                result["models"].append(known[name])
            if not options.brief and (new or options.beside):
                known[name] |= measure_beside(name)
            write_result(path, result)
    if options.docs:
        fill(PAGE, MARK, END, to_markdown(read_result(RESULT)))
        fill(PAGE, BRIEF_MARK, BRIEF_END, to_brief_markdown([read_result(RESULT), read_result(BRIEF)]))
    if options.json:
        print(to_json(result))


def measure_graphs(name: str, fractions: Sequence[float]) -> list[dict[str, Any]]:
    """Returns the rows of a model."""
    with tempfile.TemporaryDirectory() as folder:
        rows = write_graphs(name, Path(folder), fractions)
        files = [(row["row"], row.pop("path")) for row in rows]
        for row, latency in zip(rows, measure_latency(files, rounds=ROUNDS), strict=True):
            row |= latency.model_dump(include={"p50_ms", "load_ms", "peak_rss_mb"})
            row["samples_ms"] = [round(sample, 3) for sample in latency.samples_ms]
    return rows


def write_graphs(name: str, folder: Path, fractions: Sequence[float]) -> list[dict[str, Any]]:
    """Writes the graphs of a model, dense first; returns what does not depend on the others."""
    dense = make_model(name, None)
    rows = [describe("dense", folder, dense, None), describe_torch_export(dense, folder)]
    rows.append(describe("dense, int8", folder, dense, None))
    dense_macs = rows[0]["macs"]
    for fraction in fractions:
        for aligned in (False, True) if fraction in ALIGNED else (False,):
            plan = plan_of(name, fraction, aligned=aligned)
            model = make_model(name, plan)
            row = f"f = {fraction:g}{' in 16s' if aligned else ''}"
            rows.append(describe(row, folder, model, plan))
            rows.append(describe(f"{row}, int8", folder, model, plan))
    for row in rows:
        row["mac_ratio"] = [now / before for now, before in zip(row["macs"], dense_macs, strict=True)]
    return rows


def plan_of(name: str, fraction: float, *, aligned: bool) -> Plan:
    """Returns the ranks of a fraction; aligned: multiples of 16 from 32 on."""
    plan = make_plan(name, fraction, mode="none", size=SIZE)
    if not aligned:
        return plan
    layers = (
        layer if layer.rank is None else layer.model_copy(update={"rank": max(32, layer.rank // 16 * 16)})
        for layer in plan.layers
    )
    return plan.model_copy(update={"layers": tuple(layers)})


def make_model(name: str, plan: Plan | None) -> nn.Module:
    """Returns a model with random weights, of the ranks of a plan."""
    torch.manual_seed(0)
    model = create_model(ModelConfig(name=name, img_size=SIZE), CLASSES)
    if plan is not None:
        install_layers(model, plan)
        for _, layer in subspace_layers(model):
            layer.reset_parameters()
    return model.eval()


def describe(row: str, folder: Path, model: nn.Module, plan: Plan | None) -> dict[str, Any]:
    """Writes a graph of our export; returns the facts and the error of it."""
    graph = export_inference(model, SPEC, opset=OPSET)
    check_factors(graph, plan or Plan(activation_mode="none", layers=()))
    quantized = row.endswith("int8")
    path = save(to_int8(graph) if quantized else graph, folder, row)
    golden = make_golden(model)
    error = relative_error(path, golden) if quantized else worst(measure_parity(path, golden)).max_error
    return {"row": row, "path": path, "error": error, **facts(path), "macs": count_macs(model)}


def describe_torch_export(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Writes the graph that torch's own exporter gives of the dense model, as its defaults are."""
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, SIZE, SIZE),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        input_names=[SPEC.name],
        verbose=False,
    )
    assert program is not None
    path = save(program.model_proto, folder, "dense, torch.onnx")
    error = worst(measure_parity(path, make_golden(model))).max_error
    return {
        "row": "dense, torch.onnx",
        "path": path,
        "error": error,
        **facts(path),
        "macs": count_macs(model),
    }


def save(graph: onnx.ModelProto, folder: Path, row: str) -> Path:
    """Writes a graph; returns its path."""
    path = folder / f"{row}.onnx"
    path.write_bytes(graph.SerializeToString())
    return path


def facts(path: Path) -> dict[str, Any]:
    """Returns the size of a file and its number of nodes."""
    return {"mb": path.stat().st_size / 1e6, "nodes": len(onnx.load(path).graph.node)}


def make_golden(model: nn.Module) -> Golden:
    """Returns random images and what torch gives for them."""
    images = np.random.default_rng(0).standard_normal((7, 3, SIZE, SIZE), np.float32)
    return Golden(images, reference_outputs(model, images), np.zeros(7, np.int64))


def count_macs(model: nn.Module) -> tuple[int, int]:
    """Returns the multiply-adds of an image without the products of attention, and with them."""
    # The counter does not know the one operator for attention that torch has on some processors.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, SIZE, SIZE))
    counts = {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(macs for op, macs in counts.items() if "attention" in op or "bmm" in op)
    total = sum(counts.values())
    return total - products, total


def measure_beside(name: str) -> dict[str, Any]:
    """Returns CPU ms of other runtimes beside ours, in turns, and of our graphs the ms of their operators.

    Runtimes that are not installed are left out.
    """
    image = np.random.default_rng(0).standard_normal((1, 3, SIZE, SIZE), np.float32)
    runs: dict[str, Callable[[], object]] = {}
    operators = {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for row, fraction in (("dense", None), ("f = 0.4", 0.4), ("f = 0.2", 0.2)):
            model = make_model(name, None if fraction is None else plan_of(name, fraction, aligned=False))
            path = save(export_inference(model, SPEC, opset=OPSET), Path(folder), row)
            operators[row] = operator_times(path, image)
            if row not in PEER_ROWS:
                continue
            runs[f"{row}, onnxruntime"] = _bound(Session.open(path).run, image)
            plain = Session.open(path, optimise=False)
            runs[f"{row}, onnxruntime without its optimiser"] = _bound(plain.run, image)
            runs[f"{row}, torch eager"] = _bound(torch.inference_mode()(model), torch.from_numpy(image))
            runs[f"{row}, torch.compile"] = _bound(_compiled(model), torch.from_numpy(image))
            if (other := _openvino(path)) is not None:
                runs[f"{row}, OpenVINO"] = _bound(other, image)
    samples = run_in_turns(list(runs.values()), PEER_ROUNDS)
    peers = [
        {"row": row, "p50_ms": float(np.median(column)), "samples_ms": np.round(column, 3).tolist()}
        for row, column in zip(runs, samples.T, strict=True)
    ]
    return {"peers": peers, "operators": operators}


def _bound(function: Callable[[Any], object], argument: object) -> Callable[[], object]:
    return lambda: function(argument)


def _compiled(model: nn.Module) -> Callable[[Any], object]:
    compiled = torch.compile(model)

    def run(image: torch.Tensor) -> object:
        with torch.inference_mode():
            return compiled(image)

    return run


def _openvino(path: Path) -> Callable[[Any], object] | None:
    try:
        import openvino
    except ImportError:
        return None
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(str(path), "CPU", settings)


def run_in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> NDArray[np.float64]:
    """Returns CPU ms [rounds, runs], after two rounds that are not counted."""
    samples = np.empty((rounds, len(runs)))
    for round_ in range(-2, rounds):
        for index, run in enumerate(runs):
            start = time.process_time_ns()
            run()
            if round_ >= 0:
                samples[round_, index] = (time.process_time_ns() - start) / 1e6
    return samples


if __name__ == "__main__":
    main()
