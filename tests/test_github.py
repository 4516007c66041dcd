"""Workflow commands of GitHub: a line each, whatever a name or a message holds."""

import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wasi_export.errors import UsageError
from wasi_export.github import annotation, annotations, append_summary
from wasi_export.report import Check, Host, Report

HOST = Host(machine="x86_64", processor="p", cores=1, memory_mb=1, system="Linux", versions={})


def report_of(*checks: Check, target: str = "") -> Report:
    return Report(bundle="b", model="m", model_sha256="0" * 64, checks=checks, host=HOST, target=target)


def test_what_did_not_pass_is_annotated_and_the_verdict_told():
    report = report_of(
        Check(name="integrity", status="passed"),
        Check(name="size", status="failed", value=3, threshold=2, unit="MB", detail="model.onnx"),
        Check(name="latency ratio", status="undecided", value=0.6, threshold=0.6, detail="100% noise"),
        Check(name="accuracy", status="no data", threshold=0.9, detail="give --data"),
        Check(name="accuracy of int8", status="info", value=0.9),
        target="ssh://pi",
    )
    assert list(annotations(report)) == [
        "::error title=m on ssh%3A//pi%3A size::failed: 3 MB, threshold 2 MB: model.onnx",
        "::warning title=m on ssh%3A//pi%3A latency ratio::undecided: 0.6, threshold 0.6: 100%25 noise",
        "::warning title=m on ssh%3A//pi%3A accuracy::no data: –, threshold 0.9: give --data",
        "::notice title=m on ssh%3A//pi::"
        "failed: size; undecided: latency ratio; nothing to check for: accuracy",
    ]


@given(st.text(), st.text())
def test_a_command_is_one_line_that_reads_back_as_what_was_told(title, message):
    line = annotation("error", title, message)
    parts = re.fullmatch(r"::error title=([^:,\r\n]*)::([^\r\n]*)", line)
    assert parts
    assert (unquote(parts[1]), unquote(parts[2])) == (title, message)


def test_without_a_workflow_there_is_no_summary(monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    append_summary([report_of()])


def test_a_summary_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot append to .* which GITHUB_STEP_SUMMARY names"):
        append_summary([report_of()])
