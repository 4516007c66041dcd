"""One step of training, as the loop takes it and as its memory is measured."""

import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import nn

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError, ModelFailedError
from wasi_export.training.data import random_numbers


class TrainingStep:
    """Forward, backward, clipping and update; what is random in it follows from seed, step and process."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        seed: int,
    ) -> None:
        """Makes the step of a model and an optimiser that the accelerator has prepared."""
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.config, self.seed = config, seed
        self.mixup = None
        if config.mixup or config.cutmix:
            self.mixup = Mixup(
                config.mixup,
                config.cutmix,
                label_smoothing=config.smoothing,
                num_classes=accelerator.unwrap_model(model).num_classes,
            )

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, step: int) -> float:
        """Takes one step on images [B, C, H, W] and labels [B]; returns the loss before it.

        Raises:
            ConfigError: mixup with an odd number of images.
            ModelFailedError: the loss is not finite.
        """
        smoothing = self.config.smoothing
        with random_numbers(self.seed, step, self.accelerator.process_index):
            if self.mixup is not None:
                if len(images) % 2:
                    raise ConfigError(f"mixup pairs images: data.batch_size must be even, got {len(images)}")
                images, labels = self.mixup(images, labels)  # smooths the labels as well
                smoothing = 0.0
            loss = F.cross_entropy(self.model(images), labels, label_smoothing=smoothing)
            value = loss.item()
            if not math.isfinite(value):
                raise ModelFailedError(
                    f"the training loss is {value} at step {step}: lower the learning rate"
                )
            self.accelerator.backward(loss)
            if self.config.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()  # here, so that no gradient is held through the next forward pass
        return value
