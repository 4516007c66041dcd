"""Latency of several models, measured so that the ratio between them can be believed.

The models run in turns, each round in another order, so that a change of clock speed, a busy neighbour, or
what a predecessor left in the caches meets all of them; the ratio is taken within a round, and its median
over rounds is reported with its quartiles and its confidence interval. With one thread the clock is the CPU
time of the process, which a busy machine does not lengthen; with more threads it is the wall clock.

The first model is loaded twice, and runs twice a round. By how much the ratio of it to itself is off 1 is the
noise floor: where a model lies in memory makes a difference that no number of rounds removes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from wasi_export.progress import Track, silent
from wasi_export.report import Latency
from wasi_export.runtimes.footprint import Footprint, measure_footprint
from wasi_export.runtimes.session import Session
from wasi_export.runtimes.significance import median_interval

CONFIDENCE = 0.95
"""Of the interval of a ratio, however often it is looked at."""
LOOKS = 3
"""At most, so at most four times the rounds."""


def measure_latency(
    models: Sequence[tuple[str, Path]],
    *,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 50,
    warmup: int = 5,
    decided: Callable[[Sequence[Latency]], bool] | None = None,
    track: Track = silent,
) -> tuple[Latency, ...]:
    """Returns the latency of each (name, ONNX file), in the order given; ratios are to the first.

    Every model gets random images of its own input size. As long as the figures are not `decided`, the rounds
    are doubled, twice at most. The probability of an error is shared out over the `LOOKS` (Bonferroni), so
    that looking again does not add to it.

    Raises:
        UsageError: a file does not exist, or a model has no fixed image size or another batch size.
        HostError: a model needs a newer onnxruntime, or this system does not tell peak memory.
        ModelFailedError: a model does not load or fails.
    """
    paths = [path for _, path in models]
    again = paths[:1] if len(paths) > 1 else []
    turns = _Turns.of([*paths, *again], batch=batch, threads=threads)
    footprints = [measure_footprint(path, batch=batch, threads=threads) for path in paths]
    confidence = 1 - (1 - CONFIDENCE) / (LOOKS if decided else 1)
    samples_ms = turns.run(rounds, warmup=warmup, track=track)
    found = _summaries(models, samples_ms, footprints, confidence, batch=batch, threads=threads)
    while decided and not decided(found) and len(samples_ms) < rounds * 2 ** (LOOKS - 1):
        samples_ms = np.concatenate((samples_ms, turns.run(len(samples_ms), track=track)))
        found = _summaries(models, samples_ms, footprints, confidence, batch=batch, threads=threads)
    return found


@dataclass(frozen=True)
class _Turns:
    """Loaded models that run in turns, on images of their own."""

    sessions: Sequence[Session]
    images: Sequence[NDArray[np.float32]]
    clock: Callable[[], int]
    rng: np.random.Generator

    @classmethod
    def of(cls, paths: Sequence[Path], *, batch: int, threads: int) -> Self:
        sessions = [Session.open(path, threads=threads) for path in paths]
        images = [session.random_images(batch) for session in sessions]
        clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
        return cls(sessions, images, clock, np.random.default_rng(0))

    def run(self, rounds: int, *, warmup: int = 0, track: Track) -> NDArray[np.float64]:
        """Returns the times in ms, [rounds, models], without those of the warm-up."""
        samples_ms = np.empty((warmup + rounds, len(self.sessions)))
        for row in track(samples_ms, "latency", len(samples_ms)):
            for model in self.rng.permutation(len(self.sessions)):
                start = self.clock()
                self.sessions[model].run(self.images[model])
                row[model] = (self.clock() - start) / 1e6
        return samples_ms[warmup:]


def _summaries(
    models: Sequence[tuple[str, Path]],
    samples_ms: NDArray[np.float64],
    footprints: Sequence[Footprint],
    confidence: float,
    *,
    batch: int,
    threads: int,
) -> tuple[Latency, ...]:
    """Returns the figures of the models; a further column of the samples is the first of them again."""
    ratios = samples_ms / samples_ms[:, :1]
    intervals = [median_interval(column.tolist(), confidence) for column in ratios.T]
    noise_floor = None
    if len(intervals) > len(models) and (again := intervals[-1]):
        noise_floor = max(again[1], 1 / again[0]) - 1  # the same up and down, as ratios are
    found = []
    for index, ((name, _), footprint) in enumerate(zip(models, footprints, strict=True)):
        p50, p90, p99 = np.percentile(samples_ms[:, index], [50, 90, 99])
        ratio_low, ratio, ratio_high = np.percentile(ratios[:, index], [25, 50, 75])
        latency = Latency(
            model=name,
            batch=batch,
            threads=threads,
            p50_ms=p50,
            p90_ms=p90,
            p99_ms=p99,
            ratio_to_first=ratio,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            ratio_interval=intervals[index],
            noise_floor=noise_floor,
            load_ms=footprint.load_ms,
            peak_rss_mb=footprint.peak_rss_mb,
            clock="cpu" if threads == 1 else "wall",
            samples_ms=tuple(samples_ms[:, index].tolist()),
        )
        found.append(latency)
    return tuple(found)
