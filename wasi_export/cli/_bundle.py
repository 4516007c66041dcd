"""From a torch model to a bundle: where training, converters and runtimes meet.

Imports torch, so commands import it when they are called.
"""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.numpy import save

from wasi_export.artifact import Bundle, Golden, write_bundle_manifest
from wasi_export.cli._fold import choose_folds
from wasi_export.cli._quantize import Source, add_quantized
from wasi_export.cli._train_graph import make_training_step, write_training_step
from wasi_export.config import Config
from wasi_export.converters.check import check_factors, graph_facts
from wasi_export.converters.inference import OUTPUT_NAME, reference_outputs, write_source
from wasi_export.converters.merge import with_values
from wasi_export.converters.simplify import fold_normalization, simplify
from wasi_export.datasets import load_calibration, load_data
from wasi_export.durable import staged_folder, write_bytes
from wasi_export.errors import ConfigError, DataError, UnsupportedModelError, some
from wasi_export.image_set import ImageSet
from wasi_export.manifest import (
    CONFIG,
    GOLDEN,
    MODEL,
    TRAINED_PLAN,
    InputSpec,
    Manifest,
    ModelFacts,
    creation_time,
)
from wasi_export.progress import Track, silent
from wasi_export.ranks import Plan
from wasi_export.runtimes.parity import measure_parity, require_parity, worst
from wasi_export.runtimes.preprocess import Preprocess
from wasi_export.subspace.inject import fold_layers
from wasi_export.training.checkpoint import load_run
from wasi_export.training.labels import own_classes
from wasi_export.training.models import create_model, input_spec
from wasi_export.training.planning import factorize

if TYPE_CHECKING:
    from torch import nn

TOOLS = ("wasi-export", "torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")
logging.getLogger("onnxscript").setLevel(logging.ERROR)  # it warns of every constant that it leaves alone


@dataclass(frozen=True)
class Classifier:
    """A torch model and all that its bundle says of it."""

    model: "nn.Module"
    config: Config
    spec: InputSpec
    classes: tuple[str, ...]
    plan: Plan | None
    """The factored layers; None for a dense model."""
    images: ImageSet
    """Where the golden images come from."""
    labelled: bool = True
    """Whether their labels are the model's classes."""
    data_fingerprint: str | None = None
    metrics: tuple[tuple[str, float], ...] = ()


def export_run(
    run_dir: Path,
    destination: Path,
    *,
    overrides: Sequence[str] = (),
    force: bool = False,
    track: Track = silent,
) -> Bundle:
    """Exports a finished run into a bundle, checked; returns it. Golden images are validation images.

    Args:
        run_dir: the run folder.
        destination: the bundle folder.
        overrides: of the run's configuration, as `export.opset=20`.
        force: replace what is there.
        track: progress display.

    Raises:
        IntegrityError: there is no finished run.
        UnsupportedModelError: torch cannot export the model.
        CheckFailedError: the exported graph is not as planned, or differs from the torch model.
        ArtifactExistsError: the destination exists.
    """
    with staged_folder(destination, force=force) as folder:
        run = load_run(run_dir)
        config = run.config
        if overrides:
            config = Config.from_mapping(config.model_dump(), overrides, origin="options")
        classifier = Classifier(
            model=run.model,
            config=config,
            spec=run.facts.input,
            classes=run.facts.classes,
            plan=run.plan,
            images=_validation_images(config, run.facts.classes, track),
            data_fingerprint=run.facts.data_fingerprint,
            metrics=tuple(run.facts.metrics.items()),
        )
        write_checked(classifier, folder, track=track)
    return Bundle.open(destination)


def _validation_images(config: Config, classes: tuple[str, ...], track: Track) -> ImageSet:
    """Returns the images that a trained model is checked with.

    Raises:
        DataError: there are other classes than it was trained on.
    """
    images = load_data(config.data, track=track)[1]
    if images.classes != classes:
        odd = sorted(set(images.classes) ^ set(classes))
        raise DataError(
            f"{config.data.source} has {len(images.classes)} classes and the model was trained on "
            f"{len(classes)}, they differ in {some(odd)}: bring the images back, or train again"
        )
    return images


def export_model(
    config: Config,
    destination: Path,
    *,
    dense: bool = False,
    force: bool = False,
    track: Track = silent,
) -> Bundle:
    """Exports a timm model with the head its weights come with, factored without training.

    Golden images are calibration images.

    Args:
        config: `model`, `subspace` and `export` of it; `data.source` has the calibration images.
        destination: the bundle folder.
        dense: leave all layers dense.
        force: replace what is there.
        track: progress display.

    Raises:
        ConfigError: there is no such model or checkpoint, or it has no head.
        UnsupportedModelError: there is nothing to factor, or torch cannot export the model.
        CheckFailedError: the exported graph is not as planned, or differs from the torch model.
        ArtifactExistsError: the destination exists.
    """
    if not config.model.pretrained and config.model.checkpoint is None:
        raise ConfigError(f"{config.model.name} has random weights: give --checkpoint FILE or --pretrained")
    with staged_folder(destination, force=force) as folder:
        images = load_calibration(config.data.source, root=config.data.root, track=track)
        classes = own_classes(config.model)
        model = create_model(config.model, len(classes))
        plan = None
        if not dense:
            plan = factorize(config, model, images, track=track)
            if not plan.factored:
                reasons = "; ".join(f"{layer.name} {layer.reason}" for layer in plan.layers[:2])
                raise UnsupportedModelError(f"no layer of {config.model.name} pays to factor: {reasons}")
        spec = input_spec(model, config)
        classifier = Classifier(model.cpu(), config, spec, classes, plan, images, labelled=False)
        write_checked(classifier, folder, track=track)
    return Bundle.open(destination)


def write_checked(classifier: Classifier, folder: Path, *, track: Track = silent) -> None:
    """Writes the files of a bundle into an empty folder, the manifest last, and checks the model on the way.

    The same classifier and SOURCE_DATE_EPOCH give the same bytes, if nothing is decided or told by times.

    Args:
        classifier: whose model loses the factors that are folded.
        folder: the empty folder.
        track: progress display.

    Raises:
        UnsupportedModelError: torch cannot export the model.
        CheckFailedError: the exported graph is not as planned, or differs from the torch model.
    """
    config, golden, spec = classifier.config, make_golden(classifier), bundle_spec(classifier)
    tolerance = config.thresholds.max_parity_error
    name, trained, training = config.name, None, None
    if config.export.train_graph:
        trained = make_training_step(classifier.model, classifier.spec, config.on_board, golden.images)
    plan = _fold(classifier, track)
    source = write_source(classifier.model, classifier.spec, opset=config.export.opset)
    if trained is None:
        graph = simplify(source, name)
        if config.export.fold_normalization:
            graph = fold_normalization(graph, classifier.spec)
    else:
        if classifier.plan is not None:
            write_bytes(folder / TRAINED_PLAN, classifier.plan.model_dump_json(indent=2).encode())
        training, evaluate = write_training_step(
            trained, source, golden, folder, name=name, tolerance=tolerance
        )
        # In the way of `merge`, so that what has not learnt anything merges into the very same file.
        graph = with_values(evaluate, trained.exported.parameters)
    check_factors(graph, plan)
    write_bytes(folder / MODEL, graph.SerializeToString(deterministic=True))
    write_bytes(folder / GOLDEN, save(vars(golden)))
    parity = measure_parity(folder / MODEL, golden)
    require_parity(parity, tolerance)
    judged = Source(graph, folder / MODEL, golden, classifier.images, spec, classifier.labelled)
    quantized = add_quantized(judged, config.export.quantize, factors=config.export.int8_factors, track=track)
    write_bytes(folder / CONFIG, config.to_toml().encode())
    if classifier.plan is not None:
        write_bytes(folder / "plan.json", plan.model_dump_json(indent=2).encode())
    facts = graph_facts(graph)
    manifest = Manifest(
        name=config.name,
        model=ModelFacts(
            name=config.model.name,
            method="dense" if classifier.plan is None else "subspace",
            parameters=sum(parameter.numel() for parameter in classifier.model.parameters()),
            layers=plan.layers,
        ),
        classes=classifier.classes,
        input=spec,
        output=OUTPUT_NAME,
        opset=facts.opset,
        ir_version=facts.ir_version,
        min_onnxruntime=facts.min_onnxruntime,
        parity_error=worst(parity).max_error,
        quantized=quantized,
        training=training,
        seed=config.seed,
        data_fingerprint=classifier.data_fingerprint,
        metrics=dict(classifier.metrics),
        tools={"python": platform.python_version(), **{tool: version(tool) for tool in TOOLS}},
        created=creation_time(),
    )
    write_bundle_manifest(folder, manifest)


def _fold(classifier: Classifier, track: Track) -> Plan:
    """Multiplies factors out where the configuration says so, in place; returns the model's plan then."""
    plan = classifier.plan or Plan(activation_mode="none", layers=())
    chosen = choose_folds(plan, classifier.config.export.fold, track=track)
    factored = {layer.name for layer in chosen.factored}
    fold_layers(classifier.model, (layer.name for layer in plan.factored if layer.name not in factored))
    return chosen


def make_golden(classifier: Classifier) -> Golden:
    """Returns real images, the outputs of the torch model in fp32 for them, and their labels."""
    images = classifier.images.sample(classifier.config.export.golden_images, classifier.config.seed)
    pictures = [images[index][0] for index in range(len(images))]
    outputs = reference_outputs(classifier.model, Preprocess(classifier.spec).batch(pictures))
    return Golden(Preprocess(bundle_spec(classifier)).batch(pictures), outputs, images.labels)


def bundle_spec(classifier: Classifier) -> InputSpec:
    """Returns how an image becomes the input of the graph: as the model's, but for what is folded."""
    if not classifier.config.export.fold_normalization:
        return classifier.spec
    channels = classifier.spec.channels
    return classifier.spec.model_copy(update={"mean": (0.0,) * channels, "std": (1.0,) * channels})
