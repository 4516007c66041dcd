"""A report in a GitHub workflow: annotations at the top of the run, and the summary of the job.

Source: docs.github.com, "Workflow commands for GitHub Actions"; how values are escaped is in actions/toolkit,
packages/core/src/command.ts.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from wasi_export.errors import UsageError
from wasi_export.report import Report, Status
from wasi_export.views import check_values, to_markdown

LEVELS: Mapping[Status, str] = {"failed": "error", "undecided": "warning", "no data": "warning"}
SUMMARY = "GITHUB_STEP_SUMMARY"


def annotations(report: Report) -> Iterator[str]:
    """Yields a workflow command for each check that did not pass, and a notice with the verdict."""
    place = f"{report.model} on {report.target}" if report.target else report.model
    for check in report.checks:
        if level := LEVELS.get(check.status):
            value, threshold = check_values(check)
            message = f"{check.status}: {value}, threshold {threshold}: {check.detail}"
            yield annotation(level, f"{place}: {check.name}", message)
    yield annotation("notice", place, report.verdict)


def annotation(level: str, title: str, message: str) -> str:
    """Returns one workflow command; level is error, warning or notice."""
    return f"::{level} title={_escaped(title, ':,')}::{_escaped(message)}"


def append_summary(reports: Iterable[Report]) -> None:
    """Appends reports as Markdown to the summary of the job, where the workflow names a file for it.

    Raises:
        UsageError: that file cannot be written.
    """
    name = os.environ.get(SUMMARY)
    if not name:
        return
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.writelines(map(to_markdown, reports))
    except OSError as error:
        raise UsageError(f"cannot append to {name}, which {SUMMARY} names: {error}") from error


def _escaped(text: str, more: str = "") -> str:
    """Returns text without what would end a workflow command or a property of it; % comes first."""
    for character in f"%\r\n{more}":
        text = text.replace(character, f"%{ord(character):02X}")
    return text
