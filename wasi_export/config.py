"""The configuration of a pipeline: what there is to set, and what goes with what.

`Config.from_toml` and `Config.from_mapping` are the ways in. Every key has its meaning beside it; the
built-in demo (`demo.toml`) is an example that runs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from wasi_export.settings import (
    Frozen,
    OrOff,
    deep_copy,
    parse_override,
    read_toml,
    set_value,
    to_toml,
    validated,
)

FactorMethod = Literal["sequential", "whitened", "plain"]
Sensitivity = Literal["none", "features", "output"]
DenseMethod = Literal["auto", "lora", "full"]
Fold = Literal["never", "auto", "always"]
NumberForm = Literal["int8", "fp16-storage"]
Int8Factors = Literal["both", "left", "right"]
Quantize = Literal["none", "auto", "int8", "fp16-storage"]
ActivationMode = Literal["none", "feature", "feature+token", "feature+token+batch"]
Allocation = Literal["uniform", "output_error", "perplexity"]
StepOptimizer = Literal["sgd", "momentum", "adamw"]
StepLoss = Literal["cross_entropy", "soft_targets", "mse"]
Recompute = Literal["none", "block", "fine"]
TrainMethod = Literal["dense", "subspace"]
UpdateRule = Literal["factors", "right", "wsi"]
StepUpdate = Literal["factors", "wsi"]
StepActivation = Literal["none", "feature", "feature+token"]
MemoryLevel = Literal["none", "fast", "small", "streamed"]
BoundaryType = Literal["fp32", "bf16"]

MEASURES = ("epsilon", "fraction", "rank")
BUDGETS = ("max_params", "max_macs", "max_train_memory_mb", "max_latency_ms")

CLASSIFIERS = ("head*", "aux_head*", "classif*", "fc", "last_linear")  # timm's names of them


class ModelConfig(Frozen):
    """Which timm model, and where its weights come from."""

    name: str = Field("vit_tiny_patch16_224", description="timm model name")
    pretrained: bool = Field(False, description="let timm download its pretrained weights")
    checkpoint: Path | None = Field(None, description="local .safetensors or .pth with weights only")
    img_size: int | None = Field(None, ge=1, description="input size in pixels; None keeps the model's")
    in_chans: Literal[1, 3] = Field(3, description="input channels; 1 reads images as grey")
    kwargs: dict[str, Any] = Field({}, description="further arguments of timm.create_model")


class DataConfig(Frozen):
    """Labelled images, and how the training batches are made from them."""

    source: str = Field("digits", description="`digits`, `fashion-mnist`, or a folder of class folders")
    root: Path | None = Field(None, description="folder of the IDX files of `fashion-mnist`")
    download: bool = Field(False, description="let torchvision download `fashion-mnist` below root, once")
    train_images: int | None = Field(None, ge=1, description="train on the first n of the shuffled images")
    val_images: int | None = Field(None, ge=1, description="validate on the first n of the shuffled images")
    val_fraction: float = Field(0.2, gt=0, lt=1, description="held out where the source has no val split")
    max_unreadable: float = Field(
        0.1, ge=0, le=1, description="share of a folder's images that may be left out, as they cannot be read"
    )
    batch_size: int = Field(32, ge=1, description="images of a training step, of all processes together")
    eval_batch_size: int = Field(64, ge=1, description="images of a step of evaluation or calibration")
    workers: int = Field(0, ge=0, description="loader processes")
    augment: bool = Field(True, description="random crop and flip while training")
    crop_pct: Annotated[float, Field(ge=0.01, le=1)] | None = Field(
        None, description="share of the resized image that evaluation keeps; None: the model's"
    )
    scale: tuple[float, float] = Field((0.8, 1.0), description="area range of the random crop")
    hflip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")


class SubspaceConfig(Frozen):
    """How Linear layers become `left·right`, and how their inputs are kept for the backward pass."""

    method: FactorMethod = Field(
        "sequential",
        description="sequential: fitted layer after layer to the dense outputs; whitened: each by its own "
        "output energy; plain: SVD of the weight",
    )
    sensitivity: Sensitivity = Field(
        "output",
        description="errors count by what they do, output: to the predicted classes, features: to what the "
        "head sees; none: alike",
    )
    dense_epochs: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="epochs of train.subspace that come before the layers are factored; None: half of them, "
        "or none where training goes on from a finished dense run",
    )
    dense_method: DenseMethod = Field(
        "auto",
        description="what dense_epochs train. lora: changes of lora_rank beside frozen weights, and the "
        "head; full: all weights; auto: lora, but full where the weights are random at first",
    )
    lora_rank: int = Field(16, ge=1, description="of those changes")
    epsilon: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="explained energy to keep")
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="parameters of the pair over those of the dense layer"
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(None, description="the same rank for every layer")
    max_params: Annotated[int, Field(ge=1)] | None = Field(None, description="parameters of the whole model")
    max_macs: Annotated[int, Field(ge=1)] | None = Field(
        None, description="multiply-adds of the whole model for one image"
    )
    max_train_memory_mb: Annotated[float, Field(gt=0)] | None = Field(
        None, description="predicted peak of a training step, in 10^6 bytes"
    )
    max_latency_ms: Annotated[float, Field(gt=0)] | None = Field(
        None, description="predicted latency of one image on the machine that makes the plan"
    )
    allocation: Allocation = Field(
        "uniform",
        description="uniform: epsilon or fraction holds for each layer; output_error: it or the budgets hold "
        "for all layers together, with ranks where they lower the output error most; perplexity: uniform, "
        "and activation ranks by their gradient error",
    )
    plan: Path | None = Field(
        None, description="plan.json of `wasi-export plan`: its ranks are taken, no measure or budget is read"
    )
    include: tuple[str, ...] = Field(
        ("*",), description="name patterns of layers to factor; a bare `*` does not mean classifiers"
    )
    exclude: tuple[str, ...] = Field((), description="name patterns of layers to leave dense")
    calibration_images: int = Field(256, ge=1, description="images that give the input second moments")
    activation: ActivationMode = Field("feature", description="modes in which saved inputs are compressed")
    activation_epsilon: float = Field(0.95, gt=0, le=1, description="energy of the saved inputs to keep")
    activation_memory_mb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="saved inputs of the factored layers for one training batch, in 10^6 bytes; ranks are "
        "chosen within it in place of activation_epsilon",
    )

    @property
    def budgets(self) -> tuple[str, ...]:
        """The keys of `BUDGETS` that are given; several may be."""
        return tuple(key for key in BUDGETS if getattr(self, key) is not None)

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        given = [k for k in MEASURES if getattr(self, k) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of epsilon, fraction and rank, got {' and '.join(given)}")
        if given and self.budgets:
            raise ValueError(f"give a measure or budgets, got {given[0]} and {' and '.join(self.budgets)}")
        if self.budgets and self.allocation != "output_error":
            raise ValueError(f'{self.budgets[0]} needs allocation = "output_error", got "{self.allocation}"')
        if self.activation_memory_mb is not None and self.activation == "none":
            raise ValueError(
                'activation_memory_mb is for compressed inputs, got activation = "none": set it, or leave '
                "activation_memory_mb out"
            )
        if self.allocation == "perplexity" and self.activation_memory_mb is None:
            raise ValueError(
                'allocation = "perplexity" chooses compressed activations within a memory: set '
                "activation_memory_mb and activation"
            )
        return self


class MemoryConfig(Frozen):
    """What a training step keeps in memory and what it does again: switches, or a level that sets them.

    Every switch but `boundary = "bf16"` leaves the gradient exact.
    """

    level: MemoryLevel = Field(
        "none",
        description="fast: micro_batch 4, mlp_recompute; small: those and block_recompute; streamed: "
        "block_recompute in chunks of 4 from bf16, update_in_backward, which is smaller than small where the "
        "parameters outweigh the batch",
    )
    micro_batch: Annotated[int, Field(ge=1)] | None = Field(
        None, description="images per forward and backward pass, of which one step sums the gradients"
    )
    mlp_recompute: bool = Field(False, description="keep the rank-K code of an MLP, not its hidden layer")
    block_recompute: bool = Field(False, description="keep a block's input alone and run the block again")
    block_chunk: Annotated[int, Field(ge=1)] | None = Field(
        None, description="images a recomputed block runs on at a time; None: the whole batch"
    )
    boundary: BoundaryType = Field("fp32", description="how the input of a recomputed block is kept")
    update_in_backward: bool = Field(
        False, description="update a block as soon as its gradient is there; clip_grad is then per block"
    )

    @model_validator(mode="before")
    @classmethod
    def _level_sets_switches(cls, values: Any) -> Any:
        level = values.get("level") if isinstance(values, Mapping) else None
        return {**_LEVELS[level], **values} if isinstance(level, str) and level in _LEVELS else values

    @model_validator(mode="after")
    def _switches_agree(self) -> Self:
        if not self.block_recompute:
            for name, default in (("block_chunk", None), ("boundary", "fp32")):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} needs block_recompute = true, got {getattr(self, name)!r}")
        if self.update_in_backward and self.micro_batch is not None:
            raise ValueError(
                "update_in_backward needs the gradient of the whole batch at once, which micro_batch = "
                f"{self.micro_batch} gives in parts: choose one of the two"
            )
        return self


_LEVELS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"micro_batch": 4, "mlp_recompute": True},
    "small": {"micro_batch": 4, "mlp_recompute": True, "block_recompute": True},
    "streamed": {"block_recompute": True, "block_chunk": 4, "boundary": "bf16", "update_in_backward": True},
}


class TrainConfig(Frozen):
    """One training stage. Names are those of timm's training script."""

    epochs: int = Field(3, ge=0, description="0 keeps the initial weights")
    opt: str = Field("adamw", description="timm optimizer name")
    lr: float = Field(1e-4, gt=0, description="learning rate")
    head_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="of the head; None: lr")
    factor_lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="of the factors `left` and `right`; auto: lr, scaled by their shape"
    )
    lora_lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="of LoRA, see subspace.dense_method; auto: 30 lr"
    )
    update: UpdateRule = Field(
        "factors",
        description="what moves the factors. factors: opt moves both; right: opt moves `right` alone; "
        "wsi: gradient descent on the product, at the rate factor_lr",
    )
    refresh_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="steps of wsi from one exact truncation to the next; None: never"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of wsi, and of an opt that takes one")
    weight_decay: float = Field(0.05, ge=0, description="of opt")
    sched: str = Field("cosine", description="timm scheduler name, stepped every batch")
    warmup_steps: int = Field(20, ge=0, description="in which the rate rises")
    clip_grad: OrOff = Field(1.0, description="global gradient norm; off: not clipped")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    mixup: float = Field(0.0, ge=0, description="mixup alpha; 0 is off")
    cutmix: float = Field(0.0, ge=0, description="cutmix alpha; 0 is off")
    memory: MemoryConfig = MemoryConfig()

    @model_validator(mode="after")
    def _update_has_what_it_needs(self) -> Self:
        if self.refresh_every is not None and self.update != "wsi":
            raise ValueError(f'refresh_every needs update = "wsi", got update = "{self.update}"')
        if self.update == "wsi":
            if not isinstance(self.factor_lr, float):
                raise ValueError(
                    'update = "wsi" is gradient descent, whose rate is not that of other optimizers: set '
                    f"factor_lr to a number, got {self.factor_lr!r}"
                )
            for switch in ("mlp_recompute", "update_in_backward"):
                if getattr(self.memory, switch):
                    raise ValueError(
                        f'update = "wsi" needs the gradient of the weights, which memory.{switch} does not '
                        "keep: switch it off"
                    )
        return self


class StagesConfig(Frozen):
    """The two training stages; the subspace stage starts from the weights the dense stage ends with."""

    dense: TrainConfig = TrainConfig()
    subspace: TrainConfig = TrainConfig()


class AdaptConfig(Frozen):
    """Training on the board: what is in its graph, and how `wasi-export adapt` goes about it."""

    trainable: str = Field(
        "factors",
        description="factors, right, head, blocks:N, all, or name patterns with commas between them",
    )
    opt: StepOptimizer = Field("adamw", description="update rule of the step")
    update: StepUpdate = Field(
        "factors",
        description="what moves the factors. factors: opt moves both; wsi: gradient descent on the product, "
        "at the rate factor_lr; opt moves the rest",
    )
    factor_lr: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="of the factors `left` and `right`; auto: lr, scaled by their shape"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="of wsi, and of opt = momentum")
    activation: StepActivation = Field(
        "none", description="modes in which the inputs of trained factors are kept compressed"
    )
    activation_epsilon: float = Field(0.95, gt=0, le=1, description="energy of those inputs to keep")
    accumulate: bool = Field(
        False, description="one update of several batches, for which `adapt` has --micro-batch"
    )
    loss: StepLoss = Field("cross_entropy", description="soft_targets and mse take targets of [B, classes]")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    recompute: Recompute = Field(
        "block", description="what is computed again in place of being kept: blocks, or finer"
    )
    lr: float = Field(1e-4, gt=0, description="learning rate")
    head_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="of the head; None: lr")
    weight_decay: float = Field(0.05, ge=0, description="of opt")
    clip_grad: OrOff = Field(1.0, description="global gradient norm; off: not clipped")
    sched: Literal["cosine", "constant"] = Field("cosine", description="of the learning rate")
    warmup_steps: int = Field(5, ge=0, description="in which the rate rises")
    epochs: int = Field(3, ge=1, description="of the new images")
    batch_size: int = Field(8, ge=1, description="images of a step")
    scale: tuple[float, float] | None = Field(
        None, description="area range of the random crop; None: that of data"
    )
    hflip: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="probability of a horizontal flip; None: that of data"
    )

    @model_validator(mode="after")
    def _wsi_has_what_it_needs(self) -> Self:
        if self.update != "wsi":
            return self
        if self.activation == "none":
            raise ValueError(
                'update = "wsi" takes the gradient of a weight in the basis of its input, got activation = '
                '"none": set activation = "feature" or "feature+token"'
            )
        if self.factor_lr == "auto":
            raise ValueError(
                'update = "wsi" is gradient descent, whose rate is not that of other optimizers: set '
                "factor_lr to a number, got 'auto'"
            )
        return self


class ExportConfig(Frozen):
    """How the ONNX file is made and checked."""

    opset: int = Field(
        23,
        ge=17,
        le=25,
        description="23: Gelu and Attention operators; 20: Gelu; 18: neither; 17: timm's ViT only",
    )
    fold: Fold = Field(
        "never",
        description="whether factored layers are multiplied out: auto: those that are faster dense on this "
        "machine; always: all",
    )
    quantize: Quantize = Field(
        "none",
        description="a second graph. int8: refused unless as accurate, and faster here; auto: int8 where so; "
        "fp16-storage: half the file, the same speed",
    )
    int8_factors: Int8Factors = Field(
        "both", description="which factors are int8; the other one, and its product, stay fp32"
    )
    fold_normalization: bool = Field(
        False, description="the graph takes pixels in [0, 1]: mean and std are in the first convolution"
    )
    train_graph: bool = Field(False, description="also write the training step of [adapt]")
    golden_images: int = Field(8, ge=1, description="real images stored with their reference outputs")

    @model_validator(mode="after")
    def _training_is_on_normalized_images(self) -> Self:
        if self.train_graph and self.fold_normalization:
            raise ValueError(
                "fold_normalization changes a weight that the training step has as it is, got train_graph = "
                "true: choose one of the two"
            )
        return self


class Thresholds(Frozen):
    """What a bundle must meet; None is not checked. How a value is judged: docs/gates.md.

    A threshold without data is exit code 5, and so is one that the measurement does not decide.
    """

    max_parity_error: float = Field(
        1e-5, gt=0, description="largest error over the output scale; graphs in fp32 reach 1e-6"
    )
    min_accuracy: Annotated[float, Field(ge=0, le=1)] | None = Field(None, description="top-1 on --data")
    max_accuracy_drop: Annotated[float, Field(ge=-1, le=1)] | None = Field(
        None, description="top-1 of the baseline minus top-1 of the bundle"
    )
    accuracy_confidence: Annotated[float, Field(ge=0.8, lt=1)] | None = Field(
        None,
        description="as 0.95: accuracy and its drop must be within their thresholds with the whole "
        "confidence interval; None: as they were measured",
    )
    max_latency_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="median of latency over latency of the baseline"
    )
    max_size_mb: Annotated[float, Field(gt=0)] | None = Field(None, description="model.onnx, in 10^6 bytes")
    max_memory_mb: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak of a fresh process that loads model.onnx and runs one image, in 10^6 bytes"
    )

    @model_validator(mode="after")
    def _confidence_is_of_a_threshold(self) -> Self:
        if self.accuracy_confidence is not None and self.min_accuracy is self.max_accuracy_drop is None:
            raise ValueError(
                "accuracy_confidence is how sure min_accuracy and max_accuracy_drop must be: set one of them"
            )
        return self

    @classmethod
    def from_toml(cls, path: Path | None, overrides: Mapping[str, float] | None = None) -> Self:
        """Returns the thresholds in a TOML file, or the defaults, with overrides on top.

        Raises:
            ConfigError: the file cannot be read, or a key or a value is wrong.
        """
        values = (read_toml(path) if path else {}) | dict(overrides or {})
        return validated(cls, values, origin=str(path or "thresholds"))


class Config(Frozen):
    """Everything `wasi-export run` does, from images to report."""

    name: str = Field("wasi", pattern=r"^[\w.-]+$", description="name of the run, used in reports")
    seed: int = Field(0, ge=0, description="of all that is random: weights, split, order, augmentation")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    subspace: SubspaceConfig = SubspaceConfig()
    train: StagesConfig = StagesConfig()
    export: ExportConfig = ExportConfig()
    adapt: AdaptConfig = AdaptConfig()
    thresholds: Thresholds = Thresholds()

    @property
    def on_board(self) -> AdaptConfig:
        """`adapt`, with the augmentation of `data` where it has none of its own."""
        own = self.adapt
        return own.model_copy(
            update={
                "scale": self.data.scale if own.scale is None else own.scale,
                "hflip": self.data.hflip if own.hflip is None else own.hflip,
            }
        )

    @classmethod
    def from_toml(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Returns the configuration in a TOML file, with `section.key=value` overrides on top.

        A value is read as TOML; what is not TOML is taken as a string. Relative paths in the file
        are relative to the current folder.

        Raises:
            ConfigError: the file cannot be read, or a key or a value is wrong.
        """
        return cls.from_mapping(read_toml(path), overrides, origin=str(path))

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], overrides: Sequence[str] = (), *, origin: str = "config"
    ) -> Self:
        """Returns the configuration in nested mappings, with `section.key=value` overrides on top.

        Raises:
            ConfigError: a key or a value is wrong.
        """
        merged = deep_copy(values)
        for override in overrides:
            keys, value = parse_override(override)
            set_value(merged, keys, value)
            _drop_replaced(merged, keys)
        return validated(cls, merged, origin=origin)

    def to_toml(self) -> str:
        """Returns the configuration as TOML, which `from_toml` reads again."""
        return to_toml(self)


def _drop_replaced(values: dict[str, Any], keys: tuple[str, ...]) -> None:
    """Drops what an override replaces, so that `subspace.rank=64` needs no second one.

    A measure of rank replaces another one and the budgets, and a budget the measures.
    """
    section, key = keys[:-1], keys[-1]
    if section == ("subspace",) and key in MEASURES + BUDGETS:
        for replaced in MEASURES + BUDGETS if key in MEASURES else MEASURES:
            if replaced != key:
                values["subspace"].pop(replaced, None)
