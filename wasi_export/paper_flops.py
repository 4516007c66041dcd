"""Floating-point operations of one training step of one Linear layer, as the paper counts them, corrected.

For X (B, N, I), W (O×I), T = B·N; a product of m×k and k×n takes mn(2k-1), and c operations are said of 2 per
multiply-add where a sum runs over several modes:

    dense     forward TO(2I-1)                     backward OI(2T-1) + TI(2O-1)
    WASI      forward TK(2I-1) + TO(2K-1)          backward TK(2O-1) + TI(2K-1) + f_LR
              overhead  one round of subspace iteration for the weight and for each mode, and the core
    f_LR      2·(TO·r₁ + r₁r₂r₃·N + r₁r₃·I·N + I·O·N·r₁)        the weight's gradient from the Tucker form
    round     of an a×b matrix at rank r: ar(2b-1) + br(2a-1) + 2·max(a, r)·min(a, r)²

What is corrected, all of it to the disadvantage of the compressed method: f_LR was counted at 1 a
multiply-add and the rest at 2; the ranks of the token and feature modes were swapped; the contraction to the
core was left out.

Source: arXiv 2510.09160 section 3.4, and main/classification/model.py of its code, whose formulas these are.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepFlops:
    """Operations of one training step."""

    forward: int
    backward: int
    overhead: int = 0
    """Following the subspaces of the weight and of the saved input."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.forward + self.backward + self.overhead


def dense_step_flops(*, out_features: int, in_features: int, batch: int, tokens: int) -> StepFlops:
    """Returns the operations of a dense layer."""
    O, I, T = out_features, in_features, batch * tokens
    return StepFlops(forward=T * O * (2 * I - 1), backward=O * I * (2 * T - 1) + T * I * (2 * O - 1))


def wasi_step_flops(
    *,
    out_features: int,
    in_features: int,
    batch: int,
    tokens: int,
    rank: int,
    mode_ranks: tuple[int, int, int],
) -> StepFlops:
    """Returns the operations of the paper's method; `mode_ranks` are those of batch, token and feature."""
    O, I, B, N, K = out_features, in_features, batch, tokens, rank
    T, (r1, r2, r3) = B * N, mode_ranks
    weight_gradient = 2 * (T * O * r1 + r1 * r2 * r3 * N + r1 * r3 * I * N + I * O * N * r1)
    core = 2 * (r1 * B * N * I + r1 * r2 * N * I + r1 * r2 * r3 * I)
    rounds = (
        _round_flops(O, I, K)
        + _round_flops(B, N * I, r1)
        + _round_flops(N, B * I, r2)
        + _round_flops(I, B * N, r3)
    )
    return StepFlops(
        forward=T * K * (2 * I - 1) + T * O * (2 * K - 1),
        backward=T * K * (2 * O - 1) + T * I * (2 * K - 1) + weight_gradient,
        overhead=rounds + core,
    )


def _round_flops(a: int, b: int, r: int) -> int:
    """Returns the operations of one warm-started round of subspace iteration of an a×b matrix."""
    return a * r * (2 * b - 1) + b * r * (2 * a - 1) + 2 * max(a, r) * min(a, r) ** 2
