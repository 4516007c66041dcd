"""A report as JUnit XML, which every CI shows.

A check with a threshold is a test case: one that failed is a failure, one for which there was nothing to
measure an error. What has no threshold is a case that was skipped, with what was measured as the message.

Source: the schema of Jenkins' xUnit plugin, `junit-10.xsd`.
"""

from xml.etree import ElementTree as ET

from wasi_export.report import Check, Report
from wasi_export.views import check_values

SUITE = "wasi-export"


def to_junit(report: Report) -> bytes:
    """Returns the XML, one test suite."""
    counts = {
        "tests": str(len(report.checks)),
        "failures": str(sum(check.status == "failed" for check in report.checks)),
        "errors": str(sum(check.status == "no data" for check in report.checks)),
        "skipped": str(sum(check.status == "info" for check in report.checks)),
    }
    place = report.target or "this machine"
    facts = {"name": f"{report.model} on {place}", "hostname": report.host.machine}
    suites = ET.Element("testsuites", name=SUITE)
    suite = ET.SubElement(suites, "testsuite", facts | counts)
    for check in report.checks:
        _add_case(suite, f"{SUITE}.{report.model}", check)
    ET.indent(suites)
    text: bytes = ET.tostring(suites, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _add_case(suite: ET.Element, class_name: str, check: Check) -> None:
    case = ET.SubElement(suite, "testcase", name=check.name, classname=class_name)
    value, threshold = check_values(check)
    message = f"{value}, threshold {threshold}, evidence {check.evidence}: {check.detail}"
    kind = {"failed": "failure", "no data": "error", "info": "skipped"}.get(check.status)
    if kind is None:
        ET.SubElement(case, "system-out").text = message
        return
    outcome = ET.SubElement(case, kind, message=message)
    if kind != "skipped":
        outcome.set("type", check.status)
