"""Graph passes, one a file: exact rewrites of an `onnx_ir.Model`, in place."""
