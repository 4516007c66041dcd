"""How long the Linear layers of a model take on this machine, dense and at each rank.

The latency of a model whose layers take the forms f is predicted as

    rest + Σ ms(f)        rest = ms(dense model) - Σ ms(dense forms)

with everything on the right measured: each distinct form by itself, and the dense model in turns with its own
dense forms. What attention, norms, activations and the head take is in the rest, and so is what layers in a
model take more or less than alone.

Forms run in turns, as many at a time as have weights for a cache to forget: in a model, too, a layer finds
the weights of the others in the caches and not its own. The clock is that of `bench.py`. Times are remembered
in one file for each processor, onnxruntime version and number of threads; as a processor is not as fast every
day, they are scaled by the dense forms, which are always measured again.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime as ort
from pydantic import Field

from wasi_export.allocate import LayerTimes
from wasi_export.cost import FLOAT_BYTES, LinearForm
from wasi_export.durable import write_bytes
from wasi_export.errors import IntegrityError, MalformedError
from wasi_export.progress import Track, silent
from wasi_export.runtimes.host import describe_host
from wasi_export.runtimes.session import Session, session_options
from wasi_export.settings import Frozen
from wasi_export.untrusted.document import read_document

GROUP_BYTES = 64 * 2**20  # of weights that run in turns: above the caches of a board, about those of a server
ROUNDS, WARMUP = 40, 8

Graph = Callable[[LinearForm], bytes]
"""Makes the ONNX model of a form; the converters have it."""


class TimedForm(Frozen):
    """A form of a layer and the median of its times."""

    out_features: int
    in_features: int
    tokens: int
    rank: int | None
    ms: float = Field(gt=0)

    @property
    def form(self) -> LinearForm:
        """The form, as a key."""
        return LinearForm(self.out_features, self.in_features, self.tokens, self.rank)


class Conditions(Frozen):
    """Under which times can be compared."""

    machine: str
    processor: str
    onnxruntime: str
    threads: int

    @classmethod
    def here(cls, threads: int) -> "Conditions":
        """Returns those of this process."""
        host = describe_host()
        return cls(
            machine=host.machine,
            processor=host.processor,
            onnxruntime=host.versions["onnxruntime"],
            threads=threads,
        )


class TimesFile(Frozen):
    """All that was measured under some conditions."""

    conditions: Conditions
    timed: tuple[TimedForm, ...] = ()


def measure_layer_times(
    dense_model: Path,
    layers: Sequence[LinearForm],
    forms: Iterable[LinearForm],
    graph: Graph,
    *,
    threads: int = 1,
    cache: Path | None = None,
    track: Track = silent,
) -> LayerTimes:
    """Returns the time of each form and of the rest of the model, for one image.

    Args:
        dense_model: ONNX file of the model with all layers dense, with a fixed image size.
        layers: the dense form of each of its layers that may be factored.
        forms: that these layers can take, dense ones included.
        graph: makes the ONNX model of a form.
        threads: of the runtime; with one the clock is the CPU time of the process.
        cache: folder of the file of times; None: everything is measured and nothing is kept.
        track: progress display.

    Raises:
        IntegrityError: the file of times is damaged.
        ModelFailedError: the model does not load or fails.
    """
    times = measure_forms(forms, graph, threads=threads, cache=cache, track=track)
    session = Session.open(dense_model, threads=threads)
    image = session.random_images(1)
    counts = Counter(layers)
    runs = [lambda: session.run(image), *(_runner(form, graph, threads) for form in counts)]
    model_ms, *dense_ms = _in_turns(runs, threads)
    now_ms = sum(count * ms for count, ms in zip(counts.values(), dense_ms, strict=True))
    scale = now_ms / sum(times[form] for form in layers)
    return LayerTimes({form: scale * ms for form, ms in times.items()}, rest_ms=max(0.0, model_ms - now_ms))


def measure_forms(
    forms: Iterable[LinearForm],
    graph: Graph,
    *,
    threads: int = 1,
    cache: Path | None = None,
    track: Track = silent,
) -> dict[LinearForm, float]:
    """Returns the median time of each form in ms; those in the cache folder are not measured again.

    Raises:
        IntegrityError: the file of times is damaged.
    """
    conditions = Conditions.here(threads)
    path = None if cache is None else cache / _file_name(conditions)
    forms = tuple(dict.fromkeys(forms))
    times = {timed.form: timed.ms for timed in _read(path, conditions).timed}
    missing = [form for form in forms if form not in times]
    groups = _groups(missing)
    for group in track(groups, "time layers", len(groups)):
        runs = [_runner(form, graph, threads) for form in group]
        times.update(zip(group, _in_turns(runs, threads), strict=True))
    if path is not None and missing:
        timed = (TimedForm(**asdict(form), ms=ms) for form, ms in times.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, TimesFile(conditions=conditions, timed=tuple(timed)).model_dump_json().encode())
    return {form: times[form] for form in forms}


def _runner(form: LinearForm, graph: Graph, threads: int) -> Callable[[], object]:
    """Returns what runs a form once, on random rows."""
    session = ort.InferenceSession(graph(form), session_options(threads=threads))
    shape = form.tokens, form.in_features
    feed = {"rows": np.random.default_rng(0).standard_normal(shape, np.float32)}
    return lambda: session.run(None, feed)


def _in_turns(runs: Sequence[Callable[[], object]], threads: int) -> list[float]:
    """Returns the median time of each in ms, all run in turns."""
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    samples_ms = np.empty((ROUNDS, len(runs)))
    for round_ in range(-WARMUP, ROUNDS):
        for index in range(len(runs)) if round_ % 2 == 0 else reversed(range(len(runs))):
            start = clock()
            runs[index]()
            if round_ >= 0:
                samples_ms[round_, index] = (clock() - start) / 1e6
    medians: list[float] = np.median(samples_ms, axis=0).tolist()
    return medians


def _groups(forms: Sequence[LinearForm]) -> list[list[LinearForm]]:
    """Returns the forms in groups whose weights reach `GROUP_BYTES`; a remainder joins the last."""
    groups: list[list[LinearForm]] = [[]]
    size, left = 0, sum(form.parameters for form in forms) * FLOAT_BYTES
    for form in forms:
        if size >= GROUP_BYTES and left >= GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(form)
        size += form.parameters * FLOAT_BYTES
        left -= form.parameters * FLOAT_BYTES
    return groups if forms else []


def _file_name(conditions: Conditions) -> str:
    digest = hashlib.sha256(conditions.model_dump_json().encode()).hexdigest()
    return f"layer_times-{digest[:16]}.json"


def _read(path: Path | None, conditions: Conditions) -> TimesFile:
    if path is None or not path.exists():
        return TimesFile(conditions=conditions)
    try:
        return read_document(path, TimesFile)
    except (OSError, MalformedError) as error:
        raise IntegrityError(f"{path} is not a file of layer times: delete it") from error
