"""From a timm vision transformer to a validated low-rank ONNX model on a small board."""

__version__ = "0.1.0"
