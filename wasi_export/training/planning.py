"""From a configuration to a plan: what `wasi-export plan` shows and training can start from.

A budget of training memory is one of all epochs. Those before layers are factored fit or do not; in those
after, it is met through the parameters. The predicted peak of a step is taken to grow with
the parameters allowed (weights, gradients and optimiser state do, and saved inputs hardly depend on the
ranks), so the largest number of parameters that fits is looked for by interpolation between one that fits and
one that does not. Should the peak not grow everywhere, the plan that is found still fits: its own prediction
was made.
"""

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from wasi_export.allocate import LayerTimes, candidates
from wasi_export.config import Config, MemoryConfig, SubspaceConfig
from wasi_export.errors import RankError
from wasi_export.image_set import ImageSet
from wasi_export.progress import Track, silent
from wasi_export.ranks import Plan
from wasi_export.settings import Frozen
from wasi_export.subspace.inject import factor_layers
from wasi_export.subspace.kinds import Kind, kind_of
from wasi_export.subspace.perplexity import choose_activations, measure_perplexity
from wasi_export.subspace.planner import MeasuredModel, decide, measure_layers
from wasi_export.training.data import make_loader
from wasi_export.training.first_part import dense_form, first_part
from wasi_export.training.memory import LoraJob, StepJob
from wasi_export.training.models import input_spec, log_likelihood, random_feature
from wasi_export.training.predict import predict_step_memory
from wasi_export.training.processes import make_accelerator

PREDICTIONS = 8  # at most: each takes seconds
CLOSE_ENOUGH = 0.98  # of the memory allowed
SMALL_BRACKET = 0.005  # of the parameters of the dense model

TimesOf = Callable[[MeasuredModel], LayerTimes]
"""Measures the layers and the rest of the model in the runtime, which training does not know."""


class ModelTotals(Frozen):
    """What a whole model has; figures for one image but for the training step."""

    parameters: int
    macs: int
    train_memory_mb: float = Field(description="predicted peak of a step of train.subspace, in 10^6 bytes")
    latency_ms: float | None = Field(None, description="predicted; None: not asked for")


class PlannedModel(Frozen):
    """A plan, and what it makes of the model."""

    schema_version: Literal[1] = 1
    name: str
    batch_size: int
    plan: Plan
    dense: ModelTotals
    planned: ModelTotals
    first_train_memory_mb: float | None = Field(
        None,
        description="predicted peak of a step of the epochs before layers are factored, in 10^6 bytes; "
        "None: there are none",
    )


def plan_model(
    config: Config,
    model: nn.Module,
    images: ImageSet,
    *,
    goes_on: bool = False,
    times_of: TimesOf | None = None,
    track: Track = silent,
) -> PlannedModel:
    """Returns the plan that the configuration asks for, and its totals; leaves the model as it is.

    Args:
        config: the whole configuration; a budget of memory is one of `train.subspace` with its batch size.
        model: the dense model.
        images: training images, of which some calibrate.
        goes_on: whether the model's weights are of a finished run.
        times_of: for a budget of latency.
        track: progress display.

    Raises:
        RankError: an explicit rank is above what a layer has, or the budgets cannot be met.
        ConfigError: there is a budget of latency and no `times_of`, or a plan is given of other layers.
    """
    measured = measure_model(config, model, images, track=track)
    times = times_of(measured) if times_of and config.subspace.max_latency_ms is not None else None
    job = _step_job(config, model, images)
    first_mb = _first_peak_mb(config, job, measured, goes_on=goes_on)
    if config.subspace.max_train_memory_mb is None:
        plan = decide(measured, config.subspace, times=times)
        peak_mb = _peak_mb(job, plan)
    else:
        plan, peak_mb = _fit_memory(config.subspace, job, measured, times)
    dense = plan.model_copy(
        update={"layers": tuple(layer.model_copy(update={"rank": None}) for layer in plan.layers)}
    )
    return PlannedModel(
        name=config.model.name,
        batch_size=job.batch_size,
        plan=plan,
        dense=_totals(dense, measured, times, _peak_mb(job, None)),
        planned=_totals(plan, measured, times, peak_mb),
        first_train_memory_mb=first_mb,
    )


def factorize(config: Config, model: nn.Module, images: ImageSet, *, track: Track = silent) -> Plan:
    """Factors a model, in place, by the inputs that training images give its layers; returns the plan.

    Raises:
        RankError: an explicit rank is above what a layer has, or the budgets cannot be met.
        ConfigError: a budget needs a plan that was made before, or the one that is given is of other layers.
        UnsupportedModelError: no layer matches, or the plan that is given is of another model.
    """
    inputs, measured = _measured(config, model, images, track)
    plan = decide(measured, config.subspace)
    factor_layers(model, measured, plan, images=torch.cat(inputs), track=track)
    return plan


def measure_model(
    config: Config, model: nn.Module, images: ImageSet, *, track: Track = silent
) -> MeasuredModel:
    """Returns what a plan is decided from, by training images; leaves the model's weights as they are."""
    return _measured(config, model, images, track)[1]


def _measured(
    config: Config, model: nn.Module, images: ImageSet, track: Track
) -> tuple[list[Tensor], MeasuredModel]:
    """Returns the calibration inputs, and what they show of the model."""
    chosen = images.sample(config.subspace.calibration_images, config.seed)
    device = make_accelerator().device
    loader = make_loader(chosen, input_spec(model, config), config.data, training=False)
    batches = [(inputs.to(device), labels.to(device)) for inputs, labels in loader]
    inputs = [batch for batch, _ in batches]
    scalar = random_feature if config.subspace.sensitivity == "features" else log_likelihood
    measured = measure_layers(
        model.to(device),
        inputs,
        config.subspace,
        total=len(inputs),
        batch_size=config.data.batch_size,
        scalar=scalar,
        track=track,
    )
    if config.subspace.allocation == "perplexity":
        measured = _by_perplexity(config, measured, model, *batches[0])
    return inputs, measured


def _step_job(config: Config, model: nn.Module, images: ImageSet) -> StepJob:
    """Returns the training step of the subspace stage whose memory is predicted, still dense."""
    return StepJob(
        model=config.model,
        train=config.train.subspace,
        input=input_spec(model, config),
        num_classes=len(images.classes),
        batch_size=config.data.batch_size,
        threads=torch.get_num_threads(),
    )


def _peak_mb(job: StepJob, plan: Plan | None) -> float:
    """Returns the predicted peak of a step; None: of one without factors and the switches for them."""
    train = dense_form(job.train) if plan is None else job.train
    return predict_step_memory(job.model_copy(update={"plan": plan, "train": train})).peak_mb


def _first_peak_mb(config: Config, job: StepJob, measured: MeasuredModel, *, goes_on: bool) -> float | None:
    """Returns the predicted peak of a step before layers are factored; None: there is no such step.

    Raises:
        RankError: it is above the budget.
    """
    first = first_part(config, goes_on=goes_on)
    if not first.epochs:
        return None
    layers = tuple(spectrum.name for spectrum in measured.spectra)
    lora = LoraJob(layers=layers, rank=config.subspace.lora_rank) if first.lora else None
    job = job.model_copy(update={"train": first.train, "lora": lora})
    peak_mb, limit_mb = _peak_mb(job, None), config.subspace.max_train_memory_mb
    if limit_mb is not None and peak_mb > limit_mb:
        raise RankError(
            f"max_train_memory_mb = {limit_mb:g} is below {peak_mb:.0f}, the predicted peak of the epochs "
            f"before layers are factored with batch size {job.batch_size}: {_remedies(job, None)}, or set "
            "subspace.dense_epochs = 0"
        )
    return peak_mb


def _fit_memory(
    config: SubspaceConfig, job: StepJob, measured: MeasuredModel, times: LayerTimes | None
) -> tuple[Plan, float]:
    """Returns the plan with the most parameters whose predicted peak is within the budget, and that peak."""
    limit_mb = cast(float, config.max_train_memory_mb)

    def tried(parameters: int) -> tuple[Plan, float]:
        plan = decide(measured, config, times=times, memory_parameters=parameters)
        return plan, _peak_mb(job, plan)

    high = min(config.max_params or measured.cost.parameters, measured.cost.parameters)
    largest, high_mb = tried(high)
    if high_mb <= limit_mb:
        return largest, high_mb
    low = measured.rest.parameters + sum(
        min(candidate.parameters for candidate in candidates(spectrum)) for spectrum in measured.spectra
    )
    best, low_mb = tried(low)
    if low_mb > limit_mb:
        raise RankError(_too_small(limit_mb, low_mb, job, best))
    for _ in range(PREDICTIONS):
        if low_mb >= CLOSE_ENOUGH * limit_mb or high - low < SMALL_BRACKET * measured.cost.parameters:
            break
        share = (limit_mb - low_mb) / (high_mb - low_mb)
        middle = low + int(min(max(share, 0.05), 0.95) * (high - low))
        plan, peak_mb = tried(middle)
        if peak_mb <= limit_mb:
            best, low, low_mb = plan, middle, peak_mb
        else:
            high, high_mb = middle, peak_mb
    return best, low_mb


def _too_small(limit_mb: float, smallest_mb: float, job: StepJob, plan: Plan) -> str:
    """Returns why no rank fits, and what would help."""
    return (
        f"max_train_memory_mb = {limit_mb:g} is below {smallest_mb:.0f}, the predicted peak at the smallest "
        f"ranks with batch size {job.batch_size}: {_remedies(job, plan)}"
    )


def _remedies(job: StepJob, plan: Plan | None) -> str:
    """Returns what lowers the peak of a step, with the predicted figure of the memory switches."""
    if job.train.memory.level == "small":
        return "lower data.batch_size"
    train = job.train.model_copy(update={"memory": MemoryConfig(level="small")})
    train = train if plan is not None else dense_form(train)
    saving_mb = _peak_mb(job.model_copy(update={"train": train}), plan)
    return f'set train.subspace.memory.level = "small" ({saving_mb:.0f}) or lower data.batch_size'


def _totals(
    plan: Plan, measured: MeasuredModel, times: LayerTimes | None, train_memory_mb: float
) -> ModelTotals:
    ranks = {layer.name: layer.rank for layer in plan.layers}
    forms = [spectrum.form(ranks[spectrum.name]) for spectrum in measured.spectra]
    return ModelTotals(
        parameters=measured.rest.parameters + sum(form.parameters for form in forms),
        macs=measured.rest.macs + sum(form.macs for form in forms),
        train_memory_mb=train_memory_mb,
        latency_ms=None if times is None else times.model_ms(forms),
    )


def _by_perplexity(
    config: Config, measured: MeasuredModel, model: nn.Module, images: Tensor, labels: Tensor
) -> MeasuredModel:
    """Returns the measured model with activation ranks by the paper's search, for the layers it factors."""
    subspace = config.subspace
    names = [layer.name for layer in decide(measured, subspace).factored]
    points = measure_perplexity(
        model,
        {name: cast(Kind, kind_of(model.get_submodule(name))) for name in names},
        images,
        lambda logits: F.cross_entropy(logits, labels),
        mode=subspace.activation,
        batch_size=config.data.batch_size,
    )
    chosen = choose_activations(points, int(cast(float, subspace.activation_memory_mb) * 1e6))
    return measured.with_activations({name: point.ranks for name, point in chosen.items()})
