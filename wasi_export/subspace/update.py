"""The `wsi` update: a step of gradient descent on the weight itself, done on its two factors.

The weight is W = L·R (L: O×K, orthonormal columns; R: K×I), its gradient G = C·Bᵀ of rank r (see
`WeightGradient`). The step is W⁺ = c·W − lr·G with c = 1 − lr·decay, so that the decay is exact on the
product. One round of subspace iteration from L brings W⁺ back to rank K:

    Q  = W⁺ᵀ·L   = c·Rᵀ·(Lᵀ·L) − lr·B·(Cᵀ·L)
    P  = W⁺·V    = c·L·(R·V) − lr·C·(Bᵀ·V)            V = orth(Q)
    L' = orth(P)
    R' = L'ᵀ·W⁺  = c·(L'ᵀ·L)·R − lr·(L'ᵀ·C)·Bᵀ

W⁺ is never made: every product has K or r columns, about 6r·K·(O+I) + 4K²·(O+I) multiply-adds and the QRs.
L'·R' = L'·L'ᵀ·W⁺ is a projection of W⁺, which is why R' is taken with L': L·R' with the old factor in one of
the two places is no projection, and does not train. P is taken with V and not with Q, which spans the same
but squares the singular values of W: the smallest would drown in fp32. Of all bases of the columns of P the
one nearest to L is taken, so that factors at rest stay as they are, up to rounding.

Heavy-ball momentum μ, W⁺ = c·W − lr·M⁺ with M⁺ = μ·M + G, needs no buffer of O×I, nor a second projection: M
is in the last step that was taken, W = c₋·W₋ − lr₋·M, so that

    W⁺ = (c + ρ)·W − ρ·c₋·W₋ − lr·G                    ρ = μ·lr/lr₋

and the old factors L₋ and c₋·R₋ are the state. At full rank that is heavy ball to the letter, but that the
rounding of W goes through it as well, 1/(1 − μ) times: 5e-5 of W after 100 steps in fp32 with μ = 0.9, where
steps without momentum are exact to 3e-6. At a small rank W − c₋·W₋ is the part of M that the projection kept.
On a 64-96-96-10 network on the digits (ranks 4, 8, 16; three rates, three seeds) it reached the training loss
of a dense M within 3 %; a buffer of rank K, moved by the same subspace iteration, ended up to twice as high
at rank 4.

Every n-th step may take the best rank-K approximation of W⁺ in place of one round of iteration, from a QR of
[L, C] and of [Rᵀ, B] and the SVD of a matrix of order K + r.

Source: arXiv 2510.09160 algorithm 1 and eq. 11, with R' from the new factor in place of the old one; the
decay of the product, arXiv 2105.01029; a periodic refresh, arXiv 2509.11254; momentum as a difference of
iterates, Polyak 1964.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wasi_export.errors import ConfigError, ModelFailedError
from wasi_export.subspace.linear import SubspaceLinear
from wasi_export.subspace.precision import at_least_fp32
from wasi_export.subspace.tucker import orthonormalize


def rate_scale(layer: SubspaceLinear) -> tuple[float, float]:
    """Returns what the learning rates of `left` and `right` of a layer are multiplied with.

    A step of Adam moves every entry of a matrix by about the rate. Where it is `right` that moves so, an
    entry of the weight moves by the rate times the norm of a row of `left`, √(K/O): √(O/K) makes up for it.
    """
    return 1.0, math.sqrt(layer.out_features / layer.rank)


def project_step(
    left: Float[Tensor, "d_out rank"],
    right: Float[Tensor, "rank d_in"],
    change: Float[Tensor, "d_out r"],
    basis: Float[Tensor, "d_in r"],
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """Returns the factors of W⁺ = scale·left·right + change·basisᵀ after one round of subspace iteration.

    Args:
        left: with columns that are orthonormal, or nearly so.
        right: the other factor.
        change: left factor of what is added to the weight, any rank r.
        basis: right factor of the same, need not be orthonormal.
        scale: of the old weight.
    """
    Q = scale * right.T @ (left.T @ left) + basis @ (change.T @ left)
    V = orthonormalize(Q)
    P = orthonormalize(scale * left @ (right @ V) + change @ (basis.T @ V))
    new_left = P @ orthonormalize(P.T @ left)
    new_right = scale * (new_left.T @ left) @ right + (new_left.T @ change) @ basis.T
    return new_left, new_right


def truncate_step(
    left: Float[Tensor, "d_out rank"],
    right: Float[Tensor, "rank d_in"],
    change: Float[Tensor, "d_out r"],
    basis: Float[Tensor, "d_in r"],
    *,
    scale: float = 1.0,
) -> tuple[Float[Tensor, "d_out rank"], Float[Tensor, "rank d_in"]]:
    """Returns the factors of the best rank-K approximation of W⁺, which is as for `project_step`.

    Its largest tensors have K + r columns; where that is more than O or I the weight itself is no larger.
    """
    rank = left.shape[1]
    Q1, T1 = torch.linalg.qr(torch.cat((left, change), 1))
    Q2, T2 = torch.linalg.qr(torch.cat((scale * right.T, basis), 1))
    U, S, Vh = torch.linalg.svd(T1 @ T2.T, full_matrices=False)
    return Q1 @ U[:, :rank], (S[:rank, None] * Vh[:rank]) @ Q2.T


@dataclass
class _State:
    """What the rule keeps of a layer from step to step."""

    step: int = 0
    lr: float = 0.0
    """Of the last step."""
    left: Tensor | None = None
    """Before the last step; None without momentum."""
    right: Tensor | None = None
    """c₋·R₋."""


class WsiUpdate:
    """The `wsi` rule for the factored layers whose parameters an optimiser holds.

    The optimiser leaves the factors alone, as they get no gradient; after each of its steps this takes
    theirs, with the rate and the decay of the group that holds `left`. The state is saved and restored with
    that of the optimiser, but is not in it, as optimisers look for their own in what they find there.
    """

    def __init__(
        self, layers: Mapping[str, SubspaceLinear], *, momentum: float = 0.0, refresh_every: int | None = None
    ) -> None:
        """Makes the rule.

        Args:
            layers: by name; set to collect the gradient of their weights, in place.
            momentum: μ of the heavy ball; 0 keeps no state.
            refresh_every: steps from one best approximation to the next; None: never.

        Raises:
            ConfigError: a layer keeps its input whole in the feature mode, so that its gradient has no basis.
        """
        whole = [name for name, layer in layers.items() if layer.feature_basis is None]
        if whole:
            others = f" (so do {len(whole) - 1} others)" if len(whole) > 1 else ""
            raise ConfigError(
                f'update = "wsi" takes the gradient of a weight in the basis of its input, and {whole[0]} '
                f"keeps its input whole{others}: set subspace.activation, or lower "
                "subspace.activation_epsilon"
            )
        self._layers = {id(layer.left): layer for layer in layers.values()}
        self._names = {id(layer.left): name for name, layer in layers.items()}
        self._states = {key: _State() for key in self._layers}
        self._momentum, self._refresh_every = momentum, refresh_every
        for layer in layers.values():
            layer.collect_weight_gradient = True

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Makes every step of the optimiser one of this rule as well, in place, and its state hold ours."""
        optimizer.register_step_pre_hook(self._leave_factors_alone)
        optimizer.register_step_post_hook(self._step)
        optimizer.register_state_dict_post_hook(self._save)
        optimizer.register_load_state_dict_pre_hook(self._load)

    def _leave_factors_alone(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Drops the zeros that DistributedDataParallel gives parameters without a gradient."""
        for layer in self._layers.values():
            layer.left.grad = layer.right.grad = None

    @torch.no_grad()
    def _step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Moves the factors, and drops the gradients that were collected.

        Raises:
            ModelFailedError: a best approximation of numbers that are not finite; else the next loss tells.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                layer = self._layers.get(id(parameter))
                if layer is not None and layer.weight_gradient is not None:
                    state = self._states[id(parameter)]
                    self._move(layer, state, float(group["lr"]), float(group["weight_decay"]))
                    layer.weight_gradient = None

    def _move(self, layer: SubspaceLinear, state: _State, lr: float, decay: float) -> None:
        assert layer.weight_gradient is not None
        left, right = at_least_fp32(layer.left), at_least_fp32(layer.right)
        gradient = layer.weight_gradient
        change, basis = -lr * at_least_fp32(gradient.coefficients), at_least_fp32(gradient.basis)
        scale = keep = 1 - lr * decay
        if self._momentum:
            if state.left is not None and state.right is not None and state.lr > 0:
                ratio = self._momentum * lr / state.lr
                scale += ratio
                change = torch.cat((change, -ratio * at_least_fp32(state.left)), 1)
                basis = torch.cat((basis, at_least_fp32(state.right).T), 1)
            state.left, state.right = layer.left.detach().clone(), keep * layer.right.detach()
        state.step, state.lr = state.step + 1, lr
        refresh = self._refresh_every is not None and state.step % self._refresh_every == 0
        move = truncate_step if refresh else project_step
        try:
            new_left, new_right = move(left, right, change, basis, scale=scale)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # by SVD; QR goes on
            raise ModelFailedError(
                f"the gradient of {self._names[id(layer.left)]} is not finite: lower the learning rate"
            ) from error
        layer.left.copy_(new_left)
        layer.right.copy_(new_right)

    def _places(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, int]]:
        """Yields where the state_dict of the optimiser has each `left`, and its key here."""
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        for place, parameter in enumerate(parameters):
            if id(parameter) in self._layers:
                yield place, id(parameter)

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the state_dict with the state of this rule."""
        own = {place: dict(vars(self._states[key])) for place, key in self._places(optimizer)}
        return {**state_dict, "state": {**state_dict["state"], **own}}

    def _load(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Takes the state of this rule out of a state_dict, in place; returns the rest."""
        rest = dict(state_dict["state"])
        for place, key in self._places(optimizer):
            state = _State(**rest.pop(place, {}))
            for name in ("left", "right"):
                if (tensor := getattr(state, name)) is not None:
                    setattr(state, name, tensor.to(self._layers[key].left))
            self._states[key] = state
        return {**state_dict, "state": rest}
