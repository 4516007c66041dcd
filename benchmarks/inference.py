"""Latency and size of the exported model against its dense twin, for several fractions of the parameters.

    python benchmarks/inference.py --json benchmarks/results/inference.json

Both go through the same export. Weights are random, which latency does not depend on: the figures are those
of any trained model with these ranks. The dense graph as torch writes it is measured beside them, because a
ratio to it alone would credit the factors with what the export gives the dense model too.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx
import timm
import torch
from torch import nn

from wasi_export.artifact import InputSpec
from wasi_export.config import Config, SubspaceConfig
from wasi_export.converters.check import check_factors, graph_facts
from wasi_export.converters.inference import export_inference
from wasi_export.ranks import Plan
from wasi_export.report import Latency
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.host import describe_host
from wasi_export.subspace.inject import factorize_model
from wasi_export.training.models import create_model, input_spec


def main() -> None:
    """Exports, measures and prints; writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224", help="timm model name")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--opset", type=int, default=23)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, with samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = export_all(options.model, options.fractions, options.opset, Path(folder))
        latencies = measure_latency(
            [(path.stem, path) for path in files],
            batch=options.batch,
            threads=options.threads,
            rounds=options.rounds,
        )
        rows = [describe(path, latency) for path, latency in zip(files, latencies, strict=True)]
    host = describe_host()
    print(f"{options.model}, batch {options.batch}, {options.threads} thread(s), {host.processor}")
    for row, latency in zip(rows, latencies, strict=True):
        quartiles = f"{latency.ratio_low:.3f} to {latency.ratio_high:.3f}"
        print(
            f"{latency.model:12} p50 {latency.p50_ms:7.2f} ms  p99 {latency.p99_ms:7.2f} ms  "
            f"ratio {latency.ratio_to_first:.3f} ({quartiles})  {row['size_mb']:6.1f} MB  "
            f"{row['nodes']} nodes"
        )
    if options.json:
        document = {
            "command": " ".join(["python", *sys.argv]),
            "model": options.model,
            "opset": options.opset,
            "host": host.model_dump(),
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def export_all(name: str, fractions: Sequence[float], opset: int, folder: Path) -> list[Path]:
    """Writes dense.onnx, dense-torch.onnx and one file a fraction; returns their paths, dense first."""
    config = Config.from_mapping({"model": {"name": name}})
    torch.manual_seed(0)
    dense = create_model(config.model, timm.get_pretrained_cfg(name).num_classes or 1000)
    spec = input_spec(dense, config)
    files = [
        export_checked(dense, spec, Plan(activation_mode="none", layers=()), opset, folder / "dense.onnx")
    ]
    files.append(export_as_torch_does(dense, spec, opset, folder / "dense-torch.onnx"))
    for fraction in fractions:
        model = create_model(config.model, timm.get_pretrained_cfg(name).num_classes or 1000)
        plan = factorize_model(
            model, [], SubspaceConfig(method="plain", fraction=fraction, activation="none"), total=0
        )
        files.append(export_checked(model, spec, plan, opset, folder / f"f={fraction:g}.onnx"))
    return files


def export_checked(model: nn.Module, spec: InputSpec, plan: Plan, opset: int, path: Path) -> Path:
    """Writes the project's export of the model; returns the path."""
    graph = export_inference(model, spec, opset=opset)
    check_factors(graph, plan)
    path.write_bytes(graph.SerializeToString())
    return path


def export_as_torch_does(model: nn.Module, spec: InputSpec, opset: int, path: Path) -> Path:
    """Writes torch's own export of the model; returns the path."""
    images = torch.zeros(2, spec.channels, spec.height, spec.width)
    batch = {0: torch.export.Dim("batch")}
    program = torch.onnx.export(
        model.eval(),
        (images,),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=(batch,),
        external_data=False,
        input_names=[spec.name],
        verbose=False,
    )
    assert program is not None
    program.save(path, external_data=False)
    return path


def describe(path: Path, latency: Latency) -> dict[str, object]:
    """Returns a row of the result file."""
    facts = graph_facts(onnx.load(path))
    return {
        "size_mb": path.stat().st_size / 1e6,
        "nodes": sum(facts.nodes.values()),
        "operators": dict(facts.nodes),
        **latency.model_dump(),
    }


if __name__ == "__main__":
    main()
