"""ONNX on the device: numpy and onnxruntime only. Imported as `wasi_export.runtimes`."""

if __name__ != "wasi_export.runtimes":
    raise ImportError(f"import this package as wasi_export.runtimes, not {__name__!r}")

from wasi_export.runtimes.adapter import Adapter as Adapter
