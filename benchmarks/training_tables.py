"""The Markdown tables of `benchmarks/training.py`."""

from collections.abc import Iterator
from statistics import mean, median, stdev
from typing import Any

from training_cost import SHAPES, Shape
from training_rows import FRACTIONS, LEVERS, METHODS, PARTS

from wasi_export.views import markdown_table

Found = dict[str, Any]


def tables(result: Found) -> dict[str, str]:
    """Returns the tables of a result by name; `cost N` is that of a shape."""
    found = {
        "summary": summary_table(result),
        "methods": methods_table(result["runs"]),
        "parts": parts_table(result["runs"], part_rows()),
        "levers": parts_table(result["runs"], lever_rows()),
    }
    for index, shape in enumerate(SHAPES):
        rows = costs_of(result, shape)
        found[f"cost {index}"] = cost_table(rows) if rows else "Not measured yet."
    return found


def summary_table(result: Found) -> str:
    """Returns accuracy and cost of the real model, a line for each method that has both."""
    header = ("method", "accuracy", "points below dense", "parameters", "peak MB of a step", "time of a step")
    costs = {row["row"]: row for row in costs_of(result, SHAPES[0])}
    return markdown_table(header, "lrrrrr", _summary_lines(result["runs"], costs))


def _summary_lines(runs: list[Found], costs: dict[str, Found]) -> Iterator[tuple[str, ...]]:
    for name, cost in costs.items():
        row = METHODS[name]
        same = runs_of(runs, row.trained_as or name)
        if same:
            yield (
                row.what,
                f"{mean(run['accuracy'] for run in same):.4f}",
                points_below_dense(runs, same),
                f"{same[0]['parameters'] / 1e6:.2f} M",
                f"{max(cost['peak_mb']):.0f}",
                f"{_ratio(cost, costs['dense'], 'wall_s'):.2f}",
            )


def _ratio(row: Found, dense: Found, key: str) -> float:
    """Returns the median over the rounds of the ratio to dense."""
    return median(one / other for one, other in zip(row[key], dense[key], strict=True))


def methods_table(runs: list[Found]) -> str:
    """Returns the accuracy of each method over the seeds."""
    header = ("row", "method", "seeds", "accuracy", "± (s.d.)", "points below dense", "parameters", "CPU s")
    return markdown_table(header, "llrrrrrr", _method_lines(runs))


def _method_lines(runs: list[Found]) -> Iterator[tuple[str, ...]]:
    for name, row in METHODS.items():
        same = runs_of(runs, row.trained_as or name)
        if same:
            accuracies = [run["accuracy"] for run in same]
            yield (
                name,
                row.what,
                str(len(same)),
                f"{mean(accuracies):.4f}",
                f"{stdev(accuracies):.4f}" if len(same) > 1 else "–",
                points_below_dense(runs, same),
                f"{same[0]['parameters'] / 1e6:.2f} M",
                "–" if row.trained_as else f"{mean(run['cpu_seconds'] for run in same):.0f}",
            )


def part_rows() -> list[tuple[str, str, str]]:
    """Returns name, description and f of the rows of the recipe's parts."""
    parts = [(f"{name}-{f:g}", what, f"{f:g}") for f in FRACTIONS for name, (what, _) in PARTS.items()]
    return [("dense", "dense", "1"), *parts]


def lever_rows() -> list[tuple[str, str, str]]:
    """Returns name, description and f of the rows of what the recipe does not have."""
    rows = [(name, row.what, f"{(row.subspace or {})['fraction']:g}") for name, row in LEVERS.items()]
    return [("ours-0.2", PARTS["ours"][0], "0.2"), *rows]


def parts_table(runs: list[Found], rows: list[tuple[str, str, str]]) -> str:
    """Returns accuracy and losses of rows that have been run."""
    header = ("recipe", "f", "seeds", "accuracy", "points below dense", "test loss", "training loss")
    return markdown_table(header, "lrrrrrr", _part_lines(runs, rows))


def _part_lines(runs: list[Found], rows: list[tuple[str, str, str]]) -> Iterator[tuple[str, ...]]:
    for name, what, fraction in rows:
        same = runs_of(runs, name)
        if same:
            yield (
                what,
                fraction,
                str(len(same)),
                f"{mean(run['accuracy'] for run in same):.4f}",
                points_below_dense(runs, same),
                f"{mean(run['loss'] for run in same):.4f}",
                f"{mean(run['train_loss'] for run in same):.4f}",
            )


def cost_table(rows: list[Found]) -> str:
    """Returns memory, time and MACs of each method at a shape, also over dense."""
    header = ("row", "peak MB", "wall s", "over dense", "CPU s", "over dense", "paper's scope MB", "GMACs")
    return markdown_table(header, "lrrrrrrr", (_cost_line(row, rows) for row in rows))


def _cost_line(row: Found, rows: list[Found]) -> tuple[str, ...]:
    dense = next(other for other in rows if other["row"] == "dense")
    peak = max(row["peak_mb"])
    cells = [row["row"], f"{peak:.0f} ({max(dense['peak_mb']) / peak:.1f}×)"]
    for clock in ("wall_s", "cpu_s"):
        ratios = [one / other for one, other in zip(row[clock], dense[clock], strict=True)]
        cells += [f"{median(row[clock]):.2f}", f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"]
    scope = max(row["scope_mb"])
    return (*cells, f"{scope:.0f} ({max(dense['scope_mb']) / scope:.1f}×)", f"{row['macs'] / 1e9:.0f}")


def costs_of(result: Found, shape: Shape) -> list[Found]:
    """Returns the rows of a shape that are measured whole."""
    return [row for row in result["costs"] if row["shape"] == shape.name and "wall_s" in row]


def runs_of(runs: list[Found], name: str) -> list[Found]:
    """Returns the runs of a row."""
    return [run for run in runs if run["row"] == name]


def points_below_dense(runs: list[Found], same: list[Found]) -> str:
    """Returns the mean difference to the dense run of the same seed, in points of accuracy."""
    dense = {run["seed"]: run["accuracy"] for run in runs_of(runs, "dense")}
    below = [100 * (dense[run["seed"]] - run["accuracy"]) for run in same if run["seed"] in dense]
    return f"{mean(below):.2f}" if below else "–"
