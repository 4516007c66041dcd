"""ONNX on the device: numpy and onnxruntime only. Imported as `wasi_export.runtimes`.

Imports nothing itself: `wasi-export doctor` must start where onnxruntime cannot be imported.
"""

if __name__ != "wasi_export.runtimes":
    raise ImportError(f"import this package as wasi_export.runtimes, not {__name__!r}")
