"""The subspace method in torch: factorisation, layers, injection. Knows no timm and no ONNX."""
