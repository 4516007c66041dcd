"""Looks at files that anybody may have written, before a library that trusts them does.

`document` reads JSON, `tensors` looks at safetensors, `graph` at ONNX, all without torch and without onnx.
What is refused is refused with a `MalformedError`: one line, without the path, which the caller knows.
"""
