"""Tables of `benchmarks/inference.py` for docs/inference.md."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from wasi_export.views import markdown_table

COLUMNS = (
    "graph", "p50 ms", "p10 ms", "over dense", "over torch.onnx", "MACs left", "with attention", "MB",
    "nodes", "load ms", "peak RSS MB", "error",
)  # fmt: skip

BRIEF_COLUMNS = (
    "model", "processor", "dense over torch.onnx", "f = 0.4", "in 16s", "f = 0.2", "in 16s", "dense, int8",
    "f = 0.2, int8", "over dense int8",
)  # fmt: skip

SHOWN = 0.01
"""Share of a graph's time from which on a kind of operator has a line."""


def to_markdown(result: dict[str, Any]) -> str:
    """Returns a table for each model, and one of other runtimes."""
    blocks = []
    for measured in result["models"]:
        blocks.append(f"### {measured['model']}")
        dense, exported = (np.array(measured["rows"][index]["samples_ms"]) for index in (0, 1))
        rows = [_row(row, dense, exported) for row in measured["rows"]]
        blocks.append(markdown_table(COLUMNS, "lrrrrrrrrrrr", rows))
        peers = measured["peers"]
        ours = {peer["row"].rsplit(", ", 1)[0]: np.array(peer["samples_ms"]) for peer in peers[::-1]
                if peer["row"].endswith("onnxruntime")}  # fmt: skip
        lines = [
            (
                peer["row"],
                f"{peer['p50_ms']:.1f}",
                f"{np.median(np.array(peer['samples_ms']) / ours[peer['row'].rsplit(', ', 1)[0]]):.2f}",
            )
            for peer in peers
        ]
        blocks.append(markdown_table(("runtime", "p50 ms", "time over onnxruntime"), "lrr", lines))
        blocks.append(operators_table(measured["operators"]))
    return "\n\n".join(blocks)


def to_brief_markdown(results: Sequence[dict[str, Any]]) -> str:
    """Returns how much faster graphs are than the dense one, with a line for each model and processor."""
    lines = []
    for name in (measured["model"] for measured in results[-1]["models"]):
        for result in results:
            rows = next(measured["rows"] for measured in result["models"] if measured["model"] == name)
            ms = {row["row"]: np.array(row["samples_ms"]) for row in rows}
            pairs = [
                ("dense, torch.onnx", "dense"),
                *(("dense", row) for row in ("f = 0.4", "f = 0.4 in 16s", "f = 0.2", "f = 0.2 in 16s")),
                ("dense", "dense, int8"),
                ("dense", "f = 0.2, int8"),
                ("dense, int8", "f = 0.2, int8"),
            ]
            faster = (f"{np.median(ms[slow] / ms[fast]):.2f}×" for slow, fast in pairs)
            lines.append((name, processor_of(result), *faster))
    return markdown_table(BRIEF_COLUMNS, "llrrrrrrrr", lines)


def processor_of(result: dict[str, Any]) -> str:
    """Returns the short name of the processor that a result is from."""
    processor: str = result["host"]["processor"]
    return processor.removesuffix(" Processor").replace("(R)", "")


def operators_table(operators: dict[str, dict[str, float]]) -> str:
    """Returns the ms of each kind of operator that takes a hundredth of a graph, and of the rest."""
    totals = {graph: sum(times.values()) for graph, times in operators.items()}
    shown = {kind for graph, times in operators.items() for kind, ms in times.items()
             if ms > SHOWN * totals[graph]}  # fmt: skip
    dense = next(iter(operators.values()))
    kinds = sorted(shown, key=lambda kind: -dense.get(kind, 0))
    lines = [(kind, *(f"{times.get(kind, 0):.2f}" for times in operators.values())) for kind in kinds]
    rest = (sum(ms for kind, ms in times.items() if kind not in shown) for times in operators.values())
    lines += [("others", *(f"{ms:.2f}" for ms in rest))]
    lines += [("all", *(f"{total:.2f}" for total in totals.values()))]
    header = ("operator", *(f"{graph}, ms" for graph in operators))
    return markdown_table(header, "l" + "r" * len(operators), lines)


def _row(row: dict[str, Any], dense: Any, exported: Any) -> tuple[str, ...]:
    samples = np.array(row["samples_ms"])
    return (
        row["row"],
        f"{row['p50_ms']:.1f}",
        f"{np.percentile(samples, 10):.1f}",
        f"{np.median(dense / samples):.2f}×",
        f"{np.median(exported / samples):.2f}×",
        *(f"{ratio:.2f}" for ratio in row["mac_ratio"]),
        f"{row['mb']:.1f}",
        str(row["nodes"]),
        f"{row['load_ms']:.0f}",
        f"{row['peak_rss_mb']:.0f}",
        f"{row['error']:.1e}",
    )
