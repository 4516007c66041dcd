"""A report as JUnit XML, which every CI shows.

A check with a threshold is a test case: one that failed is a failure, one for which there was nothing to
measure, or too little, an error. What has no threshold is a case that was skipped, with what was measured as
its text: an attribute is not valid there before `junit-10.xsd`.

Source: `junit-4.xsd` of Jenkins, against which a test validates it.
"""

import re
from collections.abc import Mapping
from xml.etree import ElementTree as ET

from wasi_export.report import Check, Report, Status
from wasi_export.views import check_values

SUITE = "wasi-export"
NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What no XML may have, escaped or not (XML 1.0, 2.2)."""
OUTCOMES: Mapping[Status, str] = {
    "failed": "failure", "undecided": "error", "no data": "error", "info": "skipped",
}  # fmt: skip
"""Element of a test case; what passed has none."""


def to_junit(report: Report) -> bytes:
    """Returns the XML, one test suite."""
    kinds = [OUTCOMES.get(check.status) for check in report.checks]
    counts = {
        "tests": str(len(report.checks)),
        "failures": str(kinds.count("failure")),
        "errors": str(kinds.count("error")),
        "skipped": str(kinds.count("skipped")),
    }
    place = report.target or "this machine"
    facts = {"name": f"{report.model} on {place}", "hostname": report.host.machine}
    suites = ET.Element("testsuites", name=SUITE)
    suite = ET.SubElement(suites, "testsuite", facts | counts)
    for check in report.checks:
        _add_case(suite, f"{SUITE}.{report.model}", check)
    ET.indent(suites)
    text: str = ET.tostring(suites, encoding="unicode", xml_declaration=True)
    return NO_XML.sub("\ufffd", text).encode() + b"\n"


def _add_case(suite: ET.Element, class_name: str, check: Check) -> None:
    case = ET.SubElement(suite, "testcase", name=check.name, classname=class_name)
    value, threshold = check_values(check)
    message = f"{value}, threshold {threshold}, evidence {check.evidence}: {check.detail}"
    kind = OUTCOMES.get(check.status)
    if kind is None:
        ET.SubElement(case, "system-out").text = message
        return
    outcome = ET.SubElement(case, kind)
    if kind == "skipped":
        outcome.text = message
    else:
        outcome.attrib |= {"message": message, "type": check.status}
