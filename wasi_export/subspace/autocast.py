"""The autocast setting of a forward pass, for the part of it that a backward pass does again.

Autograd runs a custom backward outside the autocast region of its forward, where the products would meet
tensors of two types.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AutocastSetting:
    """Whether a device computes in a smaller type, and which."""

    device_type: str
    enabled: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "AutocastSetting":
        """Returns the setting now, on the device of a tensor."""
        kind = tensor.device.type
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> torch.autocast:
        """Returns the context with this setting."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)
