"""JUnit XML: what a CI counts, and names and messages that XML must not take for its own."""

from xml.etree import ElementTree as ET

from wasi_export.junit import to_junit
from wasi_export.report import Check, Host, Report

HOST = Host(machine="x86_64", processor="p", cores=1, memory_mb=1, system="Linux", versions={})


def suite_of(*checks: Check, model: str = "m") -> ET.Element:
    report = Report(bundle="b", model=model, model_sha256="0" * 64, checks=checks, host=HOST)
    (suite,) = ET.fromstring(to_junit(report))
    return suite


def test_every_check_is_a_case_and_counted():
    suite = suite_of(
        Check(name="integrity", status="passed"),
        Check(name="parity error", status="failed", value=1e-3, threshold=1e-5, detail="largest"),
        Check(name="accuracy", status="no data", threshold=0.9, detail="give --data"),
        Check(name="size", status="info", value=2.5, unit="MB"),
    )
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "1", "errors": "1", "skipped": "1"}
    assert [case.get("name") for case in suite] == ["integrity", "parity error", "accuracy", "size"]
    passed, failed, missing, told = suite
    assert passed.find("failure") is None
    assert failed.find("failure").get("message") == "0.001, threshold 1e-05, evidence device: largest"
    assert missing.find("error").get("type") == "no data"
    assert told.find("skipped").get("message").startswith("2.5 MB")


def test_what_is_not_xml_is_told_as_it_is():
    name = '<a> & "b" é'
    suite = suite_of(Check(name=name, status="failed", detail=name), model=name)
    (case,) = suite
    assert case.get("name") == name
    assert suite.get("name") == f"{name} on this machine"
    assert case.find("failure").get("message").endswith(name)
