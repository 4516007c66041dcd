"""Every transformer of timm, exported with random weights and run against torch: what works, what does not.

    python benchmarks/timm_models.py              # all that are not in the result yet; hours
    python benchmarks/timm_models.py --only vision_transformer deit
    python benchmarks/timm_models.py --docs       # the table into docs/models.md, no run
    python benchmarks/timm_models.py --json       # prints the result

A transformer is a VisionTransformer, or has a module that is named after attention. All parameters are
random, also those that start as zero, so that each shows in the output. A large model is tried with fewer
blocks, which are all alike, and on smaller images: `tried` says so. Outputs of batches of 1, 2 and 7 images
are compared, with the runtime's optimiser and without; the error is the largest one over the scale of the
output.

The result is written after each model.
"""

import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import timm
import torch
from kept import new_parser, new_result, read_result, to_json, write_result
from timm.models.vision_transformer import VisionTransformer
from timm_smaller import make_model, sketch
from torch import nn

from wasi_export.converters.graph_builder import UncoveredModuleError
from wasi_export.converters.inference import export_inference
from wasi_export.converters.vit import write_vit
from wasi_export.durable import write_bytes
from wasi_export.errors import WasiExportError
from wasi_export.manifest import InputSpec
from wasi_export.views import markdown_table

RESULT, PAGE = Path("benchmarks/results/timm_models.json"), Path("docs/models.md")
OPSET, BATCHES, TOLERANCE = 23, (1, 2, 7), 1e-5
MARK = "<!-- benchmarks/timm_models.py -->\n"


def transformers(only: list[str] | None, known: set[str]) -> Iterator[tuple[str, str]]:
    """Yields name and source module of the transformers of timm, but for those that are known.

    The first of each source come first, then the second ones: a run that is cut short has tried each family.
    """
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        found.setdefault(timm.model_entrypoint(name).__module__.rsplit(".", 1)[-1], []).append(name)
    turns = zip_longest(*([(name, source) for name in names] for source, names in found.items()))
    for name, source in (pair for turn in turns for pair in turn if pair is not None):
        if name in known or (only and source not in only):
            continue
        if is_transformer(sketch(name)):
            yield name, source


def is_transformer(model: nn.Module) -> bool:
    """Returns whether a model has attention; some blocks of VisionTransformer have it without a module."""
    modules = (type(module).__name__.lower() for module in model.modules())
    return isinstance(model, VisionTransformer) or any("attention" in name for name in modules)


def try_model(name: str) -> dict[str, Any]:
    """Returns how the export of a model went."""
    row: dict[str, Any] = {"tried": ""}
    try:
        model, spec, row["tried"] = make_model(name)
        row["path"] = "direct" if is_written_directly(model, spec) else "traced"
        graph = export_inference(model, spec, opset=OPSET)
        row["nodes"] = len(graph.graph.node)
        row["error"] = largest_error(model, graph, spec)
        if row["error"] > TOLERANCE:
            row["reason"] = (
                f"torch's own fp32 is {own_error(model, spec):.1e} from its fp64 with these weights"
            )
    except WasiExportError as error:
        row["reason"] = " ".join(str(error).split())[:200]
    except Exception as error:  # of timm, torch or the runtime: the table is about whatever happens
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return row


def is_written_directly(model: nn.Module, spec: InputSpec) -> bool:
    """Returns whether the model is one of those that need no tracer."""
    try:
        write_vit(model, spec, opset=OPSET, output="logits")
    except UncoveredModuleError:
        return False
    return True


def largest_error(model: nn.Module, graph: onnx.ModelProto, spec: InputSpec) -> float:
    """Returns the largest error of the outputs of all batches, over the scale of the output."""
    content, errors = graph.SerializeToString(), []
    for level in (ort.GraphOptimizationLevel.ORT_ENABLE_ALL, ort.GraphOptimizationLevel.ORT_DISABLE_ALL):
        options = ort.SessionOptions()
        options.graph_optimization_level = level
        session = ort.InferenceSession(content, options)
        for batch in BATCHES:
            images = torch.randn(batch, spec.channels, spec.height, spec.width)
            with torch.no_grad():
                expected = model(images).numpy()
            (found,) = session.run(None, {spec.name: images.numpy()})
            errors.append(float(np.abs(found - expected).max() / np.abs(expected).max()))
    return max(errors)


def own_error(model: nn.Module, spec: InputSpec) -> float:
    """Returns how far torch's output in fp32 is from that in fp64, over its scale; the model becomes fp64."""
    images = torch.randn(2, spec.channels, spec.height, spec.width)
    with torch.no_grad():
        single, double = model(images), model.double()(images.double())
    return float((single - double).abs().max() / double.abs().max())


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of sources and that of all models."""
    rows = result["models"]
    sources = sorted({row["source"] for row in rows})
    summary = []
    for source in sources:
        own = [row for row in rows if row["source"] == source]
        good = [row for row in own if passes(row)]
        worst = max((row["error"] for row in good), default=None)
        direct = sum(row.get("path") == "direct" for row in own)
        summary.append(
            (source, str(len(own)), str(direct), str(len(good)), "–" if worst is None else f"{worst:.1e}")
        )
    head = ("source in timm", "models", "written directly", "passed", "largest error")
    columns = ("model", "how", "nodes", "error", "tried with, or why not")
    lines = [
        (
            row["model"],
            row.get("path", "–"),
            str(row.get("nodes", "–")),
            f"{row['error']:.1e}" if "error" in row else "–",
            "; ".join(filter(None, (row["tried"], row.get("reason", "") if not passes(row) else ""))),
        )
        for row in rows
    ]
    return "\n".join([markdown_table(head, "lrrrr", summary), "", markdown_table(columns, "llrrl", lines)])


def passes(row: dict[str, Any]) -> bool:
    """Returns whether a model's outputs are those of torch."""
    return "error" in row and row["error"] <= TOLERANCE


def main() -> None:
    """Tries what has not been tried."""
    parser = new_parser(__doc__)
    parser.add_argument("--only", nargs="+", metavar="SOURCE", help="modules of timm.models")
    parser.add_argument("--docs", action="store_true", help="the table into the page, no run")
    options = parser.parse_args()
    new = new_result(__doc__, timm=timm.__version__, torch=torch.__version__, models=[])
    result = read_result(RESULT, new)
    known = {row["model"] for row in result["models"]}
    if not (options.docs or options.json):
        for name, source in transformers(options.only, known):
            row = {"model": name, "source": source, **try_model(name)}
            print(json.dumps(row), flush=True)
            result["models"] = sorted([*result["models"], row], key=lambda r: (r["source"], r["model"]))
            write_result(RESULT, result)
    if options.docs:
        page = PAGE.read_text(encoding="utf-8")
        write_bytes(PAGE, (page[: page.index(MARK) + len(MARK)] + to_markdown(result) + "\n").encode())
    if options.json:
        print(to_json(result))


if __name__ == "__main__":
    main()
