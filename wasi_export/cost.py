"""What a Linear layer costs, dense or factored, by formula. Pure arithmetic.

Counts are of multiply-adds (MACs), 1 each; bytes are fp32. Memory is the paper's scope: the weights and the
saved inputs of the layer, not gradients, optimiser state or the rest of the model; the measured peak of a
whole training step stands beside it in every report. The paper's own floating-point counts are in
`paper_flops.py`.
"""

from dataclasses import dataclass

from wasi_export.ranks import ActivationRanks, LayerPlan

FLOAT_BYTES = 4


@dataclass(frozen=True)
class LinearForm:
    """A Linear layer O×I on the rows of one image, dense or as a pair of a rank; a key for measured times."""

    out_features: int
    in_features: int
    tokens: int
    """Rows of its input for one image."""
    rank: int | None
    """None: dense."""

    @property
    def parameters(self) -> int:
        """Parameters without the bias."""
        O, I = self.out_features, self.in_features
        return O * I if self.rank is None else self.rank * (O + I)

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass of one image."""
        return self.tokens * self.parameters


@dataclass(frozen=True)
class LinearCost:
    """Cost of one layer for a batch of B images of N tokens."""

    parameters: int
    forward_macs: int
    weight_bytes: int
    saved_input_bytes: int

    @property
    def training_bytes(self) -> int:
        """Weights and saved inputs: the training memory of the paper's tables."""
        return self.weight_bytes + self.saved_input_bytes


def linear_cost(layer: LayerPlan, *, batch: int, tokens: int) -> LinearCost:
    """Returns the cost of a layer, without its bias."""
    return LinearCost(
        parameters=layer.parameters,
        forward_macs=batch * tokens * layer.parameters,
        weight_bytes=FLOAT_BYTES * layer.parameters,
        saved_input_bytes=saved_input_bytes(layer.in_features, layer.activation, batch=batch, tokens=tokens),
    )


@dataclass(frozen=True)
class StepMacs:
    """Multiply-adds of one training step of one layer, without the optimiser and the QR of moved bases."""

    forward: int
    backward: int
    compression: int = 0
    """Of the saved input."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.forward + self.backward + self.compression


def linear_step_macs(layer: LayerPlan, *, batch: int, tokens: int, moves_bases: bool = False) -> StepMacs:
    """Returns what `SubspaceLinear`, or a dense layer, computes in a step on an input (B, N, I).

    With T = B·N and ranks K, r, m and b of the pair, the feature, the token and the batch mode, the products
    are those of `subspace/autograd.py` and `subspace/tucker.py`; a mode without a rank is whole. Not counted
    are factorisations: QR of bases that move, eigenvectors of the batch mode.

    Args:
        layer: sizes and ranks.
        batch: B.
        tokens: N.
        moves_bases: whether the bases take their round of subspace iteration in this step.
    """
    O, I, K = layer.out_features, layer.in_features, layer.rank
    T, B, N = batch * tokens, batch, tokens
    if K is None:
        return StepMacs(forward=T * O * I, backward=2 * T * O * I)
    feature, m = layer.activation.feature, layer.activation.token
    r = feature or I
    projected = 0 if feature is None else K * I * r  # right·U
    left = projected + min(r * (T * O + O * K), T * K * (r + O))
    right = T * K * r + (0 if feature is None else K * r * I)
    b = layer.activation.batch_rank(B)
    expansion = (0 if m is None else (b or B) * m * N * r) + (0 if b is None else b * B * N * r)
    core = (0 if feature is None else T * I * r) + (0 if m is None else B * N * m * r)
    core += 0 if b is None else (B + b) * B * (m or N) * r  # the moment of the samples, and the core in it
    moves = (0 if feature is None else 2 * T * I * r) + (0 if m is None else 2 * T * m * r)
    return StepMacs(
        forward=T * K * (I + O),
        backward=T * K * (O + I) + left + right + expansion,
        compression=core + (moves if moves_bases else 0),
    )


def saved_input_bytes(in_features: int, ranks: ActivationRanks, *, batch: int, tokens: int) -> int:
    """Returns the bytes in which a saved input (B, N, I) is kept.

    With a rank r for each mode it takes r_batch·r_token·r_feature + B·r_batch + N·r_token + I·r_feature
    numbers; a mode without a rank is kept whole and has no factor.

    Source: arXiv 2510.09160 section 3.4, with the ranks paired with the right modes.
    """
    if ranks.token_count is not None:  # windows: an image is several samples to the layer
        batch, tokens = batch * tokens // ranks.token_count, ranks.token_count
    feature, token, sample = ranks.feature, ranks.token, ranks.batch_rank(batch)
    core = (sample or batch) * (token or tokens) * (feature or in_features)
    bases = batch * (sample or 0) + tokens * (token or 0) + in_features * (feature or 0)
    return FLOAT_BYTES * (core + bases)
