"""One step of training in torch and the same step as a graph in onnxruntime, to be compared."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.optimizers import MOMENTUM, Rates
from wasi_export.converters.training_step import ExportedStep
from wasi_export.manifest import InputSpec

Levels = ort.GraphOptimizationLevel
LEVELS = {
    "none": Levels.ORT_DISABLE_ALL,
    "basic": Levels.ORT_ENABLE_BASIC,
    "extended": Levels.ORT_ENABLE_EXTENDED,
    "all": Levels.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class Scalars:
    """What a step is told beside its data."""

    lr: float
    weight_decay: float = 0.0
    clip_norm: float = float("inf")


class EagerStep:
    """A step of torch: its modules, its losses, its optimisers and its clipping; nothing of ours."""

    def __init__(self, model: nn.Module, trainable: Sequence[str], settings: StepSettings) -> None:
        """Takes a copy of a model, in eval mode as the graph has it."""
        self.model, self.settings = copy.deepcopy(model).eval(), settings
        for module in self.model.modules():
            if hasattr(module, "attention_bias_cache"):
                module.train()  # in eval mode it takes its biases from the last call, and cannot train them
                for inner in module.children():
                    inner.eval()
        named = dict(self.model.named_parameters())
        for name, parameter in named.items():
            parameter.requires_grad_(name in trainable)
        self.parameters = {name: named[name] for name in trainable}
        groups = [{"params": [parameter]} for parameter in self.parameters.values()]
        if settings.opt == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups)
        else:
            momentum = MOMENTUM if settings.opt == "momentum" else 0.0
            self.optimizer = torch.optim.SGD(groups, momentum=momentum)

    def step(self, images: Tensor, targets: Tensor, scalars: Scalars) -> tuple[float, int, float]:
        """Takes a step; returns the loss, how many were right, and the norm of the gradient."""
        for group, name in zip(self.optimizer.param_groups, self.parameters, strict=True):
            rates = self.settings.rates.get(name, Rates())
            group["lr"] = scalars.lr * rates.lr
            group["weight_decay"] = scalars.weight_decay * rates.decay
        self.optimizer.zero_grad()
        outputs = self.model(images)
        if self.settings.loss == "mse":
            loss = F.mse_loss(outputs, targets)
        else:
            loss = F.cross_entropy(outputs, targets, label_smoothing=self.settings.smoothing)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), scalars.clip_norm)
        self.optimizer.step()
        labels = targets if targets.ndim == 1 else targets.argmax(1)
        return loss.item(), int((outputs.argmax(1) == labels).sum()), norm.item()


class GraphStep:
    """The exported step; its state goes from the outputs of a run to the inputs of the next."""

    def __init__(self, exported: ExportedStep, *, level: str = "none") -> None:
        """Loads the graph at an optimisation level of onnxruntime."""
        options = ort.SessionOptions()
        options.graph_optimization_level = LEVELS[level]
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(exported.step.SerializeToString(), options)
        self.state = {**exported.parameters, **exported.optimizer}
        self.images = self.session.get_inputs()[0].name

    def step(self, images: Tensor, targets: Tensor, scalars: Scalars) -> tuple[float, int, float]:
        """Takes a step; returns the loss, how many were right, and the norm of the gradient."""
        numbers = {name: np.array(value, np.float32) for name, value in vars(scalars).items()}
        data = {self.images: images.numpy(), "targets": targets.numpy()}
        loss, correct, norm, *state = self.session.run(None, data | numbers | self.state)
        self.state = dict(zip(self.state, state, strict=True))
        return float(loss), int(correct), float(norm)


@dataclass(frozen=True)
class Difference:
    """How far two ways of taking the same steps came apart."""

    loss: float
    """Largest of any step."""
    parameter: float
    """Largest of any number of any parameter, after the last step."""
    update: float
    """Norm of the difference of all parameters over that of what they moved."""
    moved: float
    """Largest change of any number of any parameter."""


def run_both(
    model: nn.Module,
    exported: ExportedStep,
    settings: StepSettings,
    batches: Sequence[tuple[Tensor, Tensor]],
    scalars: Scalars,
    *,
    level: str = "none",
) -> Difference:
    """Takes the same steps in torch and in onnxruntime; every count of right answers must be the same."""
    eager, graph = EagerStep(model, tuple(exported.parameters), settings), GraphStep(exported, level=level)
    losses = []
    for images, targets in batches:
        loss, correct, norm = eager.step(images, targets, scalars)
        found = graph.step(images, targets, scalars)
        losses.append(abs(found[0] - loss))
        assert found[1] == correct
        assert abs(found[2] - norm) < 1e-4 * norm, (found[2], norm)
    start, end = _flat(exported.parameters, exported.parameters), _flat(exported.parameters, graph.state)
    torch_end = _flat(exported.parameters, {n: p.detach().numpy() for n, p in eager.parameters.items()})
    apart = np.abs(end - torch_end)
    moved = np.linalg.norm(torch_end - start)
    return Difference(
        max(losses),
        float(apart.max()),
        float(np.linalg.norm(apart) / moved),
        float(np.abs(torch_end - start).max()),
    )


def _flat(names: Sequence[str], tensors: dict[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.concatenate([tensors[name].ravel() for name in names]).astype(np.float64)


def make_random(model: nn.Module) -> nn.Module:
    """Returns the model, changed in place: in eval mode, with random values that all show in the output."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if key.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 1:
                shift = 0.5 if key.endswith("weight") else -0.15
                tensor.copy_(shift + 0.3 * torch.rand(tensor.shape, generator=generator))
            elif not tensor.any():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def labelled(sizes: Sequence[int], image: Sequence[int], classes: int) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of random images and labels."""
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, *image, generator=generator), torch.randint(classes, (size,), generator=generator))
        for size in sizes
    ]


def spec_for(size: int) -> InputSpec:
    return InputSpec(height=size, width=size, mean=(0.5,) * 3, std=(0.5,) * 3)


def node_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]
