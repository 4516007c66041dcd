"""Which rank a Linear layer gets, and the plan that records it. Pure numpy.

A pair `left (O×K) · right (K×I)` has K(O+I) parameters against O·I, so it pays only below the break-even
rank K* = O·I/(O+I). Ranks are rounded to a multiple of 8: the runtime's matrix kernels compute columns in
blocks of 16, the last of them also of 8, and a rank just past a block costs up to 13 % (docs/inference.md).
"""

import math
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from wasi_export.config import ActivationMode, FactorMethod, SubspaceConfig
from wasi_export.errors import IntegrityError, MalformedError, RankError
from wasi_export.settings import Frozen
from wasi_export.untrusted.document import read_document

Count = Annotated[int, Field(ge=1)]
DEFAULT_FRACTION = 0.4
"""Where a config has no measure and no budget."""
RANK_STEP = 8
RANK_FLOOR = 32  # below it a pair reaches under two thirds of its ideal speed (docs/inference.md)


class ActivationRanks(Frozen):
    """Ranks of the Tucker form in which an input (B, N, I) is kept; None: a mode kept whole."""

    feature: Count | None = None
    token: Count | None = None
    token_count: Count | None = Field(None, description="N that the token rank was chosen for")
    batch: Count | None = None
    batch_count: Count | None = Field(None, description="B that the batch rank was chosen for")

    def batch_rank(self, batch: int) -> int | None:
        """Returns the rank for a batch of any size: in proportion to it; None: the batch mode is whole."""
        if self.batch is None or self.batch_count is None:
            return None
        return min(batch, -(-self.batch * batch // self.batch_count))


class LayerPlan(Frozen):
    """What is decided for one Linear layer, and why."""

    name: str
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    rank: Count | None = Field(description="rank of the pair; None: the layer stays dense")
    method: FactorMethod | None = Field(description="how it was factored; None: it was not")
    energy: float | None = Field(
        description="explained energy of the output (whitened) or the weight (plain)"
    )
    activation: ActivationRanks = ActivationRanks()
    tokens: int | None = Field(None, description="rows of the input for one image; None: not measured")
    error: float | None = Field(
        None,
        description="predicted share of the output's energy that the rank loses, times the layer's weight",
    )
    factored_ms: float | None = Field(
        None, description="time of the pair for one image, where it was measured"
    )
    dense_ms: float | None = Field(None, description="time of the dense layer, measured in turns with it")
    reason: str = Field(description="why this rank, or why the layer stays dense; notes of a fallback")

    @property
    def parameters(self) -> int:
        """Parameters of the weight, without the bias."""
        return weight_parameters(self.out_features, self.in_features, self.rank)

    @property
    def dense_parameters(self) -> int:
        """Parameters of the weight before it was factored."""
        return weight_parameters(self.out_features, self.in_features, None)


class Plan(Frozen):
    """The decisions for all targeted layers, in model order."""

    activation_mode: ActivationMode
    layers: tuple[LayerPlan, ...]

    @property
    def factored(self) -> tuple[LayerPlan, ...]:
        """The layers that become a pair of factors."""
        return tuple(layer for layer in self.layers if layer.rank is not None)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Returns the plan in a JSON file.

        Raises:
            IntegrityError: the file is missing or is not a plan.
        """
        try:
            return read_document(path, cls)
        except (OSError, MalformedError) as error:
            raise IntegrityError(f"{path} is not a plan: {error}") from error


def weight_parameters(out_features: int, in_features: int, rank: int | None) -> int:
    """Returns the parameters of a pair of a rank, without the bias; None: of the dense weight."""
    O, I = out_features, in_features
    return O * I if rank is None else rank * (O + I)


def break_even_rank(out_features: int, in_features: int) -> float:
    """Returns K* = O·I/(O+I), at which the pair has as many parameters as the dense layer."""
    return out_features * in_features / (out_features + in_features)


def round_rank(rank: float) -> int:
    """Returns the rank rounded down to a multiple of 8; at least 32."""
    return max(RANK_FLOOR, int(rank) // RANK_STEP * RANK_STEP)


def candidate_ranks(out_features: int, in_features: int) -> tuple[int, ...]:
    """Returns the ranks worth trying: the multiples of 8 from the floor of 32 to below break-even."""
    above = math.ceil(break_even_rank(out_features, in_features))
    return tuple(range(RANK_FLOOR, above, RANK_STEP))


def energy_rank(singular_values: NDArray[np.float64], epsilon: float) -> int:
    """Returns the smallest rank that keeps `epsilon` of the energy; at most the number of singular values.

    The energy kept by rank r is the share of the squared singular values (descending, shape [n]) in the
    first r.

    Source: arXiv 2510.09160, eq. 5-7.
    """
    energy = np.cumsum(singular_values**2)
    if energy[-1] <= 0:
        return 1
    return min(int(np.searchsorted(energy, epsilon * energy[-1], side="left")) + 1, len(energy))


def choose_rank(
    singular_values: NDArray[np.float64],
    out_features: int,
    in_features: int,
    config: SubspaceConfig,
) -> tuple[int | None, str]:
    """Returns the rank of a layer, or None where it stays dense, and the reason.

    Without `epsilon`, `fraction` or `rank` in the config the fraction is 0.4. An explicit rank is taken
    as it is, one by fraction is rounded by `round_rank`, and one by epsilon is rounded up to a multiple of
    8, so that the energy is kept; it has no floor.

    Raises:
        RankError: an explicit rank is above what the layer has.
    """
    break_even = break_even_rank(out_features, in_features)
    if config.rank is not None:
        full = min(out_features, in_features)
        if config.rank > full:
            raise RankError(
                f"rank {config.rank} is above {full}, the full rank of {out_features}×{in_features}: "
                f"choose at most {int(break_even)}"
            )
        rank, reason = config.rank, "rank as given"
    elif config.epsilon is not None:
        exact = energy_rank(singular_values, config.epsilon)
        # Rounded up: rounding down would keep less energy than was asked for.
        rank, reason = -(-exact // RANK_STEP) * RANK_STEP, f"rank {exact} keeps epsilon {config.epsilon:g}"
    else:
        fraction = DEFAULT_FRACTION if config.fraction is None else config.fraction
        wanted = fraction * break_even
        rank, reason = round_rank(wanted), f"fraction {fraction:g}"
        if rank > wanted:
            reason += f", raised to the floor of {RANK_FLOOR}"
    if rank >= break_even:
        return None, f"dense: rank {rank} is not below break-even {break_even:.0f} ({reason})"
    return rank, reason
