"""A small model with factored layers, and its exported step in the session that a board runs it in."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from wasi_export.config import AdaptConfig
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.optimizers import Rates
from wasi_export.converters.training_step import ExportedStep, export_training_step
from wasi_export.manifest import BASES, PARAMETERS, STEP, UPDATE, InputSpec, TrainingGraph
from wasi_export.runtimes.training_session import TrainingSession
from wasi_export.subspace import SubspaceLinear
from wasi_export.subspace.tucker import Bases, follow
from wasi_export.subspace.update import WsiUpdate
from wasi_export.training.weight_gradients import clip_gradients

TOKENS, CLASSES, SIZE = 16, 5, 8
SPEC = InputSpec(height=SIZE, width=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3)


DIM, HIDDEN = 10, 14


class Block(nn.Module):
    """An MLP of two factored layers, the second without bias, beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM)
        self.fc1 = SubspaceLinear(DIM, HIDDEN, 4)
        self.fc2 = SubspaceLinear(HIDDEN, DIM, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm(x))))


class Factored(nn.Module):
    """Images [B, 3, 8, 8] as 16 patches of 2×2 → two blocks → classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, 2, stride=2)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        return self.head(torch.tanh(self.blocks(x)).mean(1))


LAYERS = tuple(f"blocks.{i}.{layer}" for i in (0, 1) for layer in ("fc1", "fc2"))
FACTORS = tuple(f"{layer}.{part}" for layer in LAYERS for part in ("left", "right"))
TRAINED = (*FACTORS, "blocks.0.fc1.bias", "blocks.1.norm.weight", "head.weight", "head.bias")


def make_model() -> Factored:
    torch.manual_seed(0)
    return Factored().eval()


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0].contiguous()


def bases_of(fc1: int, fc2: int, token: int | None = None) -> dict[str, Bases]:
    """Returns random bases of these ranks for the layers of `Factored`."""
    tokens = None if token is None else orthonormal(TOKENS, token, 1)
    return {
        name: Bases(orthonormal(DIM, fc1) if name.endswith("fc1") else orthonormal(HIDDEN, fc2), tokens)
        for name in LAYERS
    }


def batches(sizes: Sequence[int], seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 3, SIZE, SIZE, generator=generator),
            torch.randint(CLASSES, (n,), generator=generator),
        )
        for n in sizes
    ]


def write_step(exported: ExportedStep, settings: StepSettings, folder: Path) -> TrainingGraph:
    """Writes the files of a step into a folder, as a bundle has them; returns what the manifest says."""
    (folder / "train").mkdir(parents=True, exist_ok=True)
    (folder / STEP).write_bytes(exported.step.SerializeToString())
    if exported.update is not None:
        (folder / UPDATE).write_bytes(exported.update.SerializeToString())
    if exported.bases:
        save_file({name: exported.optimizer[name] for name in exported.bases}, folder / BASES)
    save_file(exported.parameters, folder / PARAMETERS)
    return TrainingGraph(
        settings=AdaptConfig(opt=settings.opt, recompute=settings.recompute, accumulate=settings.accumulate),
        parameters=tuple(exported.parameters),
        optimizer=tuple(exported.optimizer),
        bases=exported.bases,
        sums=exported.sums,
        frozen=(),
        model_parameters=0,
        parity_error=0.0,
    )


def open_step(
    model: nn.Module, settings: StepSettings, folder: Path, trained: Sequence[str] = TRAINED
) -> TrainingSession:
    """Returns the step of a model as a board runs it: state written over itself."""
    exported = export_training_step(model, SPEC, trained, settings)
    return TrainingSession.load(folder, write_step(exported, settings, folder))


class TorchSteps:
    """Steps with the layers and rules of training, in given bases that then follow the inputs."""

    def __init__(self, model: nn.Module, settings: StepSettings, *, lr: float, decay: float) -> None:
        """Takes a copy of a model, and the bases, rates and rules of settings."""
        self.model, self.bases = copy.deepcopy(model), dict(settings.bases)
        self.layers = {name: self.model.get_submodule(name) for name in self.bases}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self._give_bases(name))
            layer.feature_basis = self.bases[name].feature
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in TRAINED)
        groups = []
        for name in TRAINED:
            rates = settings.rates.get(name, Rates())
            groups.append(
                {"params": [parameters[name]], "lr": lr * rates.lr, "weight_decay": decay * rates.decay}
            )
        self.optimizer = torch.optim.AdamW(groups) if settings.opt == "adamw" else torch.optim.SGD(groups)
        if settings.wsi:
            WsiUpdate(self.layers, momentum=settings.momentum).attach(self.optimizer)

    def _give_bases(self, name: str) -> Callable[[SubspaceLinear, tuple[Tensor]], None]:
        def hook(layer: SubspaceLinear, inputs: tuple[Tensor]) -> None:
            layer.feature_basis, layer.token_basis = self.bases[name].feature, self.bases[name].token
            layer.passes = 1  # its own turn to move them is every eighth
            self.bases[name] = follow(inputs[0].detach(), self.bases[name])

        return hook

    def step(self, images: Tensor, labels: Tensor, clip: float) -> float:
        """Takes a step; returns the loss before it."""
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        clip_gradients(self.model, self.layers.values(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def relative(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """Returns the norm of what is wrong with a tensor over the norm of what it moved."""
    found, expected, start = (tensor.detach() for tensor in (found, expected, start))
    return float((found - expected).norm() / (expected - start).norm())
