"""torch → ONNX, and ONNX → ONNX. Imported as `wasi_export.converters`."""

if __name__ != "wasi_export.converters":
    raise ImportError(f"import this package as wasi_export.converters, not {__name__!r}")
