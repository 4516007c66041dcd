"""Is this machine fit to run models, and if not, why, and what helps? A judgement of `MachineFacts`.

`bad` is what keeps a model from running, `warning` what makes it slow, or its figures worthless.
"""

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from wasi_export.artifact import Bundle
from wasi_export.errors import ExitCode, HostError, ModelFailedError
from wasi_export.report import THROTTLING
from wasi_export.runtimes.machine import MachineFacts
from wasi_export.settings import Frozen

Status = Literal["good", "warning", "bad"]
MIN_ONNXRUNTIME = (1, 23)
"""Of the graphs that `export` writes by default; see pyproject.toml."""
WHEELS = {"x86_64": "x86-64", "amd64": "x86-64", "aarch64": "64-bit ARM", "arm64": "64-bit ARM"}
FREE_MEMORY_MB, FREE_DISK_MB = 300, 500
"""A ViT-S and the runtime take 120 to 220 MB (docs/inference.md); a bundle and its states some 100 MB."""


class Finding(Frozen):
    """One thing looked at."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    """Empty where nothing is to be done."""


class Examination(Frozen):
    """The result of `wasi-export doctor`."""

    schema_version: Literal[1] = 1
    facts: MachineFacts
    findings: tuple[Finding, ...]

    @property
    def exit_code(self) -> ExitCode:
        """3 where something is bad."""
        return ExitCode.HOST if any(f.status == "bad" for f in self.findings) else ExitCode.PASSED


def examine(facts: MachineFacts) -> tuple[Finding, ...]:
    """Returns what is good and what is not."""
    return (
        _architecture(facts),
        _processor(facts),
        _python(facts),
        _runtime(facts),
        _memory(facts),
        _disk(facts),
        *_clock(facts),
        *_throttling(facts),
    )


def try_bundle(path: Path, facts: MachineFacts) -> Finding:
    """Returns whether a bundle is whole and its model runs here, in a fresh process.

    Raises:
        IntegrityError: it is no bundle, or a file of it is not what its manifest says.
    """
    from wasi_export.runtimes.footprint import measure_footprint  # imports the runtime, which must work

    bundle = Bundle.open(path)
    needed, number = bundle.manifest.min_onnxruntime, facts.versions.get("onnxruntime")
    if _release(number) < _release(needed):
        remedy = f"update onnxruntime, or export the model with --target-runtime {number}"
        found = f"{path} needs onnxruntime {needed}, {number} is installed"
        return Finding(name="bundle", status="bad", found=found, remedy=remedy)
    try:
        footprint = measure_footprint(bundle.model_path)
    except (HostError, ModelFailedError) as error:
        what, _, remedy = str(error).rpartition(": ")
        return Finding(name="bundle", status="bad", found=what or str(error), remedy=remedy if what else "")
    found = f"{path} loads in {footprint.load_ms:.0f} ms and runs in {footprint.peak_rss_mb:.0f} MB"
    if footprint.peak_rss_mb > facts.available_mb:
        return Finding(name="bundle", status="warning", found=found, remedy="that is more than is available")
    return Finding(name="bundle", status="good", found=found)


def _architecture(facts: MachineFacts) -> Finding:
    kind = WHEELS.get(facts.machine.lower())
    page = f", pages of {facts.page_bytes // 1024} KiB" if facts.page_bytes else ""
    found = f"{facts.board or facts.machine}, {facts.pointer_bits}-bit Python on {facts.machine}{page}"
    if facts.pointer_bits != 64:
        remedy = "onnxruntime has no wheels for 32 bits: install a 64-bit system (Raspberry Pi OS 64-bit)"
        return Finding(name="system", status="bad", found=found, remedy=remedy)
    if kind is None:
        remedy = "onnxruntime has wheels for x86-64 and 64-bit ARM: build it, or take such a machine"
        return Finding(name="system", status="bad", found=found, remedy=remedy)
    return Finding(name="system", status="good", found=found)


def _processor(facts: MachineFacts) -> Finding:
    features, arm = set(facts.features), facts.machine.lower() in ("aarch64", "arm64")
    found = f"{facts.processor}, {facts.cores} usable core{'s' if facts.cores > 1 else ''}"
    if not features:
        return Finding(name="processor", status="good", found=found)
    if arm:
        dot = "asimddp" in features
        remedy = "" if dot else "no dot product: int8 gains little here, measure it with `wasi-export bench`"
    else:
        dot = bool(features & {"avx512_vnni", "avx_vnni"})
        remedy = ""
        if not features & {"avx2", "avx512f"}:
            remedy = "no AVX2: expect several times the latency of a recent processor"
        elif not dot:
            remedy = "no VNNI: int8 products are slower and may saturate, check with `wasi-export validate`"
    told = "dot product for int8" if dot else "no dot product for int8"
    status: Status = "warning" if remedy else "good"
    return Finding(name="processor", status=status, found=f"{found}, {told}", remedy=remedy)


def _python(facts: MachineFacts) -> Finding:
    packages = ", ".join(f"{name} {number}" for name, number in facts.versions.items() if number)
    found = f"Python {facts.python} ({facts.libc or 'another libc than glibc'}); {packages}"
    missing = [name for name, number in facts.versions.items() if number is None]
    if missing:
        remedy = f"{', '.join(missing)} missing: pip install wasi-export"
        return Finding(name="packages", status="bad", found=found, remedy=remedy)
    return Finding(name="packages", status="good", found=found)


def _runtime(facts: MachineFacts) -> Finding:
    number, code = facts.versions.get("onnxruntime"), facts.runtime.exit_code
    if code != 0:
        found, remedy = _crash(facts)
        return Finding(name="runtime", status="bad", found=found, remedy=remedy)
    found = f"onnxruntime {number} imports"
    if _release(number) < MIN_ONNXRUNTIME:
        oldest = ".".join(map(str, MIN_ONNXRUNTIME))
        remedy = f"older than {oldest}: update it, or export with --target-runtime {number}"
        return Finding(name="runtime", status="warning", found=found, remedy=remedy)
    return Finding(name="runtime", status="good", found=found)


def _crash(facts: MachineFacts) -> tuple[str, str]:
    """Returns how the import of the runtime ended, and what may help."""
    code, again = facts.runtime.exit_code, "pip install --force-reinstall onnxruntime"
    if code is None:
        return "importing onnxruntime hangs", f"{again}; look for a full memory or a slow card"
    if code == -signal.SIGILL:
        return (
            f"importing onnxruntime is an illegal instruction for {facts.processor}",
            "the wheel is built for a newer processor: install an older onnxruntime, or build it here",
        )
    if code == -signal.SIGSEGV:
        return (
            "importing onnxruntime is a segmentation fault",
            "seen where /proc/cpuinfo or /sys/devices/system/cpu/possible cannot be read, as in some "
            f"containers: show them to the process, or {again}",
        )
    if code < 0:
        return f"importing onnxruntime was killed by signal {-code}", f"{again}; look for a full memory"
    return f"importing onnxruntime failed: {facts.runtime.message}", again


def _memory(facts: MachineFacts) -> Finding:
    found = f"{facts.available_mb} of {facts.memory_mb} MB available"
    if facts.available_mb < FREE_MEMORY_MB:
        remedy = f"below {FREE_MEMORY_MB} MB: stop other programs, or take a smaller model"
        return Finding(name="memory", status="warning", found=found, remedy=remedy)
    return Finding(name="memory", status="good", found=found)


def _disk(facts: MachineFacts) -> Finding:
    if facts.disk_mb is None:
        return Finding(name="disk", status="warning", found=f"{facts.folder} does not tell its free space")
    found = f"{facts.disk_mb} MB free in {facts.folder}"
    if facts.disk_mb < FREE_DISK_MB:
        remedy = f"below {FREE_DISK_MB} MB: a state that cannot be saved ends `adapt`, make room"
        return Finding(name="disk", status="warning", found=found, remedy=remedy)
    return Finding(name="disk", status="good", found=found)


def _clock(facts: MachineFacts) -> Iterator[Finding]:
    if facts.governors:
        found = f"governor {', '.join(facts.governors)}"
        if facts.governors == ("performance",):
            yield Finding(name="clock", status="good", found=found)
        else:
            remedy = "latencies vary with the clock: set `performance` while you measure"
            yield Finding(name="clock", status="warning", found=found, remedy=remedy)


def _throttling(facts: MachineFacts) -> Iterator[Finding]:
    if facts.throttled is None:
        return
    now, before = (
        [name for bit, name in enumerate(THROTTLING) if facts.throttled >> (bit + shift) & 1]
        for shift in (0, 16)
    )
    if now:
        remedy = "latencies are worthless now: use the board's own power supply, and cool it"
        yield Finding(name="throttling", status="warning", found=f"now: {', '.join(now)}", remedy=remedy)
    elif before:
        found = f"since it was started: {', '.join(before)}"
        remedy = "watch power supply and temperature while you measure"
        yield Finding(name="throttling", status="warning", found=found, remedy=remedy)
    else:
        yield Finding(name="throttling", status="good", found="none since it was started")


def _release(number: str | None) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", number or "")[:2]))
