"""A training step as one plain ONNX graph: its function, its trace, and the operators it is written with."""
