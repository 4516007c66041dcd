"""Levers on the accuracy that the pipeline does not have: each takes the place of its second half.

    nothing           the pipeline's own second half, by this loop
    distill_logits    half of each target is what the dense model answers
    distill_features  the features of the dense model are to be met as well, token by token
    distill_first     no LoRA: without labels, the features of the pretrained model are met; then labels alone
    shrink            factored at 2.5 times the final f, and again at less as training goes on
    sparse            a quarter of the parameters go to single entries of W - left·right

The dense model is the one that is factored, as the first half left it. The indices of sparse entries are not
counted, which is in their favour.

Source: soft targets, arXiv 1503.02531; features, arXiv 1412.6550; low rank and sparse, arXiv 2306.11222.
"""

import copy
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_rows import Lever

from wasi_export.cli._console import track
from wasi_export.config import Config
from wasi_export.datasets import load_data
from wasi_export.image_set import ImageSet
from wasi_export.subspace import SubspaceLinear, subspace_layers
from wasi_export.subspace.inject import fold_layers
from wasi_export.training.beginning import first_model
from wasi_export.training.data import Batch, make_loader
from wasi_export.training.first_part import first_part
from wasi_export.training.loop import fit
from wasi_export.training.lora import lora_layers, one_input
from wasi_export.training.models import input_spec
from wasi_export.training.optim import create_optimizer, create_scheduler
from wasi_export.training.planning import factorize

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Of a model on images (B, C, H, W) and labels (B)."""

SHRINK = ((0.0, 2.5), (0.15, 1.75), (0.3, 1.25), (0.45, 1.0))
"""From which share of the second half on, how many times the final f."""
SPARSE_SHARE = 0.25


def train_lever(lever: Lever, config: Config, folder: Path) -> tuple[nn.Module, float]:
    """Returns the model that a lever gives, and its mean training loss over the last epoch.

    The first half is the pipeline's; it is kept in `folder`, since it is the same for all.
    """
    train, _ = load_data(config.data)
    model = first_model(config, train.classes)
    if lever != "distill_first":
        _first_half(model, config, train, folder / f"first-half-{config.seed}.safetensors")
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    loop = _Loop(model, config, train)
    half = range(loop.steps // 2, loop.steps)
    if lever == "shrink":
        return model, _shrink(loop, half)
    share = SPARSE_SHARE if lever == "sparse" else 0.0
    loop.factor(share_of_f=1 - share)
    loss: Loss = label_loss
    match lever:
        case "sparse":
            images = next(iter(_loader(model, config, train, training=False)))[0]
            add_sparse(model, dense, images, share=share / (1 - share))
        case "distill_first":
            loop.run(range(half.start), feature_loss(dense))
        case "distill_logits":
            loss = soft_loss(dense)
        case "distill_features":
            loss = labels_and(feature_loss(dense))
    return model, loop.run(half, loss)


def _shrink(loop: "_Loop", half: range) -> float:
    """Factors at ranks that fall step by step, training in between, in place; returns the mean loss."""
    starts = [half.start + int(share * len(half)) for share, _ in SHRINK]
    losses = []
    for (_, ratio), start, stop in zip(SHRINK, starts, [*starts[1:], half.stop], strict=True):
        loop.factor(share_of_f=ratio)
        losses.append(loop.run(range(start, stop), label_loss, warmup_steps=5) * (stop - start))
    return sum(losses) / len(half)


def label_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Returns the cross-entropy."""
    return F.cross_entropy(model(images), labels)


def soft_loss(dense: nn.Module) -> Loss:
    """Returns the cross-entropy to targets of which half are the label, half what the dense model says."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            answer = dense(images).softmax(1)
        return F.cross_entropy(model(images), (F.one_hot(labels, answer.shape[1]) + answer) / 2)

    return loss


def feature_loss(dense: nn.Module) -> Loss:
    """Returns the squared error of all tokens' features over the energy of the dense model's."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = dense.forward_features(images)  # type: ignore[operator]
        found = model.forward_features(images)  # type: ignore[operator]
        return F.mse_loss(found, wanted) / wanted.square().mean()

    return loss


def labels_and(other: Loss) -> Loss:
    """Returns the cross-entropy and another loss, added."""
    return lambda model, images, labels: label_loss(model, images, labels) + other(model, images, labels)


class SparseBeside(nn.Module):
    """A pair of factors, and single entries of the weight beside it."""

    def __init__(self, pair: SubspaceLinear, index: Tensor, values: Tensor) -> None:
        """Takes flat indices into the weight (O×I) and the values there."""
        super().__init__()
        self.pair, self.values = pair, nn.Parameter(values)
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of both."""
        size = (self.pair.out_features, self.pair.in_features)
        weight = self.values.new_zeros(size[0] * size[1]).scatter(0, cast(Tensor, self.index), self.values)
        y: Tensor = self.pair(x) + F.linear(x, weight.view(size))
        return y


@torch.no_grad()
def add_sparse(model: nn.Module, dense: nn.Module, images: Tensor, *, share: float) -> None:
    """Puts entries of W - left·right beside each pair, in place: those that matter most to the output.

    Args:
        model: factored.
        dense: the model before.
        images: of which the second moments of the inputs are taken.
        share: number of entries over the parameters of the factors.
    """
    energies: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: energies.update({name: args[0].square().flatten(0, -2).mean(0)})
        )
        for name, layer in subspace_layers(model)
    ]
    was_training = model.training
    model.eval()(images)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    for name, layer in list(subspace_layers(model)):
        weight = cast(nn.Linear, dense.get_submodule(name)).weight
        rest = weight - layer.left @ layer.right
        count = int(share * (layer.left.numel() + layer.right.numel()))
        index = (rest.square() * energies[name]).flatten().topk(count).indices
        model.set_submodule(name, SparseBeside(layer, index, rest.flatten()[index].clone()))


class _Loop:
    """Steps of training, from any on to any other; each run of them has an optimiser of its own."""

    def __init__(self, model: nn.Module, config: Config, train: ImageSet) -> None:
        self.model, self.config, self.train = model, config, train
        self.loader = _loader(model, config, train)
        self.steps = len(self.loader) * config.train.subspace.epochs

    def factor(self, *, share_of_f: float) -> None:
        """Factors the model by the pipeline's recipe, in place, also where it is factored already."""
        fold_layers(self.model, [name for name, _ in subspace_layers(self.model)])
        fraction = share_of_f * cast(float, self.config.subspace.fraction)
        subspace = self.config.subspace.model_copy(update={"fraction": fraction})
        config = self.config.model_copy(update={"subspace": subspace})
        factorize(config, self.model, self.train, track=track)

    def run(self, steps: range, loss: Loss, **settings: object) -> float:
        """Trains, in place; returns the mean loss."""
        config = self.config.train.subspace.model_copy(update=settings)
        optimizer = create_optimizer(self.model.train(), config)
        scheduler = create_scheduler(optimizer, config, self.steps, start=steps.start)
        total = 0.0
        batches = track(islice(self._batches(steps), len(steps)), "train", len(steps))
        for step, (images, labels) in zip(steps, batches, strict=True):
            scheduler.step_update(step)
            value = loss(self.model, images, labels)
            value.backward()
            if config.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            total += value.item()
        return total / len(steps)

    def _batches(self, steps: range) -> Iterator[Batch]:
        """Yields the batches of these steps, as the pipeline's loop draws them."""
        length = len(self.loader)
        for epoch in range(steps.start // length, -(-steps.stop // length)):
            first = max(steps.start - epoch * length, 0)
            self.loader.batch_sampler.go_to(epoch, first)  # type: ignore[union-attr]
            yield from self.loader


def _first_half(model: nn.Module, config: Config, train: ImageSet, path: Path) -> None:
    """Trains the first half as the pipeline does, in place, or takes it from the file."""
    if not path.exists():
        first = first_part(config, goes_on=False)
        spec = input_spec(model, config)
        val_loader = make_loader(train.take(range(1)), spec, config.data, training=False)
        with lora_layers(model, config.subspace, one_input(config, model, train), seed=config.seed):
            fit(
                model, _loader(model, config, train), val_loader, first.train, None,
                seed=config.seed, epochs=range(first.epochs), track=track,
            )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))


def _loader(
    model: nn.Module, config: Config, train: ImageSet, *, training: bool = True
) -> torch.utils.data.DataLoader[Batch]:
    return make_loader(train, input_spec(model, config), config.data, training=training, seed=config.seed)
