"""The plot of `docs/training.md`: accuracy over peak memory and over the time of a step."""

from pathlib import Path
from statistics import mean, median
from typing import Any

from training_cost import SHAPES
from training_rows import METHODS
from training_tables import costs_of, runs_of

from wasi_export._extras import require

plt = require("matplotlib.pyplot", extra="dev")

AXES = (
    ("peak memory of a step, MB (measured)", "peak_mb", max),
    ("wall time of a step, s", "wall_s", median),
)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the accuracy of each method, with its seeds, over what its steps take for the real model."""
    plt.rcParams["svg.hashsalt"] = "training"  # the same file from the same figures
    figure, axes = plt.subplots(1, len(AXES), figsize=(11, 4.5), sharey=True, layout="constrained")
    costs = {row["row"]: row for row in costs_of(result, SHAPES[0])}
    for axis, (label, key, reduce) in zip(axes, AXES, strict=True):
        for name in costs:
            accuracies = [
                100 * run["accuracy"] for run in runs_of(result["runs"], METHODS[name].trained_as or name)
            ]
            if not accuracies:
                continue
            x = reduce(costs[name][key])
            middle = mean(accuracies)
            reach = [[middle - min(accuracies)], [max(accuracies) - middle]]
            ours = name.startswith("ours")
            axis.errorbar(x, middle, yerr=reach, fmt="o" if ours else "s", color="C3" if ours else "C0")
            axis.annotate(name, (x, middle), xytext=(6, 4), textcoords="offset points", fontsize=8)
        axis.set(xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="test accuracy, %", title=f"{SHAPES[0].name}, batch 32")
    figure.savefig(path, metadata={"Date": None})
