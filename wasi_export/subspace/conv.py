"""`SubspaceConv1x1`: a 1×1 convolution that is two factors.

A 1×1 convolution is a Linear layer over the channels of every pixel it looks at. With X the pixels as rows,

    Y (B·H·W, O) = (X (B·H·W, I)·rightᵀ)·leftᵀ + bias

and as convolutions, right is K filters of I×1×1 with the stride, left O filters of K×1×1 without. Both forms
are exact. Training uses the first, for it keeps rows compressed; the second needs no transposed copy of the
image, so it is what is evaluated and exported.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.linear import SubspaceLinear


def pixel_rows(
    x: Float[Tensor, "batch channels height width"], stride: tuple[int, int]
) -> Float[Tensor, "batch rows columns channels"]:
    """Returns the pixels that a 1×1 convolution of this stride looks at, channels last; a view of x."""
    return x[:, :, :: stride[0], :: stride[1]].permute(0, 2, 3, 1)


def input_rows(layer: nn.Module, x: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_in"]:
    """Returns the input of a layer, dense or factored, as the rows that its weight is applied to."""
    if isinstance(layer, (nn.Conv2d, SubspaceConv1x1)):
        height, width = layer.stride
        return pixel_rows(x, (int(height), int(width)))
    return x


class SubspaceConv1x1(SubspaceLinear):
    """y = left ∗ (right ∗ x) + bias on images (B, I, H, W), without padding and groups.

    It is a `SubspaceLinear` in all but the layout of its input: the same parameters (`left` O×K and `right`
    K×I), the same bases and the same gradient, so that whatever moves factors (optimiser groups, update
    rules) takes both; that is why it overrides `forward`. Code that applies the factors itself must ask for
    the exact class.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        rank: int,
        *,
        stride: tuple[int, int] = (1, 1),
        bias: bool = True,
        activation: ActivationRanks | None = None,
        draw: bool = True,
    ) -> None:
        """Makes a layer of the given rank.

        Args:
            in_channels: I.
            out_channels: O.
            rank: K, columns of `left` and rows of `right`.
            stride: over height and width.
            bias: whether there is a bias.
            activation: ranks in which the pixels are kept; None keeps them whole.
            draw: whether the factors are drawn; without, they have no values yet, and are to be filled.
        """
        super().__init__(in_channels, out_channels, rank, bias=bias, activation=activation, draw=draw)
        self.stride = stride

    def forward(
        self, x: Float[Tensor, "batch d_in height width"]
    ) -> Float[Tensor, "batch d_out rows columns"]:
        """Returns y (B, O, ⌈H/stride⌉, ⌈W/stride⌉) for x (B, I, H, W)."""
        if self._will_be_differentiated() and not torch.compiler.is_exporting():
            return super().forward(pixel_rows(x, self.stride)).permute(0, 3, 1, 2)
        K, O = self.rank, self.out_features
        code = F.conv2d(x, self.right.view(K, self.in_features, 1, 1), stride=self.stride)
        return F.conv2d(code, self.left.view(O, K, 1, 1), self.bias)

    def extra_repr(self) -> str:
        """Returns the sizes."""
        return f"{super().extra_repr()}, stride={self.stride}"
