"""A saved activation in Tucker form: X (B, N, I) ≈ core ×₁ U_batch ×₂ U_token ×₃ U_feature.

The feature and the token basis follow slowly moving subspaces by rounds of subspace iteration, each started
from the last: `U' = orth(M·(Mᵀ·U))` where M is the unfolding of X along the mode.

The batch mode is compressed on request only. Samples are shuffled, so a basis over them has nothing to be
warm from, and kept from step to step it would tie the state to one batch size: it is made anew from every
batch, the leading eigenvectors of the B×B moment of what the other modes have left.

Of an image (B, H, W, I) the pixels are the tokens, N = H·W. For the same error one basis of pixels needs no
more columns than the pairs of columns of one basis of rows and one of columns, so the core of a batch is no
larger, and there is one rank to choose. The price is N numbers a column, shared by the batch.

Source: arXiv 2510.09160 section 3.2 (warm start after PowerSGD, arXiv 1905.13727), where all modes are warm.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed
from jaxtyping import Float
from torch import Tensor

from wasi_export.subspace.precision import at_least_fp32


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases of the compressed modes; None: that mode is kept whole."""

    feature: Float[Tensor, "d_in r_feature"] | None = None
    token: Float[Tensor, "n r_token"] | None = None
    batch: Float[Tensor, "b r_batch"] | None = None

    def fit(self, x: Tensor) -> bool:
        """Returns whether the token basis, where there is one, is for the token count of x (B, …, I)."""
        return self.token is None or self.token.shape[0] == token_count(x)


def token_count(x: Float[Tensor, "b *tokens d_in"]) -> int:
    """Returns the rows that each sample has: N of (B, N, I), H·W of (B, H, W, I), 1 of (B, I)."""
    return math.prod(x.shape[1:-1])


def orthonormalize(matrix: Float[Tensor, "a r"]) -> Float[Tensor, "a r"]:
    """Returns an orthonormal basis of the columns (Householder QR), each column along its old direction.

    The diagonal of R is made positive, so that the basis moves continuously from step to step: with the sign
    freedom of QR left in, a warm start flips columns (the official code does).

    CholeskyQR in two rounds took 1.1 to 1.4 times as long at every size from 384×32 (0.20 against 0.16 ms)
    to 1536×256 (12.6 against 11.5 ms; one thread of an x86 server, torch 2.15), and fails in fp32 where the
    columns are dependent to one in 10⁵.
    """
    Q, R = torch.linalg.qr(at_least_fp32(matrix))
    signs = torch.where(torch.diagonal(R) < 0, -1.0, 1.0).to(Q.dtype)
    basis: Tensor = (Q * signs).contiguous()  # one memory layout, or a resumed run rounds differently
    return basis.to(matrix.dtype)


def compress(x: Float[Tensor, "b *tokens d_in"], bases: Bases) -> Tensor:
    """Returns the core of x (B, …, I) in the bases; a mode without basis is whole.

    It is (r_batch, r_token, r_feature) where the tokens are compressed, and has their axes as x otherwise.
    """
    core = x if bases.feature is None else x @ bases.feature
    if bases.token is not None:
        core = torch.einsum("bnr,nm->bmr", core.reshape(len(x), -1, core.shape[-1]), bases.token)
    return core if bases.batch is None else _mix(bases.batch.T, core)


def follow(x: Float[Tensor, "b *tokens d_in"], bases: Bases, *, shared: bool = False) -> Bases:
    """Returns the bases of features and tokens one round of subspace iteration further along x (B, …, I).

    A token basis for another token count starts anew from the first tokens.

    Args:
        x: the input.
        bases: where they are.
        shared: x is the share of one of several processes, which all call this and get bases for all of it.
    """
    feature, token, core = bases.feature, bases.token, x
    if feature is not None:
        flat = x.reshape(-1, x.shape[-1])
        rows = flat @ feature
        # The mean over rows, as their sum is beyond fp16.
        feature = _next_basis(flat.T @ (rows / len(rows)), like=feature, shared=shared)
        core = rows.reshape(*x.shape[:-1], -1)
    if token is not None:
        # The core is already in the feature basis: fewer columns, and nothing outside it is stored anyway.
        N = token_count(x)
        columns = core.reshape(len(x), N, -1).transpose(0, 1).reshape(N, -1)
        if not bases.fit(x):
            token = torch.eye(N, min(token.shape[1], N)).to(token)
        seen = columns.T @ token.to(columns.dtype)
        token = _next_basis(columns @ (seen / len(seen)), like=token, shared=shared)
    return Bases(feature, token)


def _next_basis(moment: Tensor, *, like: Tensor, shared: bool) -> Tensor:
    moment = moment.to(like.dtype)
    if shared:
        torch.distributed.all_reduce(moment)
    return orthonormalize(moment)


def batch_basis(core: Float[Tensor, "b ..."], rank: int) -> Float[Tensor, "b r_batch"]:
    """Returns the leading directions of the batch mode of a core (B, …), at most B of them."""
    rows = at_least_fp32(core.reshape(len(core), -1))
    # Of an activation that is not finite the loss tells, not the decomposition.
    moment = torch.nan_to_num(rows @ rows.T / rows.shape[1], posinf=0.0, neginf=0.0)
    _, vectors = torch.linalg.eigh(moment)
    basis: Tensor = vectors[:, -min(rank, len(core)) :].contiguous()
    return basis.to(core.dtype)


def expand_tokens(core: Tensor, bases: Bases) -> Float[Tensor, "b *tokens r"]:
    """Returns the core with batch and tokens expanded: (B, N, r_feature), or with I where that is whole.

    Tokens that are whole have the axes that they have in the core.
    """
    expanded = core if bases.token is None else torch.einsum("bmr,nm->bnr", core, bases.token)
    return expanded if bases.batch is None else _mix(bases.batch, expanded)


def _mix(matrix: Float[Tensor, "a b"], core: Float[Tensor, "b ..."]) -> Float[Tensor, "a ..."]:
    """Returns matrix ×₁ core; a plain product, as autocast knows no tensordot."""
    mixed: Tensor = matrix @ core.reshape(len(core), -1)
    return mixed.reshape(len(matrix), *core.shape[1:])


def reconstruct(core: Tensor, bases: Bases) -> Float[Tensor, "b *tokens d_in"]:
    """Returns the activation that the core and its bases stand for; compressed tokens are on one axis."""
    expanded = expand_tokens(core, bases)
    return expanded if bases.feature is None else expanded @ bases.feature.T
