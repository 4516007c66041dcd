"""LoRA: training a low-rank change of frozen weights, to be added to them when it is done.

    y = W·x + 2·left·(right·x)        W frozen, left = 0 at first

Gradients and optimiser state are those of K(O+I) numbers in place of O·I. Unlike a `SubspaceLinear`, whose
factors are the weight, this holds the weight whole; it is how a model gets to know its task before its
layers are factored.

Source: arXiv 2106.09685. Start of `right` and the 2 (α = 2K) as in peft and its examples.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SCALE = 2.0


class LoraLayer(nn.Module):
    """A Linear layer or 1×1 convolution that is frozen, and a change of its weight that is trained."""

    def __init__(self, base: nn.Linear | nn.Conv2d, rank: int) -> None:
        """Puts `left` (O×K) and `right` (K×I) beside a layer, and freezes it in place."""
        super().__init__()
        self.base = base.requires_grad_(False)
        out_features, in_features = base.weight.shape[:2]
        rank = min(rank, out_features, in_features)
        self.left = nn.Parameter(base.weight.new_zeros(out_features, rank))
        self.right = nn.Parameter(base.weight.new_empty(rank, in_features))
        nn.init.kaiming_uniform_(self.right, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Returns the output of the changed layer."""
        if isinstance(self.base, nn.Linear):
            change = F.linear(F.linear(x, self.right), self.left)
        else:
            code = F.conv2d(x, self.right[:, :, None, None], stride=self.base.stride)
            change = F.conv2d(code, self.left[:, :, None, None])
        y: Tensor = self.base(x) + SCALE * change
        return y


def add_lora(model: nn.Module, names: Iterable[str], rank: int, *, trained: Iterable[nn.Module] = ()) -> None:
    """Freezes a model and puts changes beside some of its layers, in place; it computes the same.

    Args:
        model: that has the layers.
        names: of Linear layers and 1×1 convolutions (`kinds.py`).
        rank: K, or the largest below O and I.
        trained: modules of it that are not frozen.
    """
    model.requires_grad_(False)
    for name in names:
        base = model.get_submodule(name)
        assert isinstance(base, (nn.Linear, nn.Conv2d))
        model.set_submodule(name, LoraLayer(base, rank).train(base.training))
    for module in trained:
        module.requires_grad_()


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds the changes to the weights and takes them away, in place; the same function, still frozen."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        weight = layer.base.weight
        weight.add_((SCALE * layer.left @ layer.right).view_as(weight))
        model.set_submodule(name, layer.base)
