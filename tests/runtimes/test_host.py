import platform

import onnxruntime
import pytest

from wasi_export.runtimes.host import describe_host, processor_name

PI_5 = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\nprocessor\t: 1\nCPU part\t: 0xd0b\n"
BIG_LITTLE = "CPU part\t: 0xd08\nCPU part\t: 0xd03\n"


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC\n", "AMD EPYC"),
        (PI_5, "Cortex-A76"),
        (BIG_LITTLE, "Cortex-A53, Cortex-A72"),
        ("CPU part\t: 0xfff\n", "ARM part 0xfff"),
    ],
)
def test_the_processor_is_named(cpuinfo, name):
    assert processor_name(cpuinfo) == name


def test_the_host_states_what_a_latency_depends_on():
    host = describe_host()
    assert platform.machine() in host.machine
    assert host.processor
    assert host.cores >= 1
    assert host.memory_mb > 100
    assert host.versions["onnxruntime"] == onnxruntime.__version__
    assert host.versions["python"] == platform.python_version()
