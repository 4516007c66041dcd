"""The bar chart of `docs/memory.md`.

python benchmarks/memory_plot.py benchmarks/results/memory.json docs/memory.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

from wasi_export._extras import require

plt = require("matplotlib.pyplot", extra="dev")

PARTS = ("parameters", "optimizer", "gradients", "inputs", "activations", "kernels")
FRACTION, BATCH = 0.4, 32
TOP_MB = 2300  # of the axis


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws what is in memory at the peak, by rung, for both models."""
    plt.rcParams["svg.hashsalt"] = "memory"  # the same file from the same figures
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure, axes = plt.subplots(
        1, len(models), figsize=(11, 5.5), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, model in zip(axes[0], models, strict=True):
        rows = {
            row["rung"]: row["parts"]
            for row in result["rows"]
            if (row["model"], row["batch"]) == (model, BATCH) and row["fraction"] in (None, FRACTION)
        }
        names = [rung["name"] for rung in result["rungs"] if rung["name"] in rows][::-1]
        left = [0.0] * len(names)
        for part in PARTS:
            widths = [rows[name][f"{part}_mb"] for name in names]
            axis.barh(names, widths, left=left, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axis.axvline(max(left) / 8, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"{model}, batch {BATCH}, f = {FRACTION}", xlabel="MB at the peak (predicted)")
        axis.set_xlim(0, TOP_MB)
    axes[0][-1].legend(title="dotted: an eighth of dense")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
