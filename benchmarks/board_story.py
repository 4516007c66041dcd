"""A board learns a class that its model has never seen, and keeps the others: real weights, real images.

    python benchmarks/board_story.py                      # trains the model, exports it, runs what is missing
    python benchmarks/board_story.py --docs               # table and plot into docs/adapt.md, no run
    python benchmarks/board_story.py --json               # prints the result

The ViT-S/14 of docs/training.md (98 px) is fine-tuned with subspace layers at f = 0.4 on 3,200 images of
Fashion-MNIST without any bag: its head has ten classes, of which it has seen nine. Then a fresh process
without torch or onnx, one thread, gets 50 images of bags, some of which are mirrored or cropped, and learns
them in ten epochs, AdamW, batches of 8. To replay it has images of the nine classes: none; ten of each, as
many in an epoch as new ones; or 30 of each, four times as many. It is judged on the first 2,000 test images
after every epoch: right answers among the bags, and among the rest. Seconds are wall time of the steps, peak
memory is of the process, in MB.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from backbone import MODEL, write_checkpoint
from board_story_plot import plot
from board_story_worker import NEW_CLASS
from kept import new_parser, new_result, read_result, to_json, write_result
from pages import fill
from training_rows import METHODS, config_of

from wasi_export.array_images import FASHION_MNIST_CLASSES
from wasi_export.cli._bundle import export_run
from wasi_export.cli._console import track
from wasi_export.config import Config
from wasi_export.datasets import load_splits
from wasi_export.training.stage import train_run
from wasi_export.views import markdown_table

RESULT, PAGE, PLOT = (
    Path("benchmarks/results/board_story.json"),
    Path("docs/adapt.md"),
    Path("docs/adapt.svg"),
)
MARK, END = "<!-- benchmarks/board_story.py -->\n", "<!-- end of benchmarks/board_story.py -->"
RUNS = {
    "factors, replay": ("factors", 10, 0.5),
    "factors, no replay": ("factors", 0, 0.0),
    "head, replay": ("head", 10, 0.5),
    "factors, more replay": ("factors", 30, 0.8),
}
TRAIN_IMAGES = 3200
COLUMNS = ("trained", "new class right", "old classes right", "before", "s a step", "s in all", "peak MB")


def main() -> None:
    """Runs what is missing."""
    parser = new_parser(__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/board"), help="folder of images and runs")
    parser.add_argument("--docs", action="store_true", help="table and plot into the page, no run")
    options = parser.parse_args()
    result = read_result(RESULT, new_result(__doc__, runs=[]))
    if not (options.docs or options.json):
        measure(result, options.work)
    if options.docs:
        fill(PAGE, MARK, END, to_markdown(result))
        plot(result, PLOT)
    if options.json:
        print(to_json(result))


def measure(result: dict[str, Any], work: Path) -> None:
    """Adds the runs that are missing."""
    known = {run["run"] for run in result["runs"]}
    for name, (trainable, old_of_each, share) in RUNS.items():
        if name in known:
            continue
        bundle = make_bundle(trainable, work)
        worker = str(Path(__file__).with_name("board_story_worker.py"))
        command = [sys.executable, worker, str(bundle), str(old_of_each), str(share)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result["runs"].append({"run": name, **json.loads(done.stdout)})
        write_result(RESULT, result)


def make_bundle(trainable: str, work: Path) -> Path:
    """Returns a bundle of the model that has not seen the class."""
    bundle = work / f"bundle-{trainable}"
    if not bundle.exists():
        checkpoint, photos = work / "backbone.safetensors", work / "photos"
        write_checkpoint(checkpoint)
        write_photos(photos)
        row = config_of(METHODS["ours-0.4"], checkpoint, model=MODEL, seed=0).model_dump()
        row["data"] |= {"source": str(photos), "train_images": None, "val_images": None}
        row["adapt"] |= {"lr": 3e-5, "head_lr": 1e-3, "weight_decay": 0.0}
        config = Config.from_mapping(row)
        train_run(config, "subspace", work / "run", replace=True, track=track)
        overrides = ["export.train_graph=true", f"adapt.trainable={trainable}"]
        export_run(work / "run", bundle, overrides=overrides, track=track)
    return bundle


def write_photos(folder: Path) -> None:
    """Writes the images as class folders; that of the class to be learnt later is empty."""
    if folder.exists():
        return
    train, test = load_splits("fashion-mnist")
    new = FASHION_MNIST_CLASSES.index(NEW_CLASS)
    for split, images, count in (("train", train, TRAIN_IMAGES), ("val", test, 200)):
        names = [name.replace("/", " or ") for name in images.classes]
        for name in names:
            (folder / split / name).mkdir(parents=True)
        kept = [index for index in range(len(images)) if images.labels[index] != new][:count]
        for index in kept:
            image, label = images[index]
            image.save(folder / split / names[label] / f"{index}.png")


def to_markdown(result: dict[str, Any]) -> str:
    """Returns the table of all runs."""
    lines = []
    for run in result["runs"]:
        first, last = run["epochs"][0], run["epochs"][-1]
        lines.append(
            (
                run["run"],
                f"{last['new']:.1%}",
                f"{last['old']:.1%}",
                f"{first['new']:.1%}, {first['old']:.1%}",
                f"{last['seconds'] / last['steps']:.2f}",
                f"{last['seconds']:.0f}",
                f"{run['peak_mb']:.0f}",
            )
        )
    return markdown_table(COLUMNS, "lrrrrrr", lines)


if __name__ == "__main__":
    main()
