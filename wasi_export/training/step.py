"""One step of training, as the loop takes it and as its memory is measured."""

import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.data import Mixup
from torch import nn

from wasi_export.config import TrainConfig
from wasi_export.errors import ConfigError, ModelFailedError
from wasi_export.subspace import subspace_layers
from wasi_export.training.data import random_numbers
from wasi_export.training.profile import Phases, unmeasured
from wasi_export.training.weight_gradients import average_over_processes, clip_gradients


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
        phase: Phases = unmeasured,
    ) -> None:
        """Makes the step of a model and an optimiser that the accelerator has prepared; `phase` times it.

        Sets, in place, whether factored layers share their bases with other processes.

        Raises:
            ConfigError: the update rule cannot be had with mixed precision fp16.
        """
        self.phase = phase
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.config, self.seed = config, seed
        layers = tuple(layer for _, layer in subspace_layers(accelerator.unwrap_model(model)))
        for layer in layers:
            layer.share_bases = accelerator.num_processes > 1
        self.collecting = layers if config.update == "wsi" else ()
        if self.collecting and accelerator.mixed_precision == "fp16":
            raise ConfigError(
                'update = "wsi" would use the scaled gradients of mixed precision fp16: use bf16, or another '
                "update"
            )
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
            value = 0.0
            size = self.config.memory.micro_batch or len(images)
            parts = zip(torch.split(images, size), torch.split(labels, size), strict=True)
            for part, targets in parts:
                value += self._add_gradients(part, targets, smoothing, step, share=len(part) / len(images))
            average_over_processes(self.accelerator, self.collecting)
            if self.config.clip_grad is not None:
                with self.phase("clipping"):
                    self._clip(self.config.clip_grad)
            with self.phase("update"):
                self.optimizer.step()
                self.optimizer.zero_grad()  # here, so that no gradient is held through the next forward pass
        return value

    def _add_gradients(
        self, images: torch.Tensor, labels: torch.Tensor, smoothing: float, step: int, *, share: float
    ) -> float:
        """Adds up the gradients of a share of a batch, in place; returns what the share adds to the loss."""
        with self.phase("forward"):
            loss = share * F.cross_entropy(self.model(images), labels, label_smoothing=smoothing)
            value: float = self.accelerator.reduce(loss.detach(), "mean").item()  # of all processes
        if not math.isfinite(value):
            raise ModelFailedError(f"the training loss is {value} at step {step}: lower the learning rate")
        with self.phase("backward"):
            self.accelerator.backward(loss)
        return value

    def _clip(self, max_norm: float) -> None:
        if self.collecting:
            clip_gradients(self.model, self.collecting, max_norm)
        else:
            self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)
