"""Latency of several models, measured so that the ratio between them can be believed.

The models run in turns (A B C, then C B A, …), so that a change of clock speed or a busy neighbour meets all
of them; the ratio is taken within a round and its median over rounds is reported with its quartiles. With one
thread the clock is the CPU time of the process, which a busy machine does not lengthen; with more threads it
is the wall clock.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wasi_export.progress import Track, silent
from wasi_export.report import Latency
from wasi_export.runtimes.footprint import Footprint, measure_footprint
from wasi_export.runtimes.session import Session


def measure_latency(
    models: Sequence[tuple[str, Path]],
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 50,
    warmup: int = 5,
    track: Track = silent,
) -> tuple[Latency, ...]:
    """Returns the latency of each (name, ONNX file), in the order given; ratios are to the first.

    Every model gets random images of its own input size.

    Raises:
        UsageError: a file does not exist, or a model has no fixed image size or another batch size.
        HostError: a model needs a newer onnxruntime, or this system does not tell peak memory.
        ModelFailedError: a model does not load or fails.
    """
    sessions = [Session.open(path, threads=threads) for _, path in models]
    inputs = [session.random_images(batch) for session in sessions]
    footprints = [measure_footprint(path, batch=batch, threads=threads) for _, path in models]
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    samples_ms = np.empty((rounds, len(models)))
    for round_ in track(range(-warmup, rounds), "latency", warmup + rounds):
        order = range(len(models)) if round_ % 2 == 0 else reversed(range(len(models)))
        for model in order:
            elapsed = _run_ms(sessions[model], inputs[model], clock)
            if round_ >= 0:
                samples_ms[round_, model] = elapsed
    return tuple(
        _summary(name, samples_ms[:, index], samples_ms[:, 0], footprint, batch=batch, threads=threads)
        for index, ((name, _), footprint) in enumerate(zip(models, footprints, strict=True))
    )


def _run_ms(session: Session, images: NDArray[np.float32], clock: Callable[[], int]) -> float:
    start = clock()
    session.run(images)
    return (clock() - start) / 1e6


def _summary(
    name: str,
    samples_ms: NDArray[np.float64],
    first_ms: NDArray[np.float64],
    footprint: Footprint,
    *,
    batch: int,
    threads: int,
) -> Latency:
    p50, p90, p99 = np.percentile(samples_ms, [50, 90, 99])
    ratio_low, ratio, ratio_high = np.percentile(samples_ms / first_ms, [25, 50, 75])
    return Latency(
        model=name,
        batch=batch,
        threads=threads,
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        ratio_to_first=ratio,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        load_ms=footprint.load_ms,
        peak_rss_mb=footprint.peak_rss_mb,
        clock="cpu" if threads == 1 else "wall",
        samples_ms=tuple(samples_ms.tolist()),
    )
