"""Instructions of models on an emulated Raspberry Pi, twice, beside the time that they take on this machine.

    python benchmarks/instructions.py          # ten minutes on a core
    python benchmarks/instructions.py --docs   # the table into docs/targets.md, no run
    python benchmarks/instructions.py --json   # prints the result

Graphs are those of `inference.py`: random weights, every Linear of a block at the rank of f. Instructions are
of one run at batch 1 on one thread, after one; `again` is how far a second count is off, in another process.
Times are of this machine: batch 1, one thread, CPU time, all graphs of a model in turns. Ratios are to the
dense fp32 graph.

The result is written at the end.
"""

import tempfile
from pathlib import Path
from typing import Any

from inference import OPSET, SPEC, make_model, plan_of, save
from kept import new_parser, new_result, read_result, to_json, write_result
from pages import fill

from wasi_export.converters.inference import export_inference
from wasi_export.converters.quantize import to_int8
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.instructions import count_instructions
from wasi_export.runtimes.targets.arm64 import open_arm64
from wasi_export.views import markdown_table

RESULT, PAGE = Path("benchmarks/results/instructions.json"), Path("docs/targets.md")
MARK, END = "<!-- benchmarks/instructions.py -->\n", "<!-- end of instructions -->"
MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
FRACTIONS, ROUNDS, SECONDS = (None, 0.4, 0.2), 25, 1800


def main() -> None:
    """Counts and measures."""
    parser = new_parser(__doc__)
    parser.add_argument("--docs", action="store_true", help="the table into the page, no run")
    options = parser.parse_args()
    if not (options.docs or options.json):
        write_result(RESULT, new_result(__doc__, models={name: measure(name) for name in MODELS}))
    result = read_result(RESULT)
    if options.docs:
        fill(PAGE, MARK, END, to_markdown(result))
    if options.json:
        print(to_json(result))


def measure(name: str) -> list[dict[str, Any]]:
    """Returns the rows of a model."""
    with tempfile.TemporaryDirectory() as folder:
        graphs = []
        for fraction in FRACTIONS:
            plan = None if fraction is None else plan_of(name, fraction, aligned=False)
            graph = export_inference(make_model(name, plan), SPEC, opset=OPSET)
            row = "dense" if fraction is None else f"f = {fraction:g}"
            graphs.append((row, save(graph, Path(folder), row)))
            graphs.append((f"{row}, int8", save(to_int8(graph), Path(folder), f"{row}, int8")))
        latency = measure_latency(graphs, rounds=ROUNDS)
        with open_arm64("pi5") as pi5, open_arm64("pi4") as pi4:
            first, second = (count_instructions(pi5, graphs, seconds=SECONDS) for _ in range(2))
            older = count_instructions(pi4, graphs, seconds=SECONDS)
    return [
        {
            "pi5": one.model_dump(),
            "again": abs(again.total / one.total - 1),
            "pi4": old.model_dump(),
            "time": time.model_dump(exclude={"samples_ms"}),
        }
        for one, again, old, time in zip(first, second, older, latency, strict=True)
    ]


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of all models."""
    columns = (
        *("model", "graph", "Pi 5, instructions", "ratio", "dot product", "again"),
        *("Pi 4, ratio", "time here, ratio", "Pi 5, one core: estimate"),
    )
    rows = []
    for model, measured in result["models"].items():
        for row in measured:
            pi5, low_high = row["pi5"], row["pi5"]["estimate_ms"]
            rows.append(
                (
                    model.removesuffix("_patch16_224"),
                    pi5["model"],
                    f"{pi5['total'] / 1e6:.0f} M",
                    f"{pi5['ratio_to_first']:.3f}",
                    f"{pi5['dot'] / 1e6:.0f} M",
                    f"{row['again']:.2%}",
                    f"{row['pi4']['ratio_to_first']:.3f}",
                    f"{row['time']['ratio_to_first']:.3f}",
                    f"{low_high[0]:.0f}–{low_high[1]:.0f} ms",
                )
            )
    return markdown_table(columns, "llrrrrrrr", rows)


if __name__ == "__main__":
    main()
