"""A saved activation in Tucker form: X (B, N, I) ≈ core ×₂ U_token ×₃ U_feature.

The batch mode is never compressed: samples are shuffled, so a basis over them has nothing to be warm from,
and it would tie the state to one batch size. A basis follows a slowly moving subspace by rounds of subspace
iteration, each started from the last: `U' = orth(M·(Mᵀ·U))` where M is the unfolding of X along the mode.

Source: arXiv 2510.09160 section 3.2 (warm start after PowerSGD, arXiv 1905.13727).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of the compressed modes; None: that mode is kept whole."""

    feature: Float[Tensor, "d_in r_feature"] | None = None
    token: Float[Tensor, "n r_token"] | None = None

    def fit(self, x: Tensor) -> bool:
        """Returns whether the token basis, where there is one, is for the token count of x (B, N, I)."""
        return self.token is None or self.token.shape[0] == x.shape[1]


def orthonormalize(matrix: Float[Tensor, "a r"]) -> Float[Tensor, "a r"]:
    """Returns an orthonormal basis of the columns (Householder QR), each column along its old direction.

    The diagonal of R is made positive, so that the basis moves continuously from step to step: with the sign
    freedom of QR left in, a warm start flips columns (the official code does).
    """
    Q, R = torch.linalg.qr(matrix)
    signs = torch.where(torch.diagonal(R) < 0, -1.0, 1.0).to(Q.dtype)
    basis: Tensor = (Q * signs).contiguous()  # one memory layout, or a resumed run rounds differently
    return basis


def compress(x: Float[Tensor, "*batch d_in"], bases: Bases) -> Tensor:
    """Returns the core of x (B, N, I) in the bases: (B, r_token, r_feature), a mode without basis whole."""
    core = x if bases.feature is None else x @ bases.feature
    return core if bases.token is None else torch.einsum("bnr,nm->bmr", core, bases.token)


def follow(x: Float[Tensor, "*batch d_in"], bases: Bases) -> Bases:
    """Returns the bases one round of subspace iteration further along x.

    A token basis for another token count starts anew from the first tokens.
    """
    feature, token, core = bases.feature, bases.token, x
    if feature is not None:
        flat = x.reshape(-1, x.shape[-1])
        rows = flat @ feature
        feature = orthonormalize(flat.T @ rows)
        core = rows.reshape(*x.shape[:-1], -1)
    if token is not None:
        # The core is already in the feature basis: fewer columns, and nothing outside it is stored anyway.
        columns = core.transpose(0, 1).reshape(core.shape[1], -1)
        if not bases.fit(x):
            token = torch.eye(x.shape[1], min(token.shape[1], x.shape[1])).to(columns)
        token = orthonormalize(columns @ (columns.T @ token))
    return Bases(feature, token)


def expand_tokens(core: Tensor, bases: Bases) -> Tensor:
    """Returns the core with the token mode expanded: (…, N, r_feature), or (…, N, I) where that is whole."""
    return core if bases.token is None else torch.einsum("bmr,nm->bnr", core, bases.token)


def reconstruct(core: Tensor, bases: Bases) -> Float[Tensor, "*batch d_in"]:
    """Returns the activation that the core and its bases stand for."""
    expanded = expand_tokens(core, bases)
    return expanded if bases.feature is None else expanded @ bases.feature.T
