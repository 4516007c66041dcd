"""What is imported at start: a board must not wait for torch, nor `--help` for numpy.

Every test asks a fresh interpreter which modules it holds after an import; the last ones show that the
question can be answered wrongly, so that a guard that guards nothing is noticed.
"""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import wasi_export
import wasi_export.runtimes

HEAVY = {
    "torch", "torchvision", "timm", "accelerate", "onnx", "onnx_ir", "onnxscript", "sklearn", "scipy",
    "matplotlib", "jinja2", "tomli_w", "jaxtyping",
}  # fmt: skip
SLOW_TO_START = HEAVY | {"numpy", "onnxruntime", "pydantic", "PIL", "safetensors", "psutil", "rich"}

WITH_TORCH = {"subspace", "training", "converters"}
SHARED = [
    f"wasi_export.{module.name}"
    for module in pkgutil.iter_modules(wasi_export.__path__)
    if module.name not in {*WITH_TORCH, "__main__"}
]
RUNTIMES = [
    f"wasi_export.runtimes.{module.name}" for module in pkgutil.iter_modules(wasi_export.runtimes.__path__)
]


def loaded_after(code: str, *, path: Path | None = None) -> set[str]:
    """Returns the top-level modules that a fresh interpreter holds after running the code."""
    report = "import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    environment = dict(os.environ, PYTHONPATH=str(path or ""))
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["wasi_export", *SHARED, *RUNTIMES])
def test_a_torch_free_module_imports_nothing_heavy(module: str) -> None:
    assert loaded_after(f"import {module}") & HEAVY == set()


def test_the_command_line_starts_without_numpy_pydantic_and_onnxruntime() -> None:
    loaded = loaded_after("import wasi_export.cli")
    assert "typer" in loaded
    assert loaded & SLOW_TO_START == set()


def test_the_modules_that_need_torch_are_not_in_the_lists() -> None:
    listed = {name.split(".")[1] for name in SHARED + RUNTIMES}
    assert listed.isdisjoint(WITH_TORCH)
    assert {"cli", "config", "artifact", "datasets", "ranks", "runtimes"} <= listed


def test_the_guard_sees_a_heavy_module_that_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").touch()
    (tmp_path / "planted.py").write_text("import wasi_export\nimport torch\n")
    assert loaded_after("import planted", path=tmp_path) & HEAVY == {"torch"}


def test_the_guard_sees_what_the_runtime_needs() -> None:
    assert {"numpy", "onnxruntime"} <= loaded_after("import wasi_export.runtimes.session") & SLOW_TO_START


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the time of a process is measured with os.wait4")
def test_help_takes_under_three_tenths_of_a_second_of_processor_time() -> None:
    def seconds() -> float:
        command = [sys.executable, "-m", "wasi_export", "--help"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return used.ru_utime + used.ru_stime

    assert min(seconds() for _ in range(5)) < 0.3
