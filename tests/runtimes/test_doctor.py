"""The examination of a machine: facts as boards tell them, and what is made of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_bundle, require_schema
from typer.testing import CliRunner

from wasi_export.cli import app
from wasi_export.errors import ExitCode
from wasi_export.runtimes.doctor import Examination, examine, try_bundle
from wasi_export.runtimes.machine import REQUIRED, ChildRun, MachineFacts, gather
from wasi_export.runtimes.processor import processor_features

PI_5 = MachineFacts(
    machine="aarch64",
    pointer_bits=64,
    board="Raspberry Pi 5 Model B Rev 1.0",
    processor="Cortex-A76",
    features=("asimd", "asimddp", "fp"),
    cores=4,
    memory_mb=8000,
    available_mb=6000,
    folder=Path("/home/pi"),
    disk_mb=20_000,
    page_bytes=16384,
    governors=("performance",),
    throttled=0,
    libc="glibc 2.36",
    python="3.11.2",
    versions=dict.fromkeys(REQUIRED, "1.0") | {"onnxruntime": "1.32.0"},
    runtime=ChildRun(exit_code=0),
)


def finding(name: str, **changes: object):
    facts = PI_5.model_copy(update=changes)
    (found,) = (f for f in examine(facts) if f.name == name)
    return found


def test_a_pi_5_that_is_set_up_is_good():
    findings = examine(PI_5)
    assert {f.status for f in findings} == {"good"}
    assert not any(f.remedy for f in findings)
    assert "pages of 16 KiB" in finding("system").found
    assert Examination(facts=PI_5, findings=findings).exit_code == ExitCode.PASSED


@pytest.mark.parametrize(
    ("name", "changes", "status", "remedy"),
    [
        ("system", {"pointer_bits": 32}, "bad", "install a 64-bit system"),
        ("system", {"machine": "riscv64"}, "bad", "wheels for x86-64 and 64-bit ARM"),
        ("processor", {"features": ("asimd", "fp")}, "warning", "no dot product"),
        ("processor", {"machine": "x86_64", "features": ("avx2",)}, "warning", "no VNNI"),
        ("processor", {"machine": "x86_64", "features": ("sse2",)}, "warning", "no AVX2"),
        ("processor", {"machine": "x86_64", "features": ("avx2", "avx_vnni")}, "good", ""),
        ("processor", {"features": ()}, "good", ""),
        ("packages", {"versions": PI_5.versions | {"psutil": None}}, "bad", "psutil missing: pip install"),
        ("runtime", {"versions": PI_5.versions | {"onnxruntime": "1.20.1"}}, "warning", "--target-runtime"),
        ("runtime", {"runtime": ChildRun(exit_code=-4)}, "bad", "built for a newer processor"),
        ("runtime", {"runtime": ChildRun(exit_code=-11)}, "bad", "/proc/cpuinfo"),
        ("runtime", {"runtime": ChildRun(exit_code=-9)}, "bad", "full memory"),
        ("runtime", {"runtime": ChildRun(exit_code=None)}, "bad", "--force-reinstall"),
        ("runtime", {"runtime": ChildRun(exit_code=1, message="no numpy")}, "bad", "--force-reinstall"),
        ("memory", {"available_mb": 200}, "warning", "below 300 MB"),
        ("disk", {"disk_mb": 100}, "warning", "make room"),
        ("disk", {"disk_mb": None}, "warning", ""),
        ("clock", {"governors": ("ondemand", "performance")}, "warning", "`performance`"),
        ("throttling", {"throttled": 0x50005}, "warning", "worthless"),
        ("throttling", {"throttled": 0x20000}, "warning", "watch power"),
    ],
)  # fmt: skip
def test_what_is_wrong_has_a_remedy(name, changes, status, remedy):
    found = finding(name, **changes)
    assert found.status == status
    assert remedy in found.remedy
    findings = examine(PI_5.model_copy(update=changes))
    expected = ExitCode.HOST if status == "bad" else ExitCode.PASSED
    assert Examination(facts=PI_5, findings=findings).exit_code == expected


def test_throttling_is_told_by_name():
    assert finding("throttling", throttled=0x50005).found == "now: under-voltage, throttling"
    assert finding("throttling", throttled=0x20000).found == "since it was started: a capped frequency"


def test_what_is_not_told_is_not_judged():
    names = {f.name for f in examine(PI_5.model_copy(update={"governors": (), "throttled": None}))}
    assert not names & {"clock", "throttling"}


def test_features_are_those_of_all_cores():
    text = "Features\t: fp asimd asimddp\n\nFeatures\t: fp asimd\n"
    assert processor_features(text) == ("asimd", "fp")
    assert processor_features("flags\t\t: sse avx2\n") == ("avx2", "sse")
    assert processor_features("") == ()


def write_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [("kill -ILL $$", -4, ""), ("echo first >&2; echo last >&2; exit 3", 3, "last"), ("exit 0", 0, "")],
)
def test_a_runtime_that_kills_its_process_does_not_kill_the_doctor(tmp_path, script, code, message):
    facts = gather(tmp_path, python=write_python(tmp_path / "python", script))
    assert facts.runtime == ChildRun(exit_code=code, message=message)


def test_this_machine_is_described(tmp_path):
    facts = gather(tmp_path / "not" / "there")
    assert facts.runtime.exit_code == 0
    assert facts.disk_mb is not None
    assert facts.memory_mb >= facts.available_mb > 0
    assert all(facts.versions[name] for name in REQUIRED)
    assert MachineFacts.model_validate_json(facts.model_dump_json()) == facts


def test_the_doctor_does_not_import_what_it_looks_at():
    modules = "wasi_export.runtimes.doctor, wasi_export.runtimes.machine, wasi_export.cli.doctor"
    code = f"import sys, {modules}; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_bundle_is_run(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    good = try_bundle(bundle, PI_5)
    assert (good.status, good.remedy) == ("good", "")
    assert "loads in" in good.found
    assert try_bundle(bundle, PI_5.model_copy(update={"available_mb": 1})).status == "warning"
    old = PI_5.model_copy(update={"versions": {"onnxruntime": "1.2"}})
    assert try_bundle(bundle, old).status == "bad"
    assert "1.2 is installed" in try_bundle(bundle, old).found


def test_the_command_gives_a_table_or_json(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    told = CliRunner().invoke(app, ["doctor", str(bundle)])
    assert told.exit_code == 0, told.output
    assert "runs in" in told.stdout
    written = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path), "--json"])
    require_schema("doctor", written.stdout)
    result = Examination.model_validate_json(written.stdout)
    assert result.findings == examine(result.facts)
    assert json.loads(written.stdout)["schema_version"] == 1


def test_a_folder_of_this_machine_is_refused_with_a_target(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--folder", str(tmp_path), "--target", "arm64"])
    assert (result.exit_code, result.stdout) == (ExitCode.USAGE, "")
    assert result.stderr == (
        f"error: --folder {tmp_path} is of this machine, --target looks at others: leave one out\n"
    )


def test_no_bundle_is_one_line(tmp_path):
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == ExitCode.INTEGRITY
    assert len(result.stderr.splitlines()) == 1
