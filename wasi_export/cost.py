"""What a Linear layer costs, dense or factored, by formula. Pure arithmetic.

Counts are of multiply-adds (MACs), 1 each; bytes are fp32. Memory is the paper's scope: the weights and the
saved inputs of the layer, not gradients, optimiser state or the rest of the model; the measured peak of a
whole training step stands beside it in every report.
"""

from dataclasses import dataclass

from wasi_export.ranks import LayerPlan

FLOAT_BYTES = 4


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
    """Returns the cost of a layer, without its bias.

    A saved input (B, N, I) with ranks r_token and r_feature takes B·r_token·r_feature + N·r_token +
    I·r_feature numbers; a mode without a rank is kept whole and has no factor.

    Source: arXiv 2510.09160 section 3.4, with the ranks paired with the right modes.
    """
    in_features = layer.in_features
    feature, token = layer.activation.feature, layer.activation.token
    core = batch * (token or tokens) * (feature or in_features)
    bases = tokens * (token or 0) + in_features * (feature or 0)
    return LinearCost(
        parameters=layer.parameters,
        forward_macs=batch * tokens * layer.parameters,
        weight_bytes=FLOAT_BYTES * layer.parameters,
        saved_input_bytes=FLOAT_BYTES * (core + bases),
    )
