"""Sums over the parts of a batch, so that N of them make the update that their union would make.

The loss of n images is a mean, so that n·g adds up to the gradient of all n₁ + n₂ + … images, times their
number: parts may be of any sizes. A moment of an input is a sum over rows already. The norm that is clipped
is that of the whole gradient.

    a' = a + n·g      g = a / Σ n
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IMAGES, LOSS, CORRECT = "images.sum", "loss.sum", "correct.sum"


@dataclass(frozen=True)
class Found:
    """What a backward pass gives."""

    loss: Tensor
    correct: Tensor
    gradients: dict[str, Tensor]
    """By parameter. The factors of a layer under `wsi` have one: `<layer>.weight`, its coefficients."""
    moments: dict[str, Tensor]
    """By basis."""


@dataclass(frozen=True)
class Sums:
    """What is added up: gradients and moments, by name, and how they look."""

    gradients_like: Mapping[str, Tensor]
    moments_like: Mapping[str, Tensor]

    @cached_property
    def initial(self) -> dict[str, Tensor]:
        """The sums of no images, by the names of the state."""
        like = {**self.gradients_like, **self.moments_like}
        numbers = {name: torch.zeros(()) for name in (IMAGES, LOSS, CORRECT)}
        return numbers | {_of(name): torch.zeros_like(tensor) for name, tensor in like.items()}

    def add(self, sums: Mapping[str, Tensor], images: int, found: Found) -> dict[str, Tensor]:
        """Returns the sums with one more part, whose loss and gradients are sums over its images."""
        parts = {_of(name): tensor for name, tensor in (found.gradients | found.moments).items()}
        numbers: dict[str, Any] = {IMAGES: images, LOSS: found.loss, CORRECT: found.correct}
        return {name: sums[name] + part for name, part in (numbers | parts).items()}

    def summary(self, sums: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns the mean loss and the number of right answers of all images so far."""
        return [sums[LOSS] / sums[IMAGES], sums[CORRECT].to(torch.int64)]

    def gradients(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the mean gradients."""
        share = 1 / sums[IMAGES]
        return {name: sums[_of(name)] * share for name in self.gradients_like}

    def moments(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the moments."""
        return {name: sums[_of(name)] for name in self.moments_like}


def _of(name: str) -> str:
    return f"{name}.sum"
