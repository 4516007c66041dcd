"""Does the ONNX model give what the torch model gave? On the golden data, so that a board can ask itself.

Every golden image is run at several batch sizes, with the optimisations of onnxruntime off and on: a graph
that is right at batch 1 can have the batch size baked in, and an optimiser pass can change what it computes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wasi_export.artifact import Golden
from wasi_export.errors import ModelFailedError, NothingToCheckError, ParityError
from wasi_export.runtimes.session import Session

BATCHES = (1, 2, 7)


@dataclass(frozen=True)
class ParityResult:
    """The largest error over the output scale, at one batch size, with optimisation off or on."""

    batch: int
    optimised: bool
    max_error: float

    def __str__(self) -> str:
        level = "all" if self.optimised else "off"
        return f"{self.max_error:.1e} at batch {self.batch}, optimisation {level}"


def measure_parity(
    model_path: Path, golden: Golden, *, batches: Sequence[int] = BATCHES, threads: int = 1
) -> tuple[ParityResult, ...]:
    """Returns max|output - reference| / max|reference| over all golden images, for every combination.

    Images are repeated from the first on to fill the last batch. An output that is not finite has an
    infinite error.

    Raises:
        NothingToCheckError: there are no golden images.
        HostError: the model needs a newer onnxruntime.
        ModelFailedError: the model does not load, fails, or gives outputs of another shape.
    """
    if len(golden.images) == 0:
        raise NothingToCheckError(
            "the golden data holds no images: export again with export.golden_images ≥ 1"
        )
    scale = float(np.abs(golden.outputs).max())
    results = []
    for optimised in (False, True):
        session = Session.open(model_path, threads=threads, optimise=optimised)
        for batch in batches:
            errors = [_error(session, golden, indices) for indices in _cycled(len(golden.images), batch)]
            results.append(ParityResult(batch, optimised, _relative(max(errors), scale)))
    return tuple(results)


def relative_error(model_path: Path, golden: Golden) -> float:
    """Returns ‖outputs - reference‖ / ‖reference‖ over all golden images, for graphs that are not exact.

    Raises:
        HostError: the model needs a newer onnxruntime.
        ModelFailedError: the model does not load, or fails.
    """
    outputs = Session.open(model_path).run(golden.images).astype(np.float64)
    error = float(np.linalg.norm(outputs - golden.outputs) / np.linalg.norm(golden.outputs))
    return error if np.isfinite(error) else float("inf")


def worst(results: Sequence[ParityResult]) -> ParityResult:
    """Returns the result with the largest error; one that is no number is larger than all."""
    return max(results, key=lambda result: (math.isnan(result.max_error), result.max_error))


def require_parity(results: Sequence[ParityResult], tolerance: float) -> None:
    """Does nothing where every error is within the tolerance.

    Raises:
        ParityError: one is not; the message has the largest.
    """
    if not (largest := worst(results)).max_error <= tolerance:
        raise ParityError(
            f"outputs differ from the reference by {largest}; "
            f"the tolerance is {tolerance:g} of the output scale"
        )


def _cycled(count: int, batch: int) -> Iterator[NDArray[np.int64]]:
    """Yields index batches of exactly `batch` that cover 0..count-1, going on from 0 to fill the last."""
    for start in range(0, count, batch):
        yield np.arange(start, start + batch) % count


def _error(session: Session, golden: Golden, indices: NDArray[np.int64]) -> float:
    outputs, reference = session.run(golden.images[indices]), golden.outputs[indices]
    if outputs.shape != reference.shape:
        raise ModelFailedError(
            f"{session.path} gives outputs {list(outputs.shape)} for {len(indices)} images, "
            f"the reference has {list(reference.shape)}: the batch axis must be dynamic"
        )
    with np.errstate(invalid="ignore"):  # inf - inf; it ends as an infinite error
        error = float(np.abs(outputs.astype(np.float64) - reference).max())
    return error if np.isfinite(error) else float("inf")


def _relative(error: float, scale: float) -> float:
    if error == 0:
        return 0.0
    return error / scale if 0 < scale < float("inf") else float("inf")
