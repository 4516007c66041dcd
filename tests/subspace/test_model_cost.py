"""What a model costs, against counts by hand."""

import timm
import torch
from torch import nn

from wasi_export.subspace.kinds import LinearKind
from wasi_export.subspace.model_cost import measure_model_cost


class Shared(nn.Module):
    """A convolution, a Linear that is run twice and one that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.fc = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc(self.fc(tokens)).mean(1)


def test_macs_parameters_and_rows_are_those_of_one_image() -> None:
    model = Shared().train()
    cost = measure_model_cost(
        model, {"fc": LinearKind(model.fc), "unused": LinearKind(model.unused)}, torch.zeros(1, 3, 8, 8)
    )
    assert cost.tokens == {"fc": 32}
    assert cost.parameters == (8 * 3 * 4 + 8) + 2 * (64 + 8)
    assert cost.macs == 16 * 8 * 12 + 2 * 16 * 64
    assert model.training


def test_the_rest_is_without_the_weights_of_the_layers() -> None:
    model = Shared()
    cost = measure_model_cost(model, {"fc": LinearKind(model.fc)}, torch.zeros(1, 3, 8, 8))
    rest = cost.rest({"fc": 64})
    assert rest.parameters == cost.parameters - 64
    assert rest.macs == 16 * 8 * 12


def test_attention_counts_whichever_kernel_computes_it() -> None:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=64, num_heads=2, num_classes=10
    )
    cost = measure_model_cost(model, {}, torch.zeros(1, 3, 32, 32))
    patches, tokens, width = 16, 17, 64
    block = tokens * width * (3 * width + width + 4 * width + 4 * width) + 2 * tokens * tokens * width
    assert cost.macs == patches * 3 * 64 * width + 2 * block + width * 10


class ClassToken(nn.Module):
    """Gives a layer a parameter as its input."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.fc = nn.Parameter(torch.ones(1, 1, 8)), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.fc(self.token) + x.sum()
        return y


def test_a_parameter_may_be_the_input_of_a_layer() -> None:
    model = ClassToken()
    cost = measure_model_cost(model, {"fc": LinearKind(model.fc)}, torch.zeros(1, 3, 8, 8))
    assert (cost.macs, cost.tokens) == (32, {"fc": 1})
