"""The precision in which factors are decomposed."""

import torch
from torch import Tensor


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Returns the tensor in fp32 where it has fewer bits: LAPACK has no bf16, and a QR needs the bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
