"""A second graph in smaller numbers, shipped only if it is as good and, with int8, faster on this machine."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wasi_export.artifact import Bundle, Golden
from wasi_export.config import Int8Factors, Quantize
from wasi_export.converters.quantize import other_factors, quantizable_weights, to_fp16_storage, to_int8
from wasi_export.durable import write_bytes
from wasi_export.errors import CheckFailedError
from wasi_export.image_set import ImageSet
from wasi_export.manifest import QUANTIZED_MODELS, InputSpec, Quantized
from wasi_export.progress import Track, silent
from wasi_export.runtimes.accuracy import predict
from wasi_export.runtimes.bench import measure_latency
from wasi_export.runtimes.parity import relative_error
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.runtimes.session import Session

if TYPE_CHECKING:
    import onnx

MAX_DROP = 0.01
"""Share of the images by which fewer may be right than in fp32; those that are won make up for lost ones."""
IMAGES, ROUNDS = 500, 20


@dataclass(frozen=True)
class Source:
    """The fp32 graph and what its quantised forms are judged by."""

    graph: "onnx.ModelProto"
    path: Path
    golden: Golden
    images: ImageSet
    spec: InputSpec
    labelled: bool
    """Whether the labels of the images are the model's classes; else the fp32 answers stand for them."""


def add_quantized(
    source: Source, quantize: Quantize, *, factors: Int8Factors = "both", track: Track = silent
) -> Quantized | None:
    """Writes the quantised graph beside the fp32 one; returns what was measured of it.

    Where int8 loses too much, the products that do most harm alone stay fp32: 1, 2, 4, … up to half of them.

    Args:
        source: the fp32 graph, in its file.
        quantize: the form; with `auto` a graph that is not good enough is left out instead of an error.
        factors: which of them are int8.
        track: progress display.

    Raises:
        CheckFailedError: the graph that was asked for is not good enough.
    """
    if quantize == "none":
        return None
    form = "int8" if quantize == "auto" else quantize
    path = source.path.with_name(QUANTIZED_MODELS[form])
    images = source.images.sample(IMAGES, seed=0)
    before = _predictions(source.path, images, source.spec, track)
    labels = images.labels if source.labelled else before
    for kept in _kept(source, other_factors(source.graph, factors), track) if form == "int8" else [()]:
        graph = to_int8(source.graph, kept=kept) if form == "int8" else to_fp16_storage(source.graph)
        write_bytes(path, graph.SerializeToString(deterministic=True))
        after = _predictions(path, images, source.spec, track)
        drop = (int((before == labels).sum()) - int((after == labels).sum())) / len(images)
        if drop <= MAX_DROP:
            break
    models = (("fp32", source.path), (form, path))
    ratio = measure_latency(models, rounds=ROUNDS, track=track)[1].ratio_to_first
    found = Quantized(
        form=form,
        file=path.name,
        error=relative_error(path, source.golden),
        accuracy_drop=drop,
        images=len(images),
        latency_ratio=ratio,
        kept=kept,
    )
    reason = _reason(found)
    if reason is None:
        return found
    path.unlink()
    if quantize != "auto":
        raise CheckFailedError(f"{form} {reason}: leave out --quantize, or give --quantize auto")
    return found.model_copy(update={"file": None, "reason": reason})


def int8_graph(bundle: Bundle, path: Path) -> Path:
    """Returns the int8 graph of a bundle: its own, or one that is written to `path` for comparison."""
    import onnx

    quantized, shipped = bundle.manifest.quantized, bundle.quantized_path
    if quantized is not None and quantized.form == "int8" and shipped is not None:
        return shipped
    graph = to_int8(onnx.load(bundle.model_path))
    write_bytes(path, graph.SerializeToString(deterministic=True))
    return path


def _reason(found: Quantized) -> str | None:
    """Returns why a graph is not good enough; None where it is."""
    if found.accuracy_drop > MAX_DROP:
        lost = f"{found.accuracy_drop:.1%} of accuracy on {found.images} images"
        return f"loses {lost}, {MAX_DROP:.0%} may be lost"
    if found.form == "int8" and found.latency_ratio >= 1:
        return f"takes {found.latency_ratio:.2f} of the time of fp32 on this machine"
    return None


def _kept(source: Source, always: tuple[str, ...], track: Track) -> Iterator[tuple[str, ...]]:
    """Yields the weights to leave in fp32: those always, then ever more of those that do most harm alone."""
    yield always
    weights = [name for name in quantizable_weights(source.graph) if name not in always]
    path = source.path.with_name("one.onnx")
    errors = {}
    for weight in track(weights, "find what int8 harms", len(weights)):
        others = [*always, *(other for other in weights if other != weight)]
        write_bytes(path, to_int8(source.graph, kept=others).SerializeToString())
        errors[weight] = relative_error(path, source.golden)
    path.unlink(missing_ok=True)
    order = sorted(weights, key=lambda weight: -errors[weight])
    count = 1
    while count <= len(weights) // 2:
        yield (*always, *order[:count])
        count *= 2


def _predictions(path: Path, images: ImageSet, spec: InputSpec, track: Track) -> NDArray[np.int64]:
    return predict(Session.open(path), images, Preprocess(spec), track=track)
