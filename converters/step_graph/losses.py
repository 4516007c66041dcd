"""The loss of a step, and how many of its images are right.

cross_entropy   -Σ_c t_c·log p_c, mean over the batch; t = (1-s)·onehot(label) + s/C, s the label smoothing
soft_targets    the same with t given, [B, C]
mse             mean over batch and outputs of (output - target)², target [B, C]
"""

from typing import Literal

import torch
from torch import Tensor

LossName = Literal["cross_entropy", "soft_targets", "mse"]


def example_targets(name: LossName, batch: int, classes: int) -> Tensor:
    """Returns targets of the type and shape that the loss takes."""
    if name == "cross_entropy":
        return torch.zeros(batch, dtype=torch.int64)
    return torch.zeros(batch, classes)


def loss_and_correct(
    name: LossName, outputs: Tensor, targets: Tensor, *, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Returns the mean loss of outputs [B, C], and the number of them with the largest at the target's."""
    best = outputs.detach().argmax(1)
    if name == "mse":
        correct = (best == targets.argmax(1)).sum()
        return ((outputs - targets) ** 2).mean(), correct
    if name == "cross_entropy":
        classes = outputs.shape[1]
        correct = (best == targets).sum()
        onehot = (targets[:, None] == torch.arange(classes, device=targets.device)).to(outputs.dtype)
        targets = onehot * (1 - smoothing) + smoothing / classes if smoothing else onehot
    else:
        correct = (best == targets.argmax(1)).sum()
    return -(targets * outputs.log_softmax(1)).sum(1).mean(0), correct
