"""JUnit XML: what a CI counts, and names and messages that XML must not take for its own."""

from pathlib import Path
from typing import get_args
from xml.etree import ElementTree as ET

import pytest
import xmlschema

from wasi_export.junit import to_junit
from wasi_export.report import Check, Host, Report, Status

HOST = Host(machine="x86_64", processor="p", cores=1, memory_mb=1, system="Linux", versions={})


SCHEMA = xmlschema.XMLSchema(Path(__file__).parent / "junit-4.xsd")
"""Of Jenkins, as the sources of the PyPI package avocado-framework 113.0 have it."""


def suite_of(*checks: Check, model: str = "m") -> ET.Element:
    report = Report(bundle="b", model=model, model_sha256="0" * 64, checks=checks, host=HOST)
    text = to_junit(report)
    SCHEMA.validate(text.decode("utf-8"))
    (suite,) = ET.fromstring(text)
    return suite


@pytest.mark.parametrize("status", get_args(Status))
def test_every_status_is_valid_junit(status):
    assert len(suite_of(Check(name="a", status=status, value=1, threshold=2, detail="b"))) == 1


def test_what_is_no_junit_is_refused():
    with pytest.raises(xmlschema.XMLSchemaValidationError, match="Unexpected child with tag 'testcase'"):
        SCHEMA.validate("<testsuites><testcase name='a'/></testsuites>")


def test_every_check_is_a_case_and_counted():
    suite = suite_of(
        Check(name="integrity", status="passed"),
        Check(name="parity error", status="failed", value=1e-3, threshold=1e-5, detail="largest"),
        Check(name="accuracy", status="no data", threshold=0.9, detail="give --data"),
        Check(name="latency ratio", status="undecided", value=0.6, threshold=0.6),
        Check(name="size", status="info", value=2.5, unit="MB"),
    )
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "1", "errors": "2", "skipped": "1"}
    names = [case.get("name") for case in suite]
    assert names == ["integrity", "parity error", "accuracy", "latency ratio", "size"]
    passed, failed, missing, unsure, told = suite
    assert unsure.find("error").get("type") == "undecided"
    assert passed.find("failure") is None
    assert failed.find("failure").get("message") == "0.001, threshold 1e-05, evidence device: largest"
    assert missing.find("error").get("type") == "no data"
    assert told.find("skipped").text.startswith("2.5 MB")


def test_what_is_not_xml_is_told_as_it_is():
    name = '<a> & "b" é'
    suite = suite_of(Check(name=name, status="failed", detail=name), model=name)
    (case,) = suite
    assert case.get("name") == name
    assert suite.get("name") == f"{name} on this machine"
    assert case.find("failure").get("message").endswith(name)
