"""The plot of `docs/adapt.md`: right answers of the new and of the old classes, epoch by epoch."""

from pathlib import Path
from typing import Any

from wasi_export._extras import require

plt = require("matplotlib.pyplot", extra="dev")


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws a panel for each run."""
    plt.rcParams["svg.hashsalt"] = "adapt"  # the same file from the same figures
    runs = result["runs"]
    figure, axes = plt.subplots(1, len(runs), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, run in zip(axes, runs, strict=True):
        epochs = range(len(run["epochs"]))
        for key, what, colour in (("new", "new class", "C3"), ("old", "nine old classes", "C0")):
            shares = [100 * epoch[key] for epoch in run["epochs"]]
            axis.plot(epochs, shares, "o-", color=colour, label=what)
        axis.set(title=run["run"], xlabel="epochs on the board", ylim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="test images right, %")
    axes[0].legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
