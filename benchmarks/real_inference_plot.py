"""The plot of `benchmarks/real_inference.py`: accuracy over latency, fp32 and int8."""

from pathlib import Path
from typing import Any

from wasi_export._extras import require

mpl, figures = (require(name, extra="dev") for name in ("matplotlib", "matplotlib.figure"))


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws a line for each form, from the smallest f to dense."""
    with mpl.rc_context({"svg.hashsalt": "wasi-export", "font.size": 9}):
        figure = figures.Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for form, marker in (("fp32", "o"), ("int8", "s")):
            rows = sorted((row for row in result["rows"] if row["form"] == form), key=lambda row: row["f"])
            points = [(row["p50_ms"], 100 * row["accuracy"]) for row in rows]
            axes.plot(*zip(*points, strict=True), marker=marker, label=form)
            for row, point in zip(rows, points, strict=True):
                label = "dense" if row["f"] == 1 else f"{row['f']:g}"
                axes.annotate(label, point, textcoords="offset points", xytext=(5, -11))
        axes.set_xlabel("latency in ms (median, batch 1, one thread)")
        axes.set_ylabel("accuracy in %")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, metadata={"Date": None})
