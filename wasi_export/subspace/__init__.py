"""The subspace method in torch: factorisation, layers, injection. Knows no timm and no ONNX."""

from wasi_export.subspace.inject import factorize_model as factorize_model
from wasi_export.subspace.inject import install_layers as install_layers
from wasi_export.subspace.inject import subspace_layers as subspace_layers
from wasi_export.subspace.linear import SubspaceLinear as SubspaceLinear
