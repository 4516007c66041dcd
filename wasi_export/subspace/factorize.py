"""One weight into two factors: `W (O×I) ≈ left (O×K) · right (K×I)`, `left` with orthonormal columns.

plain      The K leading left singular vectors of W. The smallest error of the weight (Eckart-Young).
whitened   The K leading left singular vectors of W·S, where S·Sᵀ = C is the second moment of the layer's
           input: the principal directions of the layer's *output*. The smallest mean squared error of the
           output over the calibration data.

In both, `right = leftᵀ·W` is the best match for that `left`, so C is never inverted and a singular C does no
harm. Directions in which the input never moved get a floor of 1e-8 of the largest eigenvalue: a rank beyond
what the data excites then still goes to the weight's own leading directions, not to arbitrary ones.

Source: plain, arXiv 2510.09160 eq. 5-7, with the orthonormal factor on the left; the idea of mapping the
truncation loss to the output, arXiv 2403.07378.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wasi_export.config import FactorMethod
from wasi_export.subspace.moments import PrincipalAxes

EIGENVALUE_FLOOR = 1e-8


@dataclass(frozen=True)
class Spectrum:
    """All directions of a weight, best first: the leading K are `left`."""

    method: FactorMethod
    basis: Float[Tensor, "d_out n"]
    singular_values: Float[Tensor, " n"]
    note: str = ""
    """Why the method is not the one that was asked for; empty where it is."""


def plain_spectrum(weight: Float[Tensor, "d_out d_in"], *, note: str = "") -> Spectrum:
    """Returns the singular directions of the weight itself, in fp64."""
    U, S, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    return Spectrum("plain", U, S, note)


def whitened_spectrum(weight: Float[Tensor, "d_out d_in"], axes: PrincipalAxes | None) -> Spectrum:
    """Returns the principal directions of the layer's output, in fp64.

    Args:
        weight: W (O×I).
        axes: eigenvectors and eigenvalues of the input's second moment; None where the layer saw no input.

    Falls back to `plain_spectrum`, with the reason in `note`, without a usable moment.
    """
    if axes is None:
        return plain_spectrum(weight, note="plain: the layer saw no usable calibration data")
    largest = axes.values[0].item()
    if largest <= 0:
        return plain_spectrum(weight, note="plain: the layer's input was zero on the calibration data")
    root = axes.vectors * axes.values.clamp_min(EIGENVALUE_FLOOR * largest).sqrt()
    U, S, _ = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    return Spectrum("whitened", U, S)
