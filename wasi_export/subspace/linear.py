"""`SubspaceLinear`: a Linear layer that is two factors, and nothing of shape out×in."""

import math
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.profiler import record_function

from wasi_export.ranks import ActivationRanks
from wasi_export.subspace.autograd import SubspaceLinearFunction, WeightGradient
from wasi_export.subspace.tucker import Bases, batch_basis, compress, follow

BASIS_PERIOD = 8
"""Differentiated forward passes from one move of the bases to the next. Moving them in each made a training
step of a ViT-S/14 half as long again, most of it for the input of fc2; a subspace moves slowly."""


class SubspaceLinear(nn.Module):
    """y = (x·rightᵀ)·leftᵀ + bias, with the input kept compressed for the backward pass.

    `left` (O×K), `right` (K×I) and `bias` (O) are the parameters. Where the features or the tokens of the
    activation are compressed, their basis is a buffer, moved by one round of subspace iteration in every
    eighth forward pass that will be differentiated, the first included; evaluation does not touch it, and the
    batch size does not matter to it. A pass that is made again for the backward pass keeps what it computes
    itself, so its gradient is right whether or not the bases have moved in between.

    A new layer starts like a new `nn.Linear` (outputs of the same variance); `factorize_model` fills it with
    the factors of a trained weight.
    """

    bias: nn.Parameter | None
    feature_basis: Tensor | None
    token_basis: Tensor | None
    passes: int
    """Differentiated forward passes so far. A tensor only in the state_dict: to read one off a device, each
    pass would wait."""
    collect_weight_gradient: bool = False
    """Whether backward adds up the gradient of the weight in `weight_gradient`; the factors then get none."""
    weight_gradient: WeightGradient | None = None
    plain_autograd: bool = False
    """Whether torch differentiates the two products, as in a traced step, and nothing is compressed."""
    share_bases: bool = False
    """Whether each of several processes sees a share of the batch, and the bases follow all of it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        activation: ActivationRanks | None = None,
        draw: bool = True,
    ) -> None:
        """Makes a layer of the given rank.

        Args:
            in_features: size I of the last axis of the input.
            out_features: size O of the last axis of the output.
            rank: K, columns of `left` and rows of `right`.
            bias: whether there is a bias.
            activation: ranks in which the input is kept; None keeps it whole.
            draw: whether the factors are drawn; without, they have no values yet, and are to be filled.
        """
        super().__init__()
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.left = nn.Parameter(torch.empty(out_features, rank))
        self.right = nn.Parameter(torch.empty(rank, in_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)
        self.activation = ranks = activation or ActivationRanks()
        self.register_buffer("feature_basis", _unit_axes(in_features, ranks.feature))
        self.register_buffer("token_basis", _unit_axes(ranks.token_count, ranks.token))
        self.passes = 0
        self.register_state_dict_post_hook(_save_passes)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_load_passes)  # type: ignore[no-untyped-call]
        if draw:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the factors of a new layer, in place; its bias is zero."""
        nn.init.orthogonal_(self.left)
        # Var(right·x) summed over K, spread over O by orthonormal columns, is that of nn.Linear's default.
        nn.init.normal_(self.right, std=math.sqrt(self.out_features / (3 * self.in_features * self.rank)))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Returns y (…, O) for x (…, I)."""
        if self.plain_autograd or not self._will_be_differentiated() or torch.compiler.is_exporting():
            return F.linear(F.linear(x, self.right), self.left, self.bias)
        core, bases = self._compress(x)
        return cast(
            Tensor,
            SubspaceLinearFunction.apply(
                x,
                self.left,
                self.right,
                self.bias,
                core,
                bases.feature,
                bases.token,
                bases.batch,
                self if self.collect_weight_gradient else None,
            ),
        )

    @torch.no_grad()
    def _compress(self, x: Tensor) -> tuple[Tensor, Bases]:
        """Returns the core of x and its bases, which move first where it is their turn."""
        bases = Bases(self.feature_basis, self.token_basis)
        if self.passes % BASIS_PERIOD == 0 or not bases.fit(x):
            with record_function("wasi.basis"):
                bases = follow(x, bases, shared=self.share_bases)
            # New tensors, not updates in place: a forward pass before the last one's backward must not
            # change what that one saved.
            self.feature_basis, self.token_basis = bases.feature, bases.token
        self.passes += 1
        core = compress(x, bases)
        if (rank := self.activation.batch_rank(len(x))) is not None:
            bases = replace(bases, batch=batch_basis(core, rank))
            core = compress(core, Bases(batch=bases.batch))
        return core, bases

    def _will_be_differentiated(self) -> bool:
        return torch.is_grad_enabled() and (self.left.requires_grad or self.right.requires_grad)

    def extra_repr(self) -> str:
        """Returns the sizes, as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _save_passes(layer: SubspaceLinear, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict[f"{prefix}passes"] = torch.tensor(layer.passes)


def _load_passes(
    layer: SubspaceLinear,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Takes the number of passes out of a state_dict, in place."""
    key = f"{prefix}passes"
    passes = state_dict.pop(key, None)
    if passes is None:
        missing_keys.append(key)
    elif passes.shape:
        error_msgs.append(f"size mismatch for {key}: {list(passes.shape)} in place of one number")
    else:
        layer.passes = int(passes.to(torch.int64))


def _unit_axes(size: int | None, rank: int | None) -> Tensor | None:
    if size is None or rank is None:
        return None
    return torch.eye(size, rank)
