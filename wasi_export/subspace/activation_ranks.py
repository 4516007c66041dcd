"""Ranks in which the inputs of factored layers are kept: by an energy, or within the memory of a batch.

A Tucker form that keeps the leading directions of every mode loses at most the sum of what each mode loses,

    ‖X − X̃‖² ≤ Σ_m Σ_{j > r_m} λ_mj        λ_m: eigenvalues of the second moment of mode m

so the ranks of a mode are judged alone: by `activation_epsilon` each mode keeps that share of its energy.
By `activation_memory_mb` the ranks of all modes of all layers are chosen together: the smallest sum over the
layers of that bound, as a share of the layer's own energy, whose bytes for one training batch fit.

Source: the bound, De Lathauwer et al., "A multilinear singular value decomposition", 2000, property 10.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from wasi_export.cost import saved_input_bytes
from wasi_export.knapsack import Limit, Option, choose_options
from wasi_export.ranks import ActivationRanks, energy_rank

TRIED_RANKS = 16
"""Of features and of tokens. For the 48 layers of a ViT-S with made-up energies that fall like powers, 8 lost
4 % more energy; 32 lost 1 % less and took 1.4 s in place of 0.4 s."""

TRIED_BATCH_RANKS = 6
"""Of the batch mode, which seldom pays and multiplies the choices."""


@dataclass(frozen=True)
class ModeEnergies:
    """Eigenvalues of the second moment of each mode of an input, largest first; None: never compressed."""

    in_features: int
    tokens: int
    """Rows of the input for one sample."""
    feature: NDArray[np.float64] | None = None
    """[I]"""
    token: NDArray[np.float64] | None = None
    """[N]"""
    batch: NDArray[np.float64] | None = None
    """[samples that were seen together]"""

    def ranks(self, feature: int | None, token: int | None, batch: int | None) -> ActivationRanks:
        """Returns the ranks with the sizes that they are for."""
        return ActivationRanks(
            feature=feature,
            token=token,
            token_count=None if token is None else self.tokens,
            batch=batch,
            batch_count=None if batch is None or self.batch is None else len(self.batch),
        )


def ranks_by_energy(energies: ModeEnergies, epsilon: float) -> ActivationRanks:
    """Returns the smallest ranks that keep a share of each mode's energy; a mode that needs all is whole."""

    def rank(values: NDArray[np.float64] | None) -> int | None:
        if values is None:
            return None
        needed = energy_rank(np.sqrt(values.clip(0)), epsilon)
        return needed if needed < len(values) else None

    return energies.ranks(rank(energies.feature), rank(energies.token), rank(energies.batch))


def ranks_by_memory(
    layers: Mapping[str, ModeEnergies], budget_bytes: int, *, batch_size: int
) -> dict[str, ActivationRanks]:
    """Returns the ranks of each layer that lose the least energy within a memory for all.

    Args:
        layers: by name.
        budget_bytes: of the saved inputs of one training batch, with their bases.
        batch_size: of training.

    Raises:
        RankError: the budget is below what the smallest ranks take.
    """
    if not layers:
        return {}
    choices = [list(_choices(energies)) for energies in layers.values()]
    groups = [
        [Option(loss, (_bytes(energies, ranks, batch_size),)) for loss, ranks in options]
        for energies, options in zip(layers.values(), choices, strict=True)
    ]
    chosen = choose_options(groups, [Limit(budget_bytes, "bytes of saved inputs (activation_memory_mb)")])
    return {name: options[i][1] for name, options, i in zip(layers, choices, chosen, strict=True)}


def _choices(energies: ModeEnergies) -> Iterator[tuple[float, ActivationRanks]]:
    """Yields ranks worth trying with the share of energy that they may lose."""
    modes = (
        _mode_choices(energies.feature, TRIED_RANKS),
        _mode_choices(energies.token, TRIED_RANKS),
        _mode_choices(energies.batch, TRIED_BATCH_RANKS),
    )
    for (lost, feature), (lost_too, token), (lost_as_well, batch) in product(*modes):
        yield lost + lost_too + lost_as_well, energies.ranks(feature, token, batch)


def _mode_choices(values: NDArray[np.float64] | None, count: int) -> list[tuple[float, int | None]]:
    """Returns ranks from one to nearly all and the share of energy each loses, and the whole mode."""
    whole: list[tuple[float, int | None]] = [(0.0, None)]
    if values is None or len(values) < 2 or values.sum() <= 0:
        return whole
    values = values.clip(0)
    tried = np.unique(np.geomspace(1, len(values) - 1, count).round().astype(int)).tolist()
    kept = np.cumsum(values) / values.sum()
    return whole + [(float(1 - kept[rank - 1]), rank) for rank in tried]


def _bytes(energies: ModeEnergies, ranks: ActivationRanks, batch_size: int) -> int:
    return saved_input_bytes(energies.in_features, ranks, batch=batch_size, tokens=energies.tokens)
