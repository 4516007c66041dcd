"""The Markdown tables of `benchmarks/memory.py`."""

from statistics import median
from typing import Any

Row = dict[str, Any]


def to_markdown(result: Row) -> str:
    """Returns all tables of a result: peaks by model, predictions, time and gradient, the paper's scope."""
    models = list(dict.fromkeys(row["model"] for row in result["rows"]))
    parts = [f"### {model}\n\n{peak_table(result, model)}" for model in models]
    parts.append(f"### Predicted against measured\n\n{prediction_table(result)}")
    if result["times"]:
        parts.append(f"### Time of a step\n\n{time_table(result)}")
    if result["gradients"]:
        parts.append(f"### Error of the gradient\n\n{gradient_table(result)}")
    if result["paper_scope"]:
        parts.append(f"### The paper's scope\n\n{scope_table(result)}")
    return "\n\n".join(parts)


def peak_table(result: Row, model: str) -> str:
    """Returns the peaks of a model in MB and how often they go into dense's; predicted ones in italics."""
    rows = [row for row in result["rows"] if row["model"] == model]
    columns = sorted({(row["batch"], row["fraction"]) for row in rows if row["fraction"]}, key=_column)
    lines = [
        "| step | " + " | ".join(f"batch {batch}, f = {fraction}" for batch, fraction in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for rung in result["rungs"]:
        cells = []
        for batch, fraction in columns:
            row = _find(rows, batch=batch, fraction=fraction if rung["factored"] else None, rung=rung["name"])
            dense = _find(rows, batch=batch, fraction=None, rung="dense")
            cells.append(_peak_cell(row, dense))
        if any(cell != "" for cell in cells):
            lines.append(f"| **{rung['name']}**: {rung['what']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _peak_cell(row: Row | None, dense: Row | None) -> str:
    if row is None or dense is None:
        return ""
    kind = "measured_mb" if "measured_mb" in row and "measured_mb" in dense else "predicted_mb"
    cell = f"{row[kind]:.0f} ({dense[kind] / row[kind]:.1f}×)"
    return cell if kind == "measured_mb" else f"*{cell}*"


def prediction_table(result: Row) -> str:
    """Returns predicted, accounted and measured peaks of what was measured."""
    lines = [
        "| model, batch, f | step | torch's own account | predicted | measured | predicted / measured |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        if "measured_mb" in row:
            lines.append(
                f"| {row['model']}, {row['batch']}, {row['fraction'] or 'dense'} | {row['rung']} "
                f"| {row['accounted_mb']:.0f} | {row['predicted_mb']:.0f} | {row['measured_mb']:.0f} "
                f"| {row['predicted_mb'] / row['measured_mb']:.3f} |"
            )
    return "\n".join(lines)


def time_table(result: Row) -> str:
    """Returns medians of wall and processor seconds of a step, over those of the dense step beside it."""
    lines = [
        "| model, batch, f, threads | step | wall s | over dense | processor s | over dense |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["times"]:
        key = {name: row[name] for name in ("model", "batch", "fraction", "threads")}
        dense = _find(result["times"], **key, rung="dense")
        assert dense is not None
        wall, cpu = median(row["wall_s"]), median(row["cpu_s"])
        lines.append(
            f"| {', '.join(str(value) for value in key.values())} | {row['rung']} | {wall:.1f} "
            f"| {wall / median(dense['wall_s']):.2f} | {cpu:.1f} | {cpu / median(dense['cpu_s']):.2f} |"
        )
    return "\n".join(lines)


def gradient_table(result: Row) -> str:
    """Returns the relative error of the gradient by rung."""
    lines = ["| step | ‖g − g₀‖ / ‖g₀‖ |", "| --- | --- |"]
    lines += [f"| {row['rung']} | {row['error']:.1e} |" for row in result["gradients"]]
    return "\n".join(lines)


def scope_table(result: Row) -> str:
    """Returns weights and saved inputs of the factored layers, dense and factored, in MB."""
    lines = [
        "| model, batch, f | dense: formula | dense: torch | factored, compressed: formula | torch | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['model']}, {row['batch']}, {row['fraction']} | {row['dense_formula_mb']:.1f} "
        f"| {row['dense_found_mb']:.1f} | {row['factored_formula_mb']:.1f} | {row['factored_found_mb']:.1f} "
        f"| {row['dense_found_mb'] / row['factored_found_mb']:.1f}× |"
        for row in result["paper_scope"]
    ]
    return "\n".join(lines)


def _find(rows: list[Row], **key: Any) -> Row | None:
    return next((row for row in rows if key.items() <= row.items()), None)


def _column(column: tuple[int, float]) -> tuple[int, float]:
    batch, fraction = column
    return batch, -fraction
