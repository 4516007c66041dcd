"""The board of `benchmarks/board_story.py`: a process without torch and onnx that learns a new class."""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from step_graph_memory import memory_mib

from wasi_export.array_images import FASHION_MNIST_CLASSES
from wasi_export.datasets import load_splits
from wasi_export.image_set import ImageSet
from wasi_export.runtimes.adapt import AdaptEpoch, AdaptImages, AdaptOptions, adapt
from wasi_export.runtimes.adapter import Adapter

NEW_CLASS = "Bag"
NEW, JUDGED, EPOCHS = 50, 2000, 10
FIRST_UNSEEN = 20_000  # of the training images, of which the model was trained on the first


def main() -> None:
    """Prints what was measured, as JSON."""
    adapter, old_of_each, share = Adapter.open(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    train, test = load_splits("fashion-mnist")
    classes = adapter.bundle.manifest.classes
    order = [classes.index(name.replace("/", " or ")) for name in FASHION_MNIST_CLASSES]
    train, test = (with_labels(images, classes, order) for images in (train, test))
    new_class = classes.index(NEW_CLASS)
    unseen = np.arange(FIRST_UNSEEN, len(train))
    chosen = {
        label: unseen[train.labels[unseen] == label][: NEW if label == new_class else old_of_each]
        for label in range(len(classes))
    }
    new = train.take(chosen.pop(new_class))
    old = train.take(np.concatenate(list(chosen.values()))) if old_of_each else None
    judged = test.take(np.arange(JUDGED))
    epochs = []

    def judge(line: AdaptEpoch) -> None:
        right = predict(adapter, judged) == judged.labels
        is_new = judged.labels == new_class
        shares = {"new": float(right[is_new].mean()), "old": float(right[~is_new].mean())}
        epochs.append({"steps": line.steps, "seconds": line.seconds, "loss": line.train_loss, **shares})

    known = adapter.settings
    options = AdaptOptions(
        epochs=EPOCHS,
        batch_size=8,
        lr=known.lr,
        sched="cosine",
        warmup_steps=known.warmup_steps,
        replay_share=share,
    )
    with tempfile.TemporaryDirectory() as state:
        adapt(adapter, AdaptImages(new, old), options, Path(state), on_epoch=judge)
    assert not {"torch", "onnx"} & sys.modules.keys()
    print(json.dumps({"epochs": epochs, "peak_mb": memory_mib("VmHWM") * 2**20 / 1e6}))


def with_labels(images: ImageSet, classes: tuple[str, ...], order: list[int]) -> ImageSet:
    """Returns the images with labels in the order of the model's classes."""
    return ImageSet(classes, np.array(order)[images.labels], images.read, images.fingerprint)


def predict(adapter: Adapter, images: ImageSet) -> np.ndarray:
    """Returns the class of each image."""
    parts = range(0, len(images), 50)
    return np.concatenate([adapter.predict([images[i][0] for i in range(s, s + 50)]) for s in parts])


if __name__ == "__main__":
    main()
