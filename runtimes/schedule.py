"""The learning rate of a step: that of training (timm's schedules), without timm.

    warm-up     lr·(s + 1)/(w + 1) for the first w steps
    cosine      lr·(1 + cos(π·s/S))/2 over S steps, from 0, the warm-up laid over its start
    constant    lr

Source: timm `CosineLRScheduler`, one cycle, no minimum.
"""

import math
from typing import Literal

ScheduleName = Literal["cosine", "constant"]


def learning_rate(name: ScheduleName, step: int, *, lr: float, steps: int, warmup: int) -> float:
    """Returns the rate of a step, counted from 0.

    Args:
        name: of the schedule.
        step: from 0.
        lr: the highest rate.
        steps: S, of the whole training.
        warmup: w; at most half of all steps are taken for it.
    """
    warmup = min(warmup, steps // 2)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if name == "constant":
        return lr
    return 0.5 * lr * (1 + math.cos(math.pi * min(step, steps) / steps)) if steps else lr
