"""What a machine computes of a bundle, so that another one can see whether it computes the same.

Outputs of each graph for golden images, and the parameters after steps of training on them. How many images
and steps there are depends on the time that they may take; two machines are compared on what both have.

    fp32       of another processor differs by rounding alone: 1e-5 of the output scale
    int8       rounding decides which integer an activation becomes, so no two processors agree. The outputs
               of the graph for images that are changed by one part in a million tell how far such a rounding
               goes (its jitter); another machine may be as far again
    training   parameters after k steps: 1e-5 of their norm, or twice what images that are changed by one
               rounding make of them. A bias of the keys has no effect in a softmax, so its gradient is
               rounding alone, and AdamW makes steps of the full rate of it

    python -m wasi_export.runtimes.reproduce BUNDLE OUT.safetensors SECONDS STEPS

writes what this machine computes, and prints what machine it is.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from wasi_export.artifact import Bundle, Golden
from wasi_export.errors import WasiExportError
from wasi_export.report import Check
from wasi_export.runtimes.host import describe_host
from wasi_export.runtimes.session import Session
from wasi_export.runtimes.training_session import TrainingSession

BATCH = 2
TOLERANCE = 1e-5
JITTER, JITTER_RUNS, JITTER_FACTOR, ROUNDING = 1e-6, 4, 2.0, 1e-7
LOSSES, PARAMETER = "training/losses", "training/parameters/"

Tensors = Mapping[str, NDArray[np.float32]]


def compute(bundle: Bundle, *, seconds: float, steps: int) -> dict[str, NDArray[np.float32]]:
    """Returns the outputs of each graph by its file name, the losses, and the trained parameters.

    Args:
        bundle: what is computed of.
        seconds: after which no image and no step is begun any more, for each graph; one is always done.
        steps: of training, at most.

    Raises:
        IntegrityError: the golden data cannot be read.
        HostError: a graph needs a newer onnxruntime.
        ModelFailedError: a graph does not load or fails.
    """
    golden = bundle.golden()
    found = {
        path.name: outputs_of(path, golden.images, seconds=seconds)
        for path in (bundle.model_path, bundle.quantized_path)
        if path is not None
    }
    if bundle.manifest.training is not None and steps:
        found |= trained(bundle, golden, seconds=seconds, steps=steps)
    return found


def outputs_of(path: Path, images: NDArray[np.float32], *, seconds: float) -> NDArray[np.float32]:
    """Returns the outputs [n, classes] of a graph for the first n images."""
    session, end = Session.open(path), time.monotonic() + seconds
    batches: list[NDArray[np.float32]] = []
    for start in range(0, len(images), BATCH):
        if batches and time.monotonic() > end:
            break
        batches.append(session.run(images[start : start + BATCH]))
    return np.concatenate(batches)


def trained(bundle: Bundle, golden: Golden, *, seconds: float, steps: int) -> dict[str, NDArray[np.float32]]:
    """Returns the losses of steps on golden images, and the parameters after them, by name."""
    session, end = TrainingSession.open(bundle), time.monotonic() + seconds
    settings, losses = session.facts.settings, list[float]()
    targets: NDArray[np.int64] | NDArray[np.float32] = golden.labels
    if settings.loss != "cross_entropy":
        targets = np.eye(golden.outputs.shape[1], dtype=np.float32)[golden.labels]
    for step in range(steps):
        if losses and time.monotonic() > end:
            break
        batch = (step * BATCH + np.arange(BATCH)) % len(golden.images)
        losses.append(
            session.step(
                golden.images[batch],
                targets[batch],
                lr=settings.lr,
                weight_decay=settings.weight_decay,
                clip_norm=settings.clip_grad or float("inf"),
            ).loss
        )
    tensors = session.tensors()
    parameters = {PARAMETER + name: tensors[name] for name in session.facts.parameters}
    return {LOSSES: np.array(losses, np.float32)} | parameters


def write(tensors: Tensors, path: Path) -> None:
    """Writes what was computed."""
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)


def compare(bundle: Bundle, theirs: Tensors, *, name: str) -> Iterator[Check]:
    """Yields the checks of what another machine computed, by what this one computes now.

    Args:
        bundle: what was computed of.
        theirs: results of `compute` on the other machine.
        name: of the other machine.
    """
    golden = bundle.golden()
    for path in filter(None, (bundle.model_path, bundle.quantized_path)):
        other = theirs[path.name]
        images = golden.images[: len(other)]
        own = outputs_of(path, images, seconds=float("inf"))
        if path == bundle.model_path:
            limit, basis = TOLERANCE, "rounding of fp32"
        else:
            limit = JITTER_FACTOR * max(jitter(path, images, own), TOLERANCE)
            basis = f"{JITTER_FACTOR:g} times its own jitter here"
        same = int((own.argmax(1) == other.argmax(1)).sum())
        yield _check(
            f"{path.name} as here",
            difference(own, other),
            limit,
            f"outputs of {len(other)} images on {name}, of the output scale; {basis}; "
            f"{same} of {len(other)} answers the same",
        )
    if LOSSES in theirs:
        yield _compare_training(bundle, golden, theirs, name)


def _compare_training(bundle: Bundle, golden: Golden, theirs: Tensors, name: str) -> Check:
    """Returns the check of the parameters that another machine ended with."""
    steps = len(theirs[LOSSES])
    own = trained(bundle, golden, seconds=float("inf"), steps=steps)
    moved = replace(golden, images=_jittered(golden.images, ROUNDING, np.random.default_rng(0)))
    jittered = trained(bundle, moved, seconds=float("inf"), steps=steps)
    names = [key for key in own if key != LOSSES]
    limit = max(TOLERANCE, JITTER_FACTOR * _distance(own, jittered, names))
    worst = max(names, key=lambda key: difference(own[key], theirs[key]))
    return _check(
        "training as here",
        _distance(own, theirs, names),
        limit,
        f"{steps} step{'s' if steps > 1 else ''} on {name}, all parameters, of their norm; largest "
        f"{difference(own[worst], theirs[worst]):.1e} of scale, {worst.removeprefix(PARAMETER)}; losses "
        f"differ by {difference(own[LOSSES], theirs[LOSSES]):.1e}",
    )


def _distance(own: Tensors, other: Tensors, names: Sequence[str]) -> float:
    """Returns ‖own - other‖ / ‖own‖ over all of the names; infinite where they cannot be compared."""
    if not all(np.isfinite(difference(own[key], other[key])) for key in names):
        return float("inf")
    a, b = (np.concatenate([of[key].ravel().astype(np.float64) for key in names]) for of in (own, other))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(a) or 1.0))


def _jittered(images: NDArray[np.float32], size: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Returns images of which each value is changed by about this share of it."""
    return images * (1 + np.float32(size) * rng.standard_normal(images.shape, np.float32))


def jitter(path: Path, images: NDArray[np.float32], outputs: NDArray[np.float32]) -> float:
    """Returns how far outputs move, of their scale, where images are changed by one part in a million."""
    session, rng = Session.open(path), np.random.default_rng(0)
    moved = []
    for _ in range(JITTER_RUNS):
        moved.append(difference(outputs, session.run(_jittered(images, JITTER, rng))))
    return max(moved)


def difference(own: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Returns max|own - other| / max|own|; infinite where the shapes differ or a value is not finite."""
    if own.shape != other.shape or not (np.isfinite(own).all() and np.isfinite(other).all()):
        return float("inf")
    error = float(np.abs(own.astype(np.float64) - other).max(initial=0))
    return error / (float(np.abs(own).max(initial=0)) or 1.0)


def _check(name: str, value: float, limit: float, detail: str) -> Check:
    return Check(
        name=name,
        status="passed" if value <= limit else "failed",
        value=value if np.isfinite(value) else None,
        threshold=limit,
        detail=detail,
    )


def _main(bundle: Path, out: Path, seconds: float, steps: int) -> None:
    write(compute(Bundle.open(bundle), seconds=seconds, steps=steps), out)
    sys.stdout.write(describe_host().model_dump_json())


if __name__ == "__main__":
    try:
        _main(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
    except WasiExportError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(int(error.exit_code))
