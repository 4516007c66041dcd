"""Memory of a Linear layer in the paper's scope: its weight and its saved input, in fp32.

Gradients, optimiser state and the rest of the model are not in it; the measured peak of a whole training step
is beside it in docs/memory.md.
"""

from dataclasses import dataclass

from wasi_export.cost import FLOAT_BYTES, saved_input_bytes
from wasi_export.ranks import LayerPlan


@dataclass(frozen=True)
class LinearCost:
    """Bytes of one layer for a batch of B images of N tokens."""

    weight_bytes: int
    saved_input_bytes: int

    @property
    def training_bytes(self) -> int:
        """Weight and saved input: the training memory of the paper's tables."""
        return self.weight_bytes + self.saved_input_bytes


def linear_cost(layer: LayerPlan, *, batch: int, tokens: int) -> LinearCost:
    """Returns the cost of a layer, without its bias."""
    return LinearCost(
        weight_bytes=FLOAT_BYTES * layer.parameters,
        saved_input_bytes=saved_input_bytes(layer.in_features, layer.activation, batch=batch, tokens=tokens),
    )
