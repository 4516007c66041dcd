"""A model that was looked at is as it was."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from wasi_export.subspace.observe import observed


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))


@pytest.mark.parametrize("training", [True, False])
def test_hooks_see_a_model_in_evaluation_mode_and_are_gone_afterwards(training: bool) -> None:
    model, modes = make().train(training), []
    with observed(model, [model[0].register_forward_hook(lambda m, x, y: modes.append(model.training))]):
        model(torch.zeros(1, 2))
    model(torch.zeros(1, 2))
    assert modes == [False]
    assert model.training == model[1].training == training


def test_a_model_that_fails_is_as_it_was() -> None:
    model = make().train()
    with pytest.raises(RuntimeError), observed(model, [model[0].register_forward_hook(lambda m, x, y: None)]):
        model(torch.zeros(1, 3))
    assert model.training
    assert not model[0]._forward_hooks


def test_a_hook_that_cannot_be_registered_leaves_none_behind() -> None:
    model = make().train()

    def hooks() -> Iterator[RemovableHandle]:
        yield model[0].register_forward_hook(lambda m, x, y: None)
        raise RuntimeError("no such layer")

    with pytest.raises(RuntimeError, match="no such layer"), observed(model, hooks()):
        pass
    assert model.training
    assert not model[0]._forward_hooks
