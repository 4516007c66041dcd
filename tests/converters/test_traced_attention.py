"""Attention on three, four and five axes, with masks that are whole, broadcast or none, against torch."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from wasi_export.converters.inference import export_inference
from wasi_export.manifest import InputSpec

SPEC = InputSpec(height=4, width=4, mean=(0.5,), std=(0.5,), channels=1)


class Attends(nn.Module):
    """Attention over the rows of an image and of twice it, with the axes that are asked for."""

    def __init__(self, axes: tuple[int, ...], mask: tuple[int, ...] | None) -> None:
        super().__init__()
        self.axes, self.q, self.k = axes, nn.Linear(4, 4), nn.Linear(4, 4)
        self.mask = None if mask is None else nn.Parameter(torch.randn(mask))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        batch = images.shape[0]
        x = torch.cat([images, 2 * images], dim=1).reshape(-1, *self.axes, 4, 4)
        y = F.scaled_dot_product_attention(self.q(x), self.k(x), x, attn_mask=self.mask)
        return y.reshape(batch, -1)


def require_equal(model: nn.Module, opset: int) -> None:
    session = ort.InferenceSession(export_inference(model, SPEC, opset=opset).SerializeToString())
    for batch in (1, 2, 7):
        images = torch.randn(batch, 1, 4, 4)
        with torch.no_grad():
            expected = model(images).numpy()
        (found,) = session.run(None, {"images": images.numpy()})
        np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("axes", "mask"),
    [
        ((), None),
        ((), (4, 4)),
        ((2,), None),
        ((2, 1), None),
        ((1, 2), (2, 4, 4)),
        ((1, 2), (1, 1, 2, 4, 4)),
        ((2, 1), (4, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("opset", [18, 23])
def test_attention_of_any_rank_is_that_of_torch(axes, mask, opset):
    torch.manual_seed(0)
    model = Attends(axes, mask).eval()
    require_equal(model, opset)


class SharesKeys(nn.Module):
    """Attention of four heads of queries, of which several share keys and values."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(4, 4 * 4), nn.Linear(4, heads * 4)
        self.grouped = heads > 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        q, k = (of(images[:, 0]).unflatten(-1, (-1, 4)).transpose(1, 2) for of in (self.q, self.k))
        return F.scaled_dot_product_attention(q, k, 2 * k, enable_gqa=self.grouped).flatten(1)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("opset", [18, 23])
def test_attention_with_shared_keys_is_that_of_torch(heads, opset):
    torch.manual_seed(0)
    require_equal(SharesKeys(heads).eval(), opset)
