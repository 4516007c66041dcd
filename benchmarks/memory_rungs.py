"""The rows of `benchmarks/memory.py`: dense baselines, then the memory ladder rung by rung."""

from dataclasses import dataclass, field
from typing import Any

from step_plans import CLASSES, make_plan

from wasi_export.config import ActivationMode, MemoryConfig, ModelConfig, TrainConfig
from wasi_export.manifest import InputSpec
from wasi_export.training.memory import StepJob

SIZE = 224
STREAMED = {"level": "streamed"}


@dataclass(frozen=True)
class Rung:
    """A way to train."""

    name: str
    what: str
    memory: dict[str, Any] = field(default_factory=dict)
    factored: bool = True
    compressed: bool = False
    update: str = "factors"
    opt: str = "adamw"
    grad_checkpointing: bool = False


RUNGS = (
    Rung("dense", "plain torch: eager, AdamW, fp32", factored=False),
    Rung(
        "dense, checkpointing",
        "timm's `set_grad_checkpointing`, every block",
        factored=False,
        grad_checkpointing=True,
    ),
    Rung("dense, accumulation", "`micro_batch = 4`", {"micro_batch": 4}, factored=False),
    Rung(
        "dense, both",
        "`micro_batch = 4`, `block_recompute`",
        {"micro_batch": 4, "block_recompute": True},
        factored=False,
    ),
    Rung("dense, streamed", '`level = "streamed"` without factors', STREAMED, factored=False),
    Rung("factors", 'pairs in place of weights, `activation = "none"`'),
    Rung("compressed inputs", '`activation = "feature"`, ε = 0.95', compressed=True),
    Rung("MLP recompute", "and `mlp_recompute`", {"mlp_recompute": True}, compressed=True),
    Rung("fast", '`level = "fast"`: `mlp_recompute`, `micro_batch = 4`', {"level": "fast"}),
    Rung("small", '`level = "small"`: and `block_recompute`', {"level": "small"}),
    Rung("block recompute", "`block_recompute` alone", {"block_recompute": True}),
    Rung("chunks", "and `block_chunk = 4`", {"block_recompute": True, "block_chunk": 4}),
    Rung(
        "update in backward",
        "and `update_in_backward`",
        {"block_recompute": True, "block_chunk": 4, "update_in_backward": True},
    ),
    Rung("streamed", '`level = "streamed"`: and `boundary = "bf16"`', STREAMED),
    Rung("small, right", '`small`, `update = "right"`', {"level": "small"}, update="right"),
    Rung("streamed, right", '`streamed`, `update = "right"`', STREAMED, update="right"),
    Rung("streamed, lion", '`streamed`, `opt = "lion"`', STREAMED, opt="lion"),
    Rung(
        "streamed, adafactorbv",
        '`streamed`, `update = "right"`, `opt = "adafactorbv"` (one moment, in bf16)',
        STREAMED,
        update="right",
        opt="adafactorbv",
    ),
    Rung(
        "streamed, adafactor",
        '`streamed`, `update = "right"`, `opt = "adafactor"` (no first moment)',
        STREAMED,
        update="right",
        opt="adafactor",
    ),
)


def make_job(model: str, batch: int, fraction: float | None, rung: Rung, *, threads: int = 1) -> StepJob:
    """Returns the training steps of a rung at 224 px; `fraction` is of the factored layers' parameters."""
    assert (fraction is not None) == rung.factored
    mode: ActivationMode = "feature" if rung.compressed else "none"
    plan = None if fraction is None else make_plan(model, fraction, mode=mode, size=SIZE)
    values = {"opt": rung.opt, "update": rung.update, "memory": MemoryConfig.model_validate(rung.memory)}
    return StepJob(
        model=ModelConfig(name=model),
        train=TrainConfig.model_validate(values),
        input=InputSpec(height=SIZE, width=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        num_classes=CLASSES,
        plan=plan,
        batch_size=batch,
        threads=threads,
        grad_checkpointing=rung.grad_checkpointing,
    )
