"""What machine this is: the facts without which a latency says nothing."""

import platform

import numpy as np
import onnxruntime
import PIL
import psutil

import wasi_export
from wasi_export.report import Host
from wasi_export.runtimes.processor import CPUINFO, board_name, processor_name, told


def describe_host() -> Host:
    """Returns the board or machine, its processor, cores, memory, system and the versions that matter."""
    return Host(
        machine=_machine(),
        processor=processor_name(told(CPUINFO)),
        cores=psutil.cpu_count() or 1,
        memory_mb=psutil.virtual_memory().total // 10**6,
        system=platform.platform(),
        versions={
            "python": platform.python_version(),
            "wasi-export": wasi_export.__version__,
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    )


def _machine() -> str:
    """Returns the architecture, after the name of the board where the device tree has one."""
    board = board_name()
    return f"{board}, {platform.machine()}" if board else platform.machine()
