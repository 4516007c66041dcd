"""What torch holds over one training step: a document that `run` writes and a page draws."""

from collections.abc import Mapping
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from wasi_export.settings import Frozen

Kind = Literal["parameters", "inputs", "optimizer", "gradients", "activations"]
"""Parameters and buffers, the batch, the optimiser's state and scratch, accumulated gradients, and saved
activations with the workspace of the operators."""


class Phase(Frozen):
    """One stretch of a step; a batch in parts has several of a name."""

    name: str = Field(description="forward, backward, clipping or update")
    begin_ms: float
    end_ms: float


class StepCurve(Frozen):
    """Bytes alive over one step, operator by operator; of many moments the highest in each stretch."""

    batch_size: int
    phases: tuple[Phase, ...]
    at_ms: tuple[float, ...] = Field(min_length=1, description="from the start of the step, ascending")
    held_bytes: Mapping[Kind, tuple[int, ...]] = Field(description="at each of these moments")

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        lengths = {kind: len(self.held_bytes.get(kind, ())) for kind in get_args(Kind)}
        if set(lengths.values()) != {len(self.at_ms)}:
            raise ValueError(f"held_bytes has not one number for each kind and moment: {lengths}")
        return self

    @property
    def total_bytes(self) -> tuple[int, ...]:
        """All kinds together, at each moment."""
        return tuple(map(sum, zip(*self.held_bytes.values(), strict=True)))
