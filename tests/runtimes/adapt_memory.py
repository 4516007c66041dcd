"""What test_adapt.py runs: memory of a process that trains, after 200 steps and after 2,000.

    python adapt_memory.py BUNDLE STATE [leak]

prints the growth of the resident set in between, in bytes. With `leak` the process keeps a copy of the state
of each step, 816 bytes in six arrays: what the test is to find.
"""

import sys
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from wasi_export.image_set import ImageSet
from wasi_export.runtimes.adapt import AdaptImages, AdaptOptions, adapt
from wasi_export.runtimes.adapter import Adapter

FIRST, LAST = 200, 2000


def main():
    adapter, folder, leak = Adapter.open(sys.argv[1]), Path(sys.argv[2]), "leak" in sys.argv
    classes = adapter.bundle.manifest.classes
    pictures = [Image.new("RGB", (6, 6), (9 * i,) * 3) for i in range(20)]
    images = ImageSet(classes, np.arange(800) % 2, lambda i: pictures[i % 20], "greys")
    resident, kept = [], []

    def track(items, label, total):
        for item in items:
            resident.append(psutil.Process().memory_info().rss)
            if leak:
                kept.append(adapter.session.tensors())
            yield item

    options = AdaptOptions(
        epochs=LAST // 400 + 1, batch_size=2, lr=0.01, sched="constant", warmup_steps=0, commit_every=100
    )
    adapt(adapter, AdaptImages(images), options, folder, track=track)
    sys.stdout.write(str(resident[LAST] - resident[FIRST]))


if __name__ == "__main__":
    main()
