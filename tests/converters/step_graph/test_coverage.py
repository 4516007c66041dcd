"""What is said of an operator that cannot be written: which, of which module, what can still be trained."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_steps import Scalars, labelled, make_random, run_both, spec_for

from wasi_export.converters.step_graph.coverage import UncoveredOperatorError
from wasi_export.converters.step_graph.function import StepSettings
from wasi_export.converters.step_graph.trainable import trainable_names
from wasi_export.converters.training_step import export_training_step
from wasi_export.errors import ConfigError, UnsupportedModelError


class Bent(torch.autograd.Function):
    """The identity, with a gradient that has no form in a training graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return torch.special.bessel_j0(dy)


class Mix(nn.Module):
    """A function of tokens with an own name in the model."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Block(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.mix, self.fc2 = nn.Linear(8, 8), Mix(function), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.mix(self.fc1(x)))


class Model(nn.Module):
    """Blocks over the columns of an image; the first and no other holds a function."""

    def __init__(self, function: Callable[[Tensor], Tensor], depth: int = 3, name: str = "blocks") -> None:
        super().__init__()
        self.stem = nn.Linear(3 * 8, 8)
        self.name = name
        setattr(self, name, nn.ModuleList(Block(function if i == 0 else torch.tanh) for i in range(depth)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.permute(0, 3, 1, 2).flatten(2))
        for block in getattr(self, self.name):
            x = block(x)
        return self.head(self.norm(x).mean(1))


def export(model: nn.Module, trainable: str = "all", recompute: str = "none") -> None:
    """Exports a step, and runs it against torch."""
    names, settings = trainable_names(model, trainable), StepSettings(opt="sgd", recompute=recompute)
    exported = export_training_step(model, spec_for(8), names, settings)
    apart = run_both(model, exported, settings, labelled((3, 2), (3, 8, 8), 5), Scalars(0.1))
    assert apart.parameter < 1e-6


def make(function: Callable[[Tensor], Tensor], **arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    return make_random(Model(function, **arguments))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_an_operator_of_a_gradient_is_named_with_its_module_and_what_can_be_trained(recompute: str) -> None:
    model = make(Bent.apply)
    with pytest.raises(UncoveredOperatorError) as raised:
        export(model, recompute=recompute)
    assert str(raised.value) == (
        "the gradient of blocks.0.mix needs aten.special_bessel_j0.default, which has no form in a training "
        "graph: train only what comes after it, which needs no gradient of it: --trainable blocks:2"
    )
    assert raised.value.operators == ("aten.special_bessel_j0.default",)
    export(model, "blocks:2", recompute)


def test_without_a_list_of_blocks_the_choice_is_by_names_and_works() -> None:
    model = make(Bent.apply, name="stages")
    with pytest.raises(UncoveredOperatorError) as raised:
        export(model)
    _, _, choice = str(raised.value).partition("--trainable ")
    assert choice == "stages.0.fc2.*,stages.1.*,stages.2.*,norm.*,head.*"
    export(model, choice)


def test_where_only_the_head_comes_after_it_the_head_is_named() -> None:
    model = make(Bent.apply, depth=1)
    with pytest.raises(UncoveredOperatorError, match=r"--trainable blocks\.0\.fc2\.\*,norm\.\*,head\.\*$"):
        export(model)
    export(model, "head")


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (torch.special.bessel_j0, "aten.special_bessel_j0.default"),
        (lambda x: torch.linalg.qr(x)[0] + x, "aten.linalg_qr.default"),
        (lambda x: x.sort(1).values, "aten.sort.default"),
        (
            lambda x: nn.functional.conv1d(x, torch.ones(8, 8, 1)),
            "aten.convolution.default: it has a form on images only",
        ),
    ],
)
def test_an_operator_of_the_forward_pass_has_no_cut_and_the_error_says_so(
    function: Callable[[Tensor], Tensor], operator: str
) -> None:
    model = make(function)
    with pytest.raises(UncoveredOperatorError) as raised:
        export(model, "head")
    message = str(raised.value)
    assert f"blocks.0.mix uses {operator}" in message
    assert "it is of the forward pass, so no choice of trainable parameters avoids it" in message
    assert "--trainable" not in message
    assert "\n" not in message


def test_a_use_of_an_operator_that_is_not_covered_has_its_reason() -> None:
    model = make(lambda x: x[:, torch.tensor([0, 1]), torch.tensor([1, 2])].sum() + x)
    with pytest.raises(
        UncoveredOperatorError,
        match=r"blocks\.0\.mix uses aten\.index\.Tensor: it has a form with one tensor of places, got 2",
    ):
        export(model)


def test_writing_into_memory_that_others_read_is_refused_and_not_wrong() -> None:
    def shift(x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] += 1
        return y

    with pytest.raises(
        UncoveredOperatorError, match=r"blocks\.0\.mix uses aten\.add_\.Tensor: .* same memory as"
    ):
        export(make(shift), "head")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x if x.sum() > 0 else -x, r"torch cannot trace a training step, in blocks\.0\.mix: "),
        (
            lambda x: x * (2 if x.shape[0] == 6 else 1),
            r"blocks\.0\.mix can be traced for one batch size only",
        ),
        (
            lambda x: x.reshape(x.shape[0] * 4, 2, -1)[: x.shape[0] + 1].sum() + x,
            "a size is batch \\+ 1, not a mult",
        ),
    ],
    ids=["control flow", "batch asked for", "cut along the batch"],
)
def test_what_cannot_be_traced_is_one_line_that_names_the_module(
    function: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        export(make(function))
    assert "\n" not in str(raised.value)


def test_a_parameter_that_the_outputs_do_not_depend_on_is_named() -> None:
    model = make(torch.tanh)
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"spare\.weight, spare\.bias cannot be trained"):
        export(model)


def test_a_model_is_as_it_was_after_an_export_that_failed() -> None:
    model = make(nn.ReLU(inplace=True))
    model.blocks[1].mix = Mix(lambda x: x.sort(1).values)
    with pytest.raises(UncoveredOperatorError):
        export(model)
    assert model.blocks[0].mix.function.inplace
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
