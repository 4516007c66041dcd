"""The rows of `benchmarks/training.py`: ways to fine-tune, each by the recipe that suits it.

This is the one place of their settings; what is not named here is the default of `wasi_export/config.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from wasi_export.config import Config, TrainMethod

Adapter = Literal["asi", "lora", "lora_left", "lora_right"]
"""What makes a model that of another method, see `training_adapters.py`."""
Lever = Literal["nothing", "distill_logits", "distill_features", "distill_first", "shrink", "sparse"]
"""What stands in for the second half of a training, see `training_levers.py`."""
Settings = Mapping[str, Any]

IMAGES, WATCHED, EPOCHS = 3200, 200, 2
"""Images to train on, test images that are evaluated while training, epochs."""
STAGE: Settings = {"epochs": EPOCHS, "lr": 3e-5, "head_lr": 2e-3}
"""Of every row: what dense fine-tuning did best with, of rates a factor of 3 apart."""

FROM_START: Settings = {"dense_epochs": 0}
FULL: Settings = {"dense_method": "full"}
ALONE: Settings = {**FROM_START, "sensitivity": "none"}
PLAIN: Settings = {**ALONE, "method": "plain"}
TUCKER: Settings = {"activation": "feature+token"}
WHOLE: Settings = {"activation": "none"}
PAPER: Settings = {"update": "wsi", "factor_lr": 0.05, "momentum": 0.0}
"""The paper's rule, rate and momentum, for the factors. All else is trained by AdamW, as in all rows."""


@dataclass(frozen=True)
class Row:
    """A way to fine-tune."""

    what: str
    subspace: Settings | None = None
    """Of the configuration; None: no layer is factored."""
    train: Settings = field(default_factory=dict)
    """Of the stage, over `STAGE`."""
    adapters: tuple[Adapter, ...] = ()
    """Models of other methods, each for an equal part of the epochs; empty: the pipeline's own training."""
    lever: Lever | None = None
    lora_rank: int = 0
    grad_checkpointing: bool = False
    trained_as: str | None = None
    """The row with which the losses agree to the bit, so that it is not trained again."""

    @property
    def method(self) -> TrainMethod:
        """The stage of the pipeline."""
        return "dense" if self.subspace is None else "subspace"

    @property
    def factored(self) -> bool:
        """Whether layers become pairs of factors."""
        return self.subspace is not None and self.adapters != ("asi",)

    @property
    def first_lora(self) -> bool:
        """Whether the first half of the epochs is LoRA."""
        return self.factored and "dense_epochs" not in (self.subspace or {})

    @property
    def settings(self) -> dict[str, Any]:
        """What a run of the row follows from."""
        subspace = None if self.subspace is None else dict(self.subspace)
        found = {"subspace": subspace, "train": {**STAGE, **self.train}}
        adapters = {"adapters": list(self.adapters)} if self.adapters else {}
        return found | adapters | ({"lever": self.lever} if self.lever else {})


METHODS: Mapping[str, Row] = {
    "dense": Row("all weights, AdamW"),
    "checkpointing": Row(
        "dense, timm's `set_grad_checkpointing`", grad_checkpointing=True, trained_as="dense"
    ),
    "lora": Row("LoRA of rank 16 by peft", adapters=("lora",), lora_rank=16, train={"lr": 1e-3}),
    "asi": Row(
        "ASI: dense weights, compressed inputs", {**PLAIN, **TUCKER, "fraction": 0.4}, adapters=("asi",)
    ),
    "wsi": Row("WSI: plain SVD, f = 0.4, inputs whole", {**PLAIN, **WHOLE, "fraction": 0.4}),
    "wasi": Row("WASI by the paper's rule: plain SVD, f = 0.4", {**PLAIN, **TUCKER, "fraction": 0.4}, PAPER),
    "plain-0.8": Row("plain SVD, f = 0.8, by AdamW", {**PLAIN, **TUCKER, "fraction": 0.8}),
    "svd-llm": Row(
        "as SVD-LLM: whitened, f = 0.4, LoRA of rank 8 on `left`, then on `right`",
        {**ALONE, **WHOLE, "method": "whitened", "fraction": 0.4},
        {"lr": 1e-3},
        adapters=("lora_left", "lora_right"),
        lora_rank=8,
    ),
    "ours-0.4": Row("ours, f = 0.4", {"fraction": 0.4}),
    "ours-0.2": Row("ours, f = 0.2", {"fraction": 0.2}),
    "ours-small": Row(
        'ours, f = 0.4, `memory.level = "small"`',
        {**WHOLE, "fraction": 0.4},
        {"memory": {"level": "small"}},
    ),
    "ours-from-start": Row(
        'ours, f = 0.4, `memory.level = "small"`, factored from the start',
        {**FROM_START, **WHOLE, "sensitivity": "features", "fraction": 0.4},
        {"memory": {"level": "small"}},
    ),
}
"""Methods beside one another: docs/training.md."""

FRACTIONS = (0.4, 0.2)
PARTS: Mapping[str, tuple[str, Settings]] = {
    "plain": ("plain SVD", PLAIN),
    "whitened": ("whitened, each layer alone", {**ALONE, "method": "whitened"}),
    "sequential": ("fitted in sequence", ALONE),
    "sequential-features": (
        "fitted in sequence, weighted by the gradients of the features",
        {**FROM_START, "sensitivity": "features"},
    ),
    "full-whitened": (
        "first half of all weights, whitened",
        {**FULL, "method": "whitened", "sensitivity": "none"},
    ),
    "full-sequential": ("first half of all weights, fitted in sequence", {**FULL, "sensitivity": "none"}),
    "full-output": ("first half of all weights, fitted and weighted by the output", FULL),
    "lora-plain": ("first half LoRA, plain SVD", {"method": "plain", "sensitivity": "none"}),
    "ours": ("first half LoRA, fitted and weighted by the output (default)", {}),
    "ours-allocated": ("the default, and ranks by the output error", {"allocation": "output_error"}),
    "ours-whole": ("the default, and saved inputs whole", WHOLE),
}
"""One part of the recipe after the other: docs/accuracy.md."""

LEVERS: Mapping[str, Row] = {
    "distill-logits-0.2": Row(
        "half of the target from the dense model", {"fraction": 0.2}, lever="distill_logits"
    ),
    "distill-features-0.2": Row(
        "features of the dense model as well", {"fraction": 0.2}, lever="distill_features"
    ),
    "distill-first-0.2": Row(
        "no LoRA: features of the pretrained model without labels, then labels",
        {**FROM_START, "sensitivity": "features", "fraction": 0.2},
        lever="distill_first",
    ),
    "shrink-0.2": Row("ranks that fall from 2.5 times as many", {"fraction": 0.2}, lever="shrink"),
    "sparse-0.2": Row("a quarter of the parameters in single entries", {"fraction": 0.2}, lever="sparse"),
}
"""What the recipe does not have, in the place of its second half: docs/accuracy.md."""

ROWS: Mapping[str, Row] = {
    **{
        f"{name}-{fraction:g}": Row(what, {**settings, "fraction": fraction})
        for fraction in FRACTIONS
        for name, (what, settings) in PARTS.items()
    },
    **LEVERS,
    **METHODS,
}


def config_of(row: Row, checkpoint: Path, *, model: str, seed: int) -> Config:
    """Returns the configuration of a row; rows differ in `subspace` and in the training stage alone."""
    return Config.from_mapping(
        {
            "name": "training",
            "seed": seed,
            "model": {"name": model, "checkpoint": checkpoint, "img_size": 98},
            "data": {
                "source": "fashion-mnist", "train_images": IMAGES, "val_images": WATCHED,
                "augment": False, "crop_pct": 1.0,
            },
            "subspace": dict(row.subspace or {}),
            "train": {row.method: {**STAGE, **row.train}},
        }
    )  # fmt: skip
