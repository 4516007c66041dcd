"""What a Linear layer costs, dense or factored, by formula. Pure arithmetic.

Counts are of multiply-adds (MACs), 1 each; bytes are fp32.
"""

from dataclasses import dataclass

from wasi_export.ranks import ActivationRanks, weight_parameters

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
        return weight_parameters(self.out_features, self.in_features, self.rank)

    @property
    def macs(self) -> int:
        """Multiply-adds of a forward pass of one image."""
        return self.tokens * self.parameters


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
